/** LOOP_CHANGE_FD: another file of the same content under a read-only device in use. */

import { CONTROL } from './allocate.ts'
import { type BackingFile, checkBackingFile, checkBoolean, checkFunction, checkOptions } from './arguments.ts'
import { type Backing, openBacking } from './backing.ts'
import { compareContents } from './compare.ts'
import { openSource, type Source } from './copy.ts'
import { checkDeadline, Deadline } from './deadline.ts'
import { LoopError, refusal } from './errors.ts'
import { sizeDifference, visibleSize } from './evidence.ts'
import { guardFilesystem } from './guard.ts'
import type { Handle } from './handle.ts'
import { binding } from './kernel/binding.ts'
import { close, O_RDWR, open } from './kernel/files.ts'
import { LO_FLAGS_DIRECT_IO, LO_FLAGS_READ_ONLY, type LoopInfo64 } from './kernel/uapi.ts'
import * as sysfs from './kernel/sysfs.ts'
import { lockControl } from './lock.ts'
import { type BackingIdentity, conflicts, findAttachments, overlapError } from './overlap.ts'
import { restorePartitions } from './partitions.ts'
import { diagnose } from './reasons.ts'
import { onBackingDevice } from './stack.ts'
import { readSize } from './status.ts'

/** How far a change is. */
export interface Progress {
  phase: 'copy' | 'flush' | 'verify' | 'switch'
  /** Bytes done in this phase. */
  copied: number
  /** Bytes in all; more than 0. */
  total: number
  bytesPerSecond: number
}

export interface ChangeOptions {
  /** Compare the new file with the present one first; `content-differs` where they are not the same. Default false. */
  verify?: boolean | undefined
  /** Change it even under a mounted filesystem, which the kernel may shut down (K2). Default false. */
  force?: boolean | undefined
  /** Called at least once before the switch; an exception in it aborts and rejects. */
  onProgress?: ((progress: Progress) => void) | undefined
  /** Gives up and rejects with the signal's reason; without effect once the switch has begun. */
  signal?: AbortSignal | undefined
}

/** Everything checked before the ioctl; read back after it. */
export async function changeBackingFile(handle: Handle, file: BackingFile, options?: ChangeOptions): Promise<void> {
  const given = checkOptions(options, ['verify', 'force', 'onProgress', 'signal'])
  const argument = checkBackingFile(file)
  const verify = given.verify === undefined ? false : checkBoolean('verify', given.verify)
  const force = given.force === undefined ? false : checkBoolean('force', given.force)
  const onProgress = given.onProgress === undefined ? undefined : checkFunction('onProgress', given.onProgress)
  // It reads and compares as long as the file is long: only the signal ends it.
  const deadline = checkDeadline({ signal: given.signal }, Number.POSITIVE_INFINITY)

  return handle.run(async () => {
    deadline.throwIfAborted()
    await handle.readInfo()
    await onBackingDevice(handle, async (target) => {
      const info = await readChangeable(target)
      if (!force) await letGo(await guardFilesystem(target))
      const present = await openPresent(target, info)
      try {
        const backing = await openBacking(argument, true, deadline)
        try {
          const size = checkSize(target, info, backing)
          await refuseOverlap(target, backing, info)
          const report = reporter(size, onProgress)
          if (verify) {
            const candidate = { fd: backing.fd, path: backing.path, start: info.offset }
            const all = [{ start: 0n, end: size }]
            await compareContents(present, candidate, all, deadline, (done) => report('verify', done))
          }
          deadline.throwIfAborted()
          report('switch', size)
          await switchBackingFile(target, backing, present, force)
        } finally {
          await backing.close()
        }
      } finally {
        await present.close()
      }
    })
  })
}

const CHANGE = 'LOOP_CHANGE_FD'

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

function checkSize(target: Handle, info: LoopInfo64, backing: Backing): bigint {
  const now = readSize(target)
  const then = visibleSize(backing.size, info.offset, info.sizeLimit)
  if (now !== then) {
    throw refusal('size-mismatch', 'ioctl', sizeDifference(now, then), {
      path: target.path,
      backingFile: backing.path,
      ioctl: CHANGE,
    })
  }
  return now
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

/** Makes the caller's progress of phases and bytes; the time counts from here. */
export function reporter(
  size: bigint,
  onProgress: ((progress: Progress) => void) | undefined,
): (phase: Progress['phase'], done: bigint) => void {
  const start = performance.now()
  const total = Number(size)
  return (phase, done) => {
    if (total === 0) return
    const seconds = (performance.now() - start) / 1000
    const copied = Number(done)
    onProgress?.({ phase, copied, total, bytesPerSecond: seconds > 0 ? copied / seconds : 0 })
  }
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
  to: Pick<Backing, 'fd' | 'path' | IdentityKey>,
  before: LoopInfo64,
): Promise<void> {
  const { device, inode, rdevice = 0n } = to
  const answer = await target.changeIdentity({ device, inode, rdevice, offset: before.offset }, () =>
    binding().loopChangeFd(target.descriptor, to.fd),
  )
  if (answer < 0) throw await diagnose(target.failure(CHANGE, answer, { backingFile: to.path, backingFd: to.fd }))
}

type IdentityKey = 'device' | 'inode' | 'rdevice'

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
