/** LOOP_CHANGE_FD: the switch to another backing file, checked before, confirmed after, and taken back where it is not as asked. */

import { constants } from 'node:os'
import type { Backing } from '../attach/backing.ts'
import { lockControl } from '../attach/lock.ts'
import { Deadline } from '../common/deadline.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { diagnose } from '../errors/explain.ts'
import { cleaningUp } from '../errors/given-up.ts'
import type { Handle } from '../handle/handle.ts'
import { readSize } from '../handle/size.ts'
import { type Bound, GivenUp, within } from '../kernel/bounded.ts'
import { CONTROL, openDevice } from '../kernel/devnode.ts'
import { close, closeSoon, O_RDONLY, O_RDWR, open } from '../kernel/files.ts'
import * as sysfs from '../kernel/sysfs.ts'
import {
  decodeInfo,
  LO_FLAGS_DIRECT_IO,
  LO_FLAGS_READ_ONLY,
  type LoopInfo64,
  newInfo,
  visibleSize,
} from '../kernel/uapi.ts'
import { restorePartitions } from '../partitions/blkpg.ts'
import { openSource, type Source } from './copy.ts'
import { guardFilesystem } from './mounted-guard.ts'
import { CHANGE, refuseOverlap } from './overlap.ts'

const { ENXIO } = constants.errno

/** The device as it was when its file was first read: what is switched to is a copy of that. */
export interface Shown {
  info: LoopInfo64
  size: bigint
}

/** @throws `not-read-only` */
export async function readChangeable(target: Handle): Promise<Shown> {
  const { info } = await target.readInfo()
  if ((info.flags & LO_FLAGS_READ_ONLY) !== 0) return { info, size: readSize(target) }
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
export async function openPresent(target: Handle, { info, size }: Shown): Promise<Source> {
  const present = await openSource(target, info)
  const now = visibleSize(present.size, info.offset, info.sizeLimit)
  if (!present.isFile || now === size) return present
  await present.close()
  throw refusal('size-mismatch', 'ioctl', `the present backing file has ${now} bytes, the device shows ${size}`, {
    path: target.path,
    backingFile: present.path,
    ioctl: CHANGE,
    hint: 'the file changed its size since it was attached: refreshCapacity() first',
  })
}

export interface Switch {
  backing: Backing
  present: Source
  /** What `backing` was copied from, or compared with. */
  shown: Shown
  force: boolean
  overlap: 'refuse' | 'allow'
  /** Further rules, under the lock. */
  check?: () => Promise<void>
}

/**
 * LOOP_CHANGE_FD, read back. All of it under the lock of /dev/loop-control: nobody who keeps to that attaches the new
 * file between the last look and the switch, and nobody mounts the device. What fails after the switch is undone by
 * switching back, where the present file can be reached.
 */
export async function switchBackingFile(target: Handle, wanted: Switch): Promise<void> {
  const partitions = sysfs.hasPartitions(target.number) ? sysfs.readPartitions(target.number) : []
  const control = await open(CONTROL, O_RDWR)
  let exclusive = -1
  const change = async () => {
    const lock = await lockControl(control, new Deadline(1_000))
    let after: LoopInfo64
    try {
      if (wanted.overlap === 'refuse') await refuseOverlap(target, wanted.backing, wanted.shown.info)
      await wanted.check?.()
      if (!wanted.force) exclusive = await guardFilesystem(target)
      await assertShowsSame(target, wanted.shown)
      await issueChange(target, wanted.backing, wanted.shown.info)
      after = await undoingFailure(target, wanted, () => readBack(target, wanted))
    } finally {
      lock.release()
    }
    await undoingFailure(target, wanted, async () => {
      await keepDirectIO(target, wanted.shown.info, after)
      if (partitions.length > 0) await keepPartitions(target, partitions)
    })
  }
  try {
    // Held for as long as the change may still happen.
    await cleaningUp(change, () => closeSoon(exclusive))
  } finally {
    await closeSoon(control)
  }
}

/**
 * A device with partition scan drops those that the kernel did not find itself. So does any device on 6.1 at the first
 * open after LOOP_CHANGE_FD: that is done here, before somebody else's open takes what was added.
 */
async function keepPartitions(target: Handle, partitions: readonly sysfs.KnownPartition[]): Promise<void> {
  const fd = await openDevice(target.number, O_RDONLY)
  if (fd >= 0) await close(fd)
  await restorePartitions(target, partitions)
}

/**
 * Runs what is brought to an end although the signal is aborted. Where the time is up in a call, it is not known whether
 * the device has the other file, and the error says so.
 */
export async function switching<T>(deadline: Deadline, operation: () => Promise<T>): Promise<T> {
  deadline.ignoreSignal()
  try {
    return await operation()
  } catch (error) {
    if (error instanceof GivenUp) error.isUndone = false
    throw error
  }
}

/**
 * Others can change offset, size limit, capacity and file of the device at any time, and it is the same attachment.
 *
 * @throws `replaced`
 */
export async function assertShowsSame(target: Handle, shown: Shown): Promise<void> {
  const now = await readChangeable(target)
  const difference = describeDifference(shown, now)
  if (difference !== undefined) throw changedByOthers(target, difference)
}

function describeDifference(then: Shown, now: Shown): string | undefined {
  if (then.info.offset !== now.info.offset) return `its offset from ${then.info.offset} to ${now.info.offset}`
  if (then.info.sizeLimit !== now.info.sizeLimit) {
    return `its size limit from ${then.info.sizeLimit} to ${now.info.sizeLimit}`
  }
  if (then.size !== now.size) return `its size from ${then.size} to ${now.size}`
  const { device, inode, rdevice } = now.info
  const isSame = then.info.device === device && then.info.inode === inode && then.info.rdevice === rdevice
  return isSame ? undefined : 'its backing file'
}

function changedByOthers(target: Handle, what: string): LoopError {
  return refusal('replaced', 'ioctl', `somebody changed ${what} meanwhile`, {
    path: target.path,
    ioctl: CHANGE,
    hint: 'try again with the device as it is now',
  })
}

async function issueChange(
  target: Handle,
  to: Pick<Backing, 'fd' | 'path' | 'device' | 'inode' | 'rdevice'>,
  before: LoopInfo64,
): Promise<void> {
  const { device, inode, rdevice = 0n } = to
  const answer = await target.changeIdentity({ device, inode, rdevice, offset: before.offset }, () =>
    target.calls.loopChangeFd(target.descriptor, to.fd),
  )
  if (answer < 0) throw await diagnose(target.failure(CHANGE, answer, { backingFile: to.path, backingFd: to.fd }))
}

/** @throws `replaced`, `unknown` */
async function readBack(target: Handle, { backing, shown }: Switch): Promise<LoopInfo64> {
  const { info: after } = await target.readInfo()
  if (after.device !== backing.device || after.inode !== backing.inode) {
    throw refusal('unknown', 'ioctl', 'the kernel took another file: was the descriptor closed?', {
      path: target.path,
      backingFile: backing.path,
      ioctl: CHANGE,
    })
  }
  const { device, inode, rdevice } = shown.info
  const now = { info: { ...after, device, inode, rdevice }, size: readSize(target) }
  const difference = describeDifference(shown, now)
  if (difference !== undefined) throw changedByOthers(target, difference)
  return after
}

async function undoingFailure<T>(target: Handle, wanted: Switch, confirm: () => Promise<T>): Promise<T | LoopInfo64> {
  try {
    return await confirm()
  } catch (error) {
    if (error instanceof GivenUp) throw error
    const isBack = wanted.present.isFile && (await switchBack(target, wanted))
    // With no way back the change has happened. It counts as failed only where it was to another file, or the device
    // shows another part of it: not for less direct I/O than before, or a file that cannot be asked what it is.
    if (isBack || LoopError.is(error, 'unknown') || LoopError.is(error, 'replaced')) throw error
    return wanted.shown.info
  }
}

/** What somebody else has changed it to since is not ours to undo. */
async function switchBack(target: Handle, { backing, present, shown }: Switch): Promise<boolean> {
  if ((await isBackedBy(target, backing, target.bound)) === false) return false
  try {
    await issueChange(target, { ...shown.info, fd: present.fd, path: present.path }, shown.info)
    await keepDirectIO(target, shown.info, (await target.readInfo()).info)
    return true
  } catch {
    // The error that made it necessary is the one to be told.
    return false
  }
}

/** Whether the device is backed by the file, whoever's attachment it is by now; undefined where that cannot be told. */
export async function isBackedBy(
  target: Handle,
  file: { device: bigint; inode: bigint },
  bound: Bound | undefined,
): Promise<boolean | undefined> {
  const bytes = newInfo()
  const answer = await within(bound, target.number).loopGetStatus64(target.descriptor, bytes)
  if (answer === -ENXIO) return false
  const { device, inode } = decodeInfo(bytes)
  return answer < 0 ? undefined : device === file.device && inode === file.inode
}

/** The kernel takes the new descriptor's O_DIRECT over, and drops direct I/O where the new file cannot do it. */
async function keepDirectIO(handle: Handle, before: LoopInfo64, after: LoopInfo64): Promise<void> {
  if (((before.flags ^ after.flags) & LO_FLAGS_DIRECT_IO) === 0) return
  const enabled = (before.flags & LO_FLAGS_DIRECT_IO) === 0 ? 0 : 1
  const answer = await handle.write('loopSetDirectIo', enabled)
  if (answer < 0) throw handle.explain('LOOP_SET_DIRECT_IO', answer)
}
