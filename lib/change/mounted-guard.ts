/** K2: LOOP_CHANGE_FD under a mounted filesystem that the kernel then shuts down. */

import { constants } from 'node:os'
import { backoff, Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { adviseHolders, describeHolders, findHolders, type Holder } from '../errors/holders.ts'
import type { Handle } from '../handle/handle.ts'
import { openDevice } from '../kernel/devnode.ts'
import { O_EXCL, O_RDONLY } from '../kernel/files.ts'

/**
 * Filesystems that survive a change of the whole device under them. Since kernel 6.6 or so the change ends in
 * bdev_mark_dead(), which calls the filesystem's ->shutdown where it has one: ext4, xfs, btrfs and others then fail
 * every read. It cannot be found out by looking, so these are the ones that were tried: 40 changes under readers with
 * dropped caches on 6.18, no failed read.
 */
const SURVIVORS = new Set(['squashfs', 'erofs'])

/**
 * An exclusive descriptor, to be held while the device is changed so that nothing is mounted from it in that moment;
 * -1 where somebody holds the device and survives it.
 *
 * @throws `would-shut-down-filesystem`
 */
export async function guardFilesystem(handle: Handle): Promise<number> {
  // Another's probe, of a detach say, holds the device exclusively for a moment.
  const deadline = new Deadline(1_000)
  for (let attempt = 1; ; attempt++) {
    const exclusive = await openDevice(handle.number, O_RDONLY | O_EXCL, handle.bound)
    if (exclusive >= 0) return exclusive
    if (exclusive !== -constants.errno.EBUSY) throw handle.explain('open', exclusive)
    const holders = await refuseEndangered(handle)
    if (holders === undefined) return -1
    if (!(await deadline.pause(backoff(attempt)))) {
      const who = holders.length > 0 ? describeHolders(holders) : 'by what cannot be seen from here'
      throw refuse(handle, holders, `somebody holds the device: ${who}`)
    }
  }
}

/** Undefined: everything that holds the device is known to survive. Else it is not known what does. */
async function refuseEndangered(handle: Handle): Promise<Holder[] | undefined> {
  const holders = await findHolders(handle.number, [handle.descriptor], handle.bound)
  const inFilesystem = holders.filter((holder) => holder.kind === 'mount' || isInUnmounted(holder))
  // What type a filesystem has that is in no mount table is not known.
  const endangered = inFilesystem.filter(
    (holder) => holder.device === handle.path && !(holder.kind === 'mount' && SURVIVORS.has(holder.fsType)),
  )
  if (endangered.length > 0) throw refuse(handle, endangered, describeHolders(endangered))
  // Mounts of partitions, swap and what is built on the device hold it too, and are not shut down.
  const isExplained = inFilesystem.length > 0 || holders.some(({ kind }) => kind !== 'process' && kind !== 'loop')
  return isExplained ? undefined : holders
}

function isInUnmounted(holder: Holder): boolean {
  return holder.kind === 'process' && holder.unmounted === true
}

function refuse(handle: Handle, holders: Holder[], who: string): Error {
  return refusal('would-shut-down-filesystem', 'ioctl', who, {
    path: handle.path,
    ioctl: 'LOOP_CHANGE_FD',
    holders: holders.length > 0 ? holders : [{ device: handle.path, kind: 'unknown' }],
    hint: `${adviseHolders(holders)}; or attach with swappable: true next time; force: true does it all the same`,
  })
}
