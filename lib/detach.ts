/** Letting go of a device, and knowing whether it went: LOOP_CLR_FD answering 0 does not mean detached. */

import { constants } from 'node:os'
import { tries } from './allocate.ts'
import { checkBoolean, checkOptions } from './arguments.ts'
import { backoff, checkDeadline, type Deadline } from './deadline.ts'
import { LoopError, refusal } from './errors.ts'
import { type Handle, type Info } from './handle.ts'
import { adviseHolders, describeHolders, findHolders, findStackedLoops, type Holder } from './holders.ts'
import { binding } from './kernel/binding.ts'
import { openDevice } from './kernel/devnode.ts'
import { canAdministrate } from './kernel/process.ts'
import { close, fsync, fsyncSync, O_EXCL, O_RDONLY, O_RDWR } from './kernel/files.ts'
import { Sequence, type Step } from './kernel/sequence.ts'
import * as sysfs from './kernel/sysfs.ts'
import { LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN, LO_FLAGS_READ_ONLY, newInfo, patchInfo } from './kernel/uapi.ts'
import { removeNodesOfGone, removeUnused, removeUnusedSync } from './partitions.ts'
import { explain } from './reasons.ts'
import { findSwappableLower } from './stack.ts'

const { EACCES, EBADF, EBUSY, ENOTTY, ENXIO, EPERM } = constants.errno

export interface DetachOptions {
  /** Hand the device to the kernel, which detaches it when its last user closes it. Default false. */
  lazy?: boolean | undefined
  /** Milliseconds to wait for what passes by itself, such as a udev probe; 0: one try. Default 5 000. */
  timeout?: number | undefined
  /** Gives up and rejects with the signal's reason; the device stays attached. */
  signal?: AbortSignal | undefined
}

/** `deferred`: somebody else still uses it; the kernel detaches it when the last of them closes it. */
export type DetachResult = 'detached' | 'deferred'

/** Detaches and closes the handle. When it rejects, the handle stays open and the attachment as it was. */
export async function detach(handle: Handle, options?: DetachOptions): Promise<DetachResult> {
  const given = checkOptions(options, ['lazy', 'timeout', 'signal'])
  const lazy = given.lazy === undefined ? false : checkBoolean('lazy', given.lazy)
  const deadline = checkDeadline(given, 5_000)
  return handle.run(() => {
    deadline.throwIfAborted()
    return lazy ? detachLazily(handle) : detachStrictly(handle, deadline)
  })
}

async function detachStrictly(handle: Handle, deadline: Deadline): Promise<DetachResult> {
  const lower = await lowerOf(handle)
  for (let attempt = 1; ; attempt++) {
    const outcome = await tryExclusively(handle)
    if (outcome === 'gone' && lower.length === 0) return 'detached'
    if (outcome === 'gone' || outcome === 'going') return confirm([handle, ...lower], deadline)
    // Loop devices on top are plain openers, which O_EXCL does not see, but they do not pass by themselves.
    const lasting = outcome === 'held' || (await findStackedLoops(handle.number)).length > 0
    if (lasting || !(await deadline.pause(backoff(attempt)))) {
      throw inUse(handle, await holdersOf(handle), tries(attempt, deadline))
    }
  }
}

/**
 * One try that either detaches or leaves everything as it was. With the only other descriptor of ours closed and an
 * exclusive one open, the kernel's answer to LOOP_CLR_FD tells: gone, or deferred because of somebody's plain open.
 * K12, up to 6.10: the device is free at once; held exclusively, it is nobody else's before we have looked.
 */
async function tryExclusively(handle: Handle): Promise<'gone' | 'going' | 'held' | 'opened'> {
  const atOnce = await requestAtOnce(handle)
  if (typeof atOnce === 'object') return afterRequest(handle, atOnce)
  if (atOnce !== undefined) return atOnce
  const before = await handle.readInfo()
  const autoclear = (before.info.flags & LO_FLAGS_AUTOCLEAR) !== 0
  const exclusive = await openExclusively(handle, autoclear)
  if (exclusive === -EBUSY) return 'held'
  if (exclusive < 0) throw handle.explain('open', exclusive)

  const partitions = partitionsOf(handle, before)
  try {
    await flush(handle, before)
    handle.assertOpen()
    if (partitions.added.length > 0) assertRemovable(handle)
  } catch (error) {
    await close(exclusive)
    throw error
  }
  const plain = handle.descriptor
  handle.replaceDescriptor(exclusive)
  await close(plain)
  const requested = await binding().loopClrFd(exclusive)
  const left = requested < 0 ? requested : await binding().loopGetStatus64(exclusive, newInfo())
  if (left !== -ENXIO) return afterRequest(handle, { requested, autoclear })
  // Only now: a partition that somebody has open has deferred it. And before the device can be another's.
  await removeUnused(handle.number, exclusive, partitions.added)
  await handle.closeNow()
  removeNodesOfGone(handle.number, partitions.all)
  return 'going'
}

/** A LOOP_CLR_FD on a descriptor of the handle that is exclusive now, after which the device was still attached. */
interface Request {
  requested: number
  autoclear: boolean
}

async function afterRequest(handle: Handle, { requested, autoclear }: Request): Promise<'opened'> {
  // Where detachSync() came meanwhile, the deferred detach is what is wanted
  handle.assertOpen()
  await takeBack(handle, autoclear)
  if (requested < 0) throw handle.explain('LOOP_CLR_FD', requested)
  return 'opened'
}

/**
 * The usual detach, in one hop to a thread. Undefined: something is not as it was when it was last looked at, or in the
 * way; nothing was done then. The handle's descriptor keeps its number throughout, for detachSync().
 */
async function requestAtOnce(handle: Handle): Promise<'gone' | 'going' | Request | undefined> {
  const { number, descriptor } = handle
  const sequence = new Sequence()
  const flags = expectUntouched(handle, sequence)
  if (flags === undefined) return undefined
  const autoclear = (flags & LO_FLAGS_AUTOCLEAR) !== 0
  const exclusive = sequence.call('openLoop', number, (autoclear ? O_RDONLY : O_RDWR) | O_EXCL)
  const flushed = (flags & LO_FLAGS_READ_ONLY) === 0 ? sequence.call('fsync', descriptor) : undefined
  const replaced = sequence.call('dup3', exclusive, descriptor)
  sequence.call('close', exclusive)
  const requested = sequence.call('loopClrFd', descriptor)
  sequence.expect(-ENXIO, 'loopGetFlags', descriptor)
  const vacated = sequence.try('vacate', descriptor)
  const links = sequence.try('sysfsLinks', number)
  await sequence.run()
  if (vacated.answer !== undefined) {
    await handle.closeNow({ vacated: vacated.succeeded })
    return links.answer === sysfs.linksWithoutPartitions('free') ? 'gone' : 'going'
  }
  if (requested.answer === -ENXIO) {
    await handle.closeNow()
    return 'going'
  }
  if (requested.answer !== undefined) return { requested: requested.answer, autoclear }
  if (exclusive.succeeded && !replaced.succeeded) await close(exclusive.fd)
  assertFlushed(handle, flushed)
  return undefined
}

/** The kernel tells of a failed write once: a second fsync(2) would succeed. */
function assertFlushed(handle: Handle, flushed: Step | undefined): void {
  if (flushed?.answer !== undefined && flushed.answer < 0) throw handle.explain('fsync', flushed.answer)
}

/** The same attachment, as it was last seen, without partitions. Its flags; undefined: it cannot be told. */
function expectUntouched({ number, expected, descriptor }: Handle, sequence: Sequence): number | undefined {
  const links = sysfs.linksWithoutPartitions('attached')
  if (expected === undefined || links === undefined) return undefined
  sequence.expect(expected.diskSeq, 'blkGetDiskSeq', descriptor)
  sequence.expect(expected.flags, 'loopGetFlags', descriptor)
  sequence.expect(links, 'sysfsLinks', number)
  return expected.flags
}

/**
 * An exclusive descriptor; EBUSY where somebody holds the device for good. Where autoclear is off, a deferred detach
 * has to be taken back with LOOP_SET_STATUS64: whether that will be allowed is made sure of before.
 *
 * @throws `permission`
 */
async function openExclusively(handle: Handle, autoclear: boolean): Promise<number> {
  if (autoclear) return openDevice(handle.number, O_RDONLY | O_EXCL)
  const writable = await openDevice(handle.number, O_RDWR | O_EXCL)
  if (writable !== -EACCES && writable !== -EPERM) return writable
  if (!canAdministrate()) throw handle.explain('open', writable)
  return openDevice(handle.number, O_RDONLY | O_EXCL)
}

/** Cancels a deferred detach and goes back to a plain descriptor, opened before the exclusive one is closed. */
async function takeBack(handle: Handle, autoclear: boolean): Promise<void> {
  const exclusive = handle.descriptor
  if (!autoclear) await clearAutoclear(handle)
  const plain = await openDevice(handle.number, O_RDONLY)
  // No descriptor to be had: the exclusive one serves, and is better than none.
  if (plain < 0) throw handle.explain('open', plain)
  handle.replaceDescriptor(plain)
  await close(exclusive)
}

/** Read, checked to be ours, and written back without the flag. Works under a mount. */
async function clearAutoclear(handle: Handle): Promise<void> {
  const { bytes, info } = await handle.readInfo()
  if ((info.flags & LO_FLAGS_AUTOCLEAR) === 0) return
  handle.assertOpen()
  patchInfo(bytes, { flags: info.flags & ~LO_FLAGS_AUTOCLEAR })
  const answer = await handle.write('loopSetStatus64', bytes)
  if (answer < 0) throw handle.explain('LOOP_SET_STATUS64', answer)
  await handle.renewDetach()
}

/** What is written and not yet in the file: between LOOP_CLR_FD and the last close it could not be any more. */
async function flush(handle: Handle, { info }: Info): Promise<void> {
  if ((info.flags & LO_FLAGS_READ_ONLY) !== 0) return
  const answer = await fsync(handle.descriptor)
  if (answer < 0) throw handle.explain('fsync', answer)
}

async function detachLazily(handle: Handle): Promise<DetachResult> {
  const atOnce = await requestLazilyAtOnce(handle)
  if (atOnce === 'gone' || (atOnce === 'going' && !isStillAttached(handle))) return 'detached'
  if (atOnce !== undefined) return 'deferred'
  const before = await handle.readInfo()
  await flush(handle, before)
  const partitions = partitionsOf(handle, before)
  await removeUnused(handle.number, handle.descriptor, partitions.added)
  const answer = await binding().loopClrFd(handle.descriptor)
  if (answer < 0) throw handle.explain('LOOP_CLR_FD', answer)
  await handle.closeNow()
  removeNodesOfGone(handle.number, partitions.all)
  return isStillAttached(handle) ? 'deferred' : 'detached'
}

/** {@link requestAtOnce} for a lazy detach. */
async function requestLazilyAtOnce(handle: Handle): Promise<'gone' | 'going' | undefined> {
  const { number, descriptor } = handle
  const sequence = new Sequence()
  const flags = expectUntouched(handle, sequence)
  if (flags === undefined) return undefined
  const flushed = (flags & LO_FLAGS_READ_ONLY) === 0 ? sequence.call('fsync', descriptor) : undefined
  sequence.call('loopClrFd', descriptor)
  const vacated = sequence.try('vacate', descriptor)
  const links = sequence.try('sysfsLinks', number)
  await sequence.run()
  assertFlushed(handle, flushed)
  if (vacated.answer === undefined) return undefined
  await handle.closeNow({ vacated: vacated.succeeded })
  return links.answer === sysfs.linksWithoutPartitions('free') ? 'gone' : 'going'
}

/** For exit handlers: never waits. With an operation in flight that one keeps the descriptor until it ends. */
export function detachSync(handle: Handle): DetachResult {
  if (handle.isClosing) throw handle.closedError()
  let partitions: sysfs.KnownPartition[] = []
  try {
    partitions = requestDetachSync(handle)
  } catch (error) {
    // A detach in flight has asked for it already, and may have let go of it between our calls.
    if (!handle.isRunning || !isGone(handle)) throw error
  }
  const closed = handle.closeSync()
  removeNodesOfGone(handle.number, partitions)
  return closed && !isStillAttached(handle) ? 'detached' : 'deferred'
}

/** Not attached any more; ENOTTY where the descriptor has been vacated. */
function isGone({ descriptor }: Handle): boolean {
  return [-ENXIO, -ENOTTY, -EBADF].includes(binding().loopGetFlagsSync(descriptor))
}

/** K3, up to 7.1: what was added with BLKPG outlives the detach. What the kernel found itself it removes itself. */
function partitionsOf({ number }: Handle, { info }: Info): Record<'all' | 'added', sysfs.KnownPartition[]> {
  const all = sysfs.hasPartitions(number) ? sysfs.readPartitions(number) : []
  return { all, added: (info.flags & LO_FLAGS_PARTSCAN) === 0 ? all : [] }
}

/** BLKPG wants CAP_SYS_ADMIN: without it they would stay on the free device. */
function assertRemovable(handle: Handle): void {
  if (!canAdministrate()) throw explain(handle.failure('BLKPG', -EACCES), 'BLKPG delete')
}

/** All partitions that there were. */
function requestDetachSync(handle: Handle): sysfs.KnownPartition[] {
  const before = handle.readInfoSync()
  const { info } = before
  if ((info.flags & LO_FLAGS_READ_ONLY) === 0) {
    const flushed = fsyncSync(handle.descriptor)
    if (flushed < 0) throw handle.explain('fsync', flushed)
  }
  const partitions = partitionsOf(handle, before)
  removeUnusedSync(handle.number, handle.descriptor, partitions.added)
  const answer = binding().loopClrFdSync(handle.descriptor)
  if (answer < 0) throw handle.explain('LOOP_CLR_FD', answer)
  return partitions.all
}

/** The last close has detached it, unless a child process that is just being started still has the descriptor. */
async function confirm(attachments: Attachment[], deadline: Deadline): Promise<DetachResult> {
  try {
    // LOOP_GET_STATUS64 has said so, and there is no other witness.
    if (!sysfs.isMounted()) return 'detached'
    for (let attempt = 1; attachments.some(isStillAttached); attempt++) {
      if (!(await deadline.pause(backoff(attempt)))) return 'deferred'
    }
    return 'detached'
  } catch {
    // Aborted, but it is asked for and cannot be taken back.
    return 'deferred'
  }
}

type Attachment = Pick<Handle, 'number' | 'ref'>

/** The lower device of a stack goes with the upper one. */
async function lowerOf(handle: Handle): Promise<Attachment[]> {
  const number = await findSwappableLower(handle)
  if (number === undefined) return []
  const diskSeq = sysfs.readDiskSeqSync(number)
  return [{ number, ref: { number, ...(diskSeq !== undefined && { diskSeq }) } }]
}

/** The same attachment, that is: another's of the same device is none of ours. Without sysfs: it may be. */
function isStillAttached({ number, ref }: Attachment): boolean {
  if (!sysfs.isBound(number)) return !sysfs.isMounted()
  const diskSeq = sysfs.readDiskSeqSync(number)
  return diskSeq === undefined || diskSeq === ref.diskSeq
}

async function holdersOf(handle: Handle): Promise<Holder[]> {
  const holders = await findHolders(handle.number, [handle.descriptor])
  return holders.length > 0 ? holders : [{ device: handle.path, kind: 'unknown' }]
}

function inUse(handle: Handle, holders: Holder[], effort: string | undefined): LoopError {
  const detail = describeHolders(holders) + (effort === undefined ? '' : ` (${effort})`)
  return refusal('in-use', 'ioctl', detail, {
    path: handle.path,
    ioctl: 'LOOP_CLR_FD',
    holders,
    hint: `${adviseHolders(holders)}; or detach with lazy: true, and the kernel does it when the last user is done`,
  })
}

/** Keeps the attachment when this process ends, and closes the handle. Resolves to the device's path. */
export async function release(handle: Handle): Promise<string> {
  return handle.run(async () => {
    await clearAutoclear(handle)
    await handle.closeNow()
    return handle.path
  })
}

/** Never waits: what was attached by the handle is detached, lazily where it is held; what was opened is closed. */
export async function dispose(handle: Handle): Promise<void> {
  if (handle.owned) {
    try {
      await detach(handle, { lazy: true })
    } catch (error) {
      if (!isNothingLeft(error)) throw error
    } finally {
      await handle.close()
    }
  }
  await handle.close()
}

export function disposeSync(handle: Handle): void {
  if (handle.owned && !handle.isClosing) {
    try {
      detachSync(handle)
    } catch (error) {
      if (!isNothingLeft(error)) throw error
    } finally {
      handle.closeSync()
    }
  }
  handle.closeSync()
}

/** Detached, released or taken by another already: nothing of ours is left to be disposed. */
function isNothingLeft(error: unknown): boolean {
  return LoopError.is(error) && ['closed', 'not-attached', 'detaching', 'replaced'].includes(error.reason)
}
