/** LOOP_CHANGE_FD: the switch to another backing file, checked before, confirmed after, and taken back where it is not as asked. */

import type { Backing } from '../attach/backing.ts'
import { lockControl } from '../attach/lock.ts'
import { type BackingIdentity, conflicts, findAttachments, overlapError } from '../attach/overlap.ts'
import { Deadline } from '../common/deadline.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { diagnose } from '../errors/explain.ts'
import { type Handle, readSize } from '../handle/handle.ts'
import { binding } from '../kernel/binding.ts'
import { CONTROL } from '../kernel/devnode.ts'
import { close, O_RDWR, open } from '../kernel/files.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { LO_FLAGS_DIRECT_IO, LO_FLAGS_READ_ONLY, type LoopInfo64, visibleSize } from '../kernel/uapi.ts'
import { restorePartitions } from '../partitions/blkpg.ts'
import { openSource, type Source } from './copy.ts'
import { guardFilesystem } from './mounted-guard.ts'

export const CHANGE = 'LOOP_CHANGE_FD'

/** @throws `not-read-only` */
export async function readChangeable(target: Handle): Promise<LoopInfo64> {
  const { info } = await target.readInfo()
  if ((info.flags & LO_FLAGS_READ_ONLY) !== 0) return info
  throw refusal('not-read-only', 'ioctl', 'the backing file of a writable device cannot be changed', {
    path: target.path,
    ioctl: CHANGE,
    hint: 'attach with readOnly: true',
  })
}

/**
 * The present file, or the device. The kernel compares the new file with what the old one is now, not with what the
 * device shows.
 *
 * @throws `size-mismatch` where these are not the same
 */
export async function openPresent(target: Handle, info: LoopInfo64): Promise<Source> {
  const present = await openSource(target, info)
  const shown = readSize(target)
  const now = visibleSize(present.size, info.offset, info.sizeLimit)
  if (!present.isFile || now === shown) return present
  await present.close()
  throw refusal('size-mismatch', 'ioctl', `the present backing file has ${now} bytes, the device shows ${shown}`, {
    path: target.path,
    backingFile: present.path,
    ioctl: CHANGE,
    hint: 'the file changed its size since it was attached: refreshCapacity() first',
  })
}

/** The new file must not be written through another device. */
export async function refuseOverlap(
  handle: Handle,
  backing: BackingIdentity,
  { offset, sizeLimit }: LoopInfo64,
): Promise<void> {
  const claim = { offset, sizeLimit, readOnly: true }
  const others = (await findAttachments(backing)).filter(({ number }) => number !== handle.number)
  const other = others.find((candidate) => conflicts(candidate, claim))
  if (other) throw overlapError(CHANGE, handle.path, backing, other)
}

/**
 * LOOP_CHANGE_FD, read back. Nobody who keeps to the lock attaches the new file between the last look and the switch,
 * and nobody mounts the device. What fails after the switch is undone by switching back, where the present file can be
 * reached.
 */
export async function switchBackingFile(
  target: Handle,
  backing: Backing,
  present: Source,
  force: boolean,
): Promise<void> {
  const info = await readChangeable(target)
  const partitions = sysfs.hasPartitions(target.number) ? sysfs.readPartitions(target.number) : []
  const control = await open(CONTROL, O_RDWR)
  let exclusive = -1
  try {
    const lock = await lockControl(control, new Deadline(1_000))
    try {
      await refuseOverlap(target, backing, info)
      if (!force) exclusive = await guardFilesystem(target)
      await issueChange(target, backing, info)
    } finally {
      lock.release()
    }
    await confirmChange(target, backing, info, present, partitions)
  } finally {
    await letGo(exclusive)
    await letGo(control)
  }
}

/** Closes it, where there is one. */
export async function letGo(fd: number): Promise<void> {
  if (fd >= 0) await close(fd)
}

async function issueChange(
  target: Handle,
  to: Pick<Backing, 'fd' | 'path' | 'device' | 'inode' | 'rdevice'>,
  before: LoopInfo64,
): Promise<void> {
  const { device, inode, rdevice = 0n } = to
  const answer = await target.changeIdentity({ device, inode, rdevice, offset: before.offset }, () =>
    binding().loopChangeFd(target.descriptor, to.fd),
  )
  if (answer < 0) throw await diagnose(target.failure(CHANGE, answer, { backingFile: to.path, backingFd: to.fd }))
}

async function confirmChange(
  target: Handle,
  backing: Backing,
  before: LoopInfo64,
  present: Source,
  partitions: readonly sysfs.KnownPartition[],
): Promise<void> {
  try {
    const { info: after } = await target.readInfo()
    if (after.device !== backing.device || after.inode !== backing.inode) {
      throw refusal('unknown', 'ioctl', 'the kernel took another file: was the descriptor closed?', {
        path: target.path,
        backingFile: backing.path,
        ioctl: CHANGE,
      })
    }
    await keepDirectIO(target, before, after)
    // A device with partition scan drops those that the kernel did not find itself.
    if (partitions.length > 0) await restorePartitions(target, partitions)
  } catch (error) {
    const isBack = present.isFile && (await switchBack(target, before, present))
    // With no way back the change has happened: only that it was to another file is a failure of it, and neither less
    // direct I/O than before is one, nor a file that cannot be asked what it is.
    if (isBack || LoopError.is(error, 'unknown')) throw error
  }
}

async function switchBack(target: Handle, before: LoopInfo64, { fd, path }: Source): Promise<boolean> {
  try {
    await issueChange(target, { ...before, fd, path }, before)
    await keepDirectIO(target, before, (await target.readInfo()).info)
    return true
  } catch {
    // The error that made it necessary is the one to be told.
    return false
  }
}

/** The kernel takes the new descriptor's O_DIRECT over, and drops direct I/O where the new file cannot do it. */
async function keepDirectIO(handle: Handle, before: LoopInfo64, after: LoopInfo64): Promise<void> {
  if (((before.flags ^ after.flags) & LO_FLAGS_DIRECT_IO) === 0) return
  const enabled = (before.flags & LO_FLAGS_DIRECT_IO) === 0 ? 0 : 1
  const answer = await handle.write('loopSetDirectIo', enabled)
  if (answer < 0) throw handle.explain('LOOP_SET_DIRECT_IO', answer)
}
