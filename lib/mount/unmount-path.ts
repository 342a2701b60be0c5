/** Unmounting by the folder, what another process has mounted from a loop device. */

import { checkBoolean, checkOptions } from '../common/arguments.ts'
import { backoff, CHANGING, checkDeadline, Deadline } from '../common/deadline.ts'
import { assertSupported, refusal } from '../errors/errors.ts'
import { explained } from '../errors/given-up.ts'
import { type Mount as Mounted, readMountsSync } from '../kernel/mountinfo.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { findLoopOf } from '../observe/mounted.ts'
import type { UnmountOptions } from './mount.ts'
import { checkTarget } from './options.ts'
import { closeTarget, openTarget, statDescriptor, statUnique } from './target.ts'
import { unmount, type UnmountResult } from './unmount.ts'

/**
 * Unmounts what is mounted on the folder, if it is a filesystem of a loop device.
 *
 * @throws `not-mounted`, `in-use`, `target`, `permission`, `timeout`
 */
export async function unmountPath(path: string, options?: UnmountOptions): Promise<UnmountResult> {
  const given = checkOptions(options, ['lazy', 'signal', 'timeout'])
  const lazy = given.lazy === undefined ? false : checkBoolean('lazy', given.lazy)
  checkTarget(path)
  const deadline = checkDeadline(given, CHANGING)
  assertSupported()
  return explained(() => unmountAt(path, lazy, deadline), path)
}

async function unmountAt(path: string, lazy: boolean, deadline: Deadline): Promise<UnmountResult> {
  const target = await openTarget(path, false, deadline)
  // Of the mount itself: closed before it is unmounted, which it would keep from that.
  const [id, unique] = [statDescriptor(target.fd)?.mountId, statUnique(target.fd)?.mountId]
  closeTarget(target)
  const there = readMountsSync().find((mount) => BigInt(mount.id) === id)
  if (there === undefined || there.mountPoint !== target.path) throw refuse(target.path, 'nothing is mounted there')
  const number = findLoopOf(there)
  if (number === undefined) throw refuse(target.path, `${there.source} is no loop device`)
  const diskSeq = sysfs.readDiskSeqSync(number)
  const { source, fsType } = there
  const result = await unmount({ source, fsType, target: target.path, id: BigInt(there.id), unique }, lazy, deadline)
  if (result === 'unmounted') await waitForDetach(number, diskSeq, there)
  return result
}

/** Milliseconds in which whoever only looks at a device has closed it again. */
const SOON = 1_000

/**
 * A device with autoclear goes with its last mount; where somebody looks at it in this moment, right after that. Who
 * attaches the image again at once must not find it in use.
 */
async function waitForDetach(number: number, diskSeq: number | undefined, gone: Mounted): Promise<void> {
  const isOther = (other: Mounted) => other.device === gone.device || other.source === gone.source
  const isGoing = () =>
    sysfs.isAutoclearSync(number) && sysfs.readDiskSeqSync(number) === diskSeq && !readMountsSync().some(isOther)
  const patience = new Deadline(SOON)
  for (let attempt = 1; isGoing(); attempt++) if (!(await patience.pause(backoff(attempt)))) return
}

function refuse(path: string, detail: string): Error {
  return refusal('not-mounted', 'umount2', detail, { path })
}
