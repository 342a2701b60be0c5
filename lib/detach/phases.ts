/** The phases of a detach: what the device is, held exclusively, flushed, cleared, let go of. */

import { constants } from 'node:os'
import { backoff, tries } from '../common/deadline.ts'
import type { Phase } from '../common/phases.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { adviseHolders, describeHolders, findHolders, findStackedLoops, type Holder } from '../errors/holders.ts'
import type { Handle } from '../handle/handle.ts'
import { noteFree } from '../handle/free-devices.ts'
import { openDevice } from '../kernel/devnode.ts'
import { close, fsync, O_EXCL, O_RDONLY, O_RDWR } from '../kernel/files.ts'
import { canAdministrate } from '../kernel/process.ts'
import type { Sequence, Step } from '../kernel/sequence.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { decide } from '../kernel/trace.ts'
import { removeUnused } from '../partitions/blkpg.ts'
import { removeNodesOfGone } from '../partitions/nodes.ts'
import { assertRemovable, type Detaching, readPresent } from './detaching.ts'
import { takeBack } from './take-back.ts'

const { EACCES, EBUSY, ENXIO, EPERM } = constants.errno

/** What the attachment is: as it was last seen, and without partitions; else it is looked at. */
export class PresentPhase implements Phase {
  readonly #work: Detaching

  constructor(work: Detaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#work.present !== undefined
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const { number, descriptor, expected } = this.#work.handle
    const links = sysfs.linksWithoutPartitions('attached')
    if (expected === undefined || links === undefined) return undefined
    const { diskSeq, flags, autoclear, isServed } = expected
    sequence.expect(diskSeq, 'blkGetDiskSeq', descriptor)
    // sysfs asks no filesystem, and takes ten times as long.
    if (isServed) sequence.expect(autoclear ? 1 : 0, 'sysfsAutoclear', number)
    else sequence.expect(flags, 'loopGetFlags', descriptor)
    const last = sequence.expect(links, 'sysfsLinks', number)
    return () => {
      if (last.answer === links) this.#work.present = { autoclear, partitions: [], added: [] }
    }
  }

  async byHand(): Promise<void> {
    this.#work.present = readPresent(this.#work.handle)
  }
}

/**
 * An exclusive descriptor. With it and no other of ours the kernel's answer to LOOP_CLR_FD tells: the device is going, or
 * somebody's plain open defers it. K12, up to 6.10: the device is free at once; held exclusively, it is nobody else's
 * before we have looked.
 */
export class ExclusivePhase implements Phase {
  readonly #work: Detaching
  #attempt = 0

  constructor(work: Detaching) {
    this.#work = work
  }

  get isDone(): boolean {
    const { exclusive, isExclusive } = this.#work
    return isExclusive || (typeof exclusive === 'number' && exclusive >= 0)
  }

  /** Where autoclear is off, a deferred detach has to be taken back with LOOP_SET_STATUS64, which wants write access. */
  #access(): number {
    return this.#work.autoclear ? O_RDONLY : O_RDWR
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const exclusive = sequence.call('openLoop', this.#work.handle.number, this.#access() | O_EXCL)
    this.#work.exclusive = exclusive
    return () => {
      this.#work.exclusive = exclusive.fd
    }
  }

  async byHand(): Promise<void> {
    const { handle } = this.#work
    const fd = await this.#open()
    if (fd === -EBUSY) return this.#wait()
    if (fd < 0) throw handle.explain('open', fd)
    this.#work.exclusive = fd
    handle.assertOpen()
    return undefined
  }

  /** @throws `permission` where a deferred detach could not be taken back */
  async #open(): Promise<number> {
    const { handle } = this.#work
    const fd = await openDevice(handle.number, this.#access() | O_EXCL, handle.bound)
    if (this.#access() === O_RDONLY || (fd !== -EACCES && fd !== -EPERM)) return fd
    if (!canAdministrate()) throw handle.explain('open', fd)
    return openDevice(handle.number, O_RDONLY | O_EXCL, handle.bound)
  }

  /** Mounts, swap and what is built on the device stay; a mkfs, or somebody else's probe, passes. */
  async #wait(): Promise<void> {
    const { handle, deadline } = this.#work
    this.#attempt++
    const holders = await holdersOf(handle)
    decide(() => `it cannot be had exclusively: ${describeHolders(holders)}`)
    const isLasting = holders.some(({ kind }) => kind !== 'process' && kind !== 'unknown')
    if (isLasting || !(await deadline.pause(backoff(this.#attempt)))) {
      throw inUse(handle, holders, tries(this.#attempt, deadline))
    }
  }

  async undo(): Promise<void> {
    const { exclusive } = this.#work
    this.#work.exclusive = -1
    if (typeof exclusive === 'number' && exclusive >= 0) await close(exclusive)
  }
}

/** What is written to the device gets into the file. */
export class FlushPhase implements Phase {
  readonly #work: Detaching

  constructor(work: Detaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#work.isFlushed
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const flushed = sequence.call('fsync', this.#work.handle.descriptor)
    return () => {
      if (flushed.answer !== undefined) this.#work.noteFlush(flushed.answer)
    }
  }

  async byHand(): Promise<void> {
    this.#work.noteFlush(await fsync(this.#work.handle.descriptor, this.#work.handle.bound))
  }
}

/** LOOP_CLR_FD on the exclusive descriptor, which takes the place and the number of the handle's own. */
export class ClearPhase implements Phase {
  readonly #work: Detaching
  #attempt = 0

  constructor(work: Detaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#work.isGoing
  }

  /** The second one answers ENXIO where the attachment is ending, and 0 where it is only deferred; it asks no filesystem. */
  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    if (work.present !== undefined && work.present.added.length > 0) return undefined
    const { descriptor } = work.handle
    const replaced = sequence.call('dup3', work.exclusive, descriptor)
    const closed = sequence.call('close', work.exclusive)
    sequence.call('loopClrFd', descriptor)
    const again = sequence.expect(-ENXIO, 'loopClrFd', descriptor)
    return () => {
      work.isExclusive = replaced.succeeded
      if (closed.answer !== undefined) work.exclusive = -1
      work.isGoing = again.answer === -ENXIO
    }
  }

  async byHand(): Promise<void> {
    const work = this.#work
    const { handle, present } = work
    if (present !== undefined) assertRemovable(handle, present)
    await this.#takePlace()
    const { descriptor } = handle
    const first = await this.#work.handle.calls.loopClrFd(descriptor)
    const second = first < 0 ? first : await this.#work.handle.calls.loopClrFd(descriptor)
    work.isGoing = first === -ENXIO || second === -ENXIO || isFree(handle.number)
    if (work.isGoing) return this.#removePartitions()
    // Where detachSync() came meanwhile, the deferred detach is what is wanted
    handle.assertOpen()
    try {
      await this.#takeBack()
    } catch (error) {
      // The other user went between the two calls, and the second one has begun the end.
      work.isGoing = LoopError.is(error, 'detaching') || LoopError.is(error, 'not-attached')
      if (work.isGoing) return this.#removePartitions()
      throw error
    }
    if (first < 0) throw handle.explain('LOOP_CLR_FD', first)
    return this.#wait()
  }

  async #takePlace(): Promise<void> {
    const work = this.#work
    if (work.isExclusive) return
    const exclusive = typeof work.exclusive === 'number' ? work.exclusive : -1
    const answer = await this.#work.handle.calls.dup3(exclusive, work.handle.descriptor)
    if (answer < 0) throw work.handle.explain('dup3', answer)
    work.isExclusive = true
    work.exclusive = -1
    await close(exclusive)
  }

  /** Only now: a partition that somebody has open has deferred it. And before the device can be another's. */
  async #removePartitions(): Promise<void> {
    const { handle, present } = this.#work
    if (present !== undefined) await removeUnused(handle.number, handle.descriptor, present.added)
  }

  async #takeBack(): Promise<void> {
    await takeBack(this.#work.handle, this.#work.autoclear)
    this.#work.isExclusive = false
  }

  /** Loop devices on top are plain openers, which O_EXCL does not see, but they do not pass by themselves. */
  async #wait(): Promise<void> {
    const { handle, deadline } = this.#work
    this.#attempt++
    decide(() => `somebody else has ${handle.path} open: the detach is taken back, and tried again`)
    const isLasting = (await findStackedLoops(handle.number)).length > 0
    if (isLasting || !(await deadline.pause(backoff(this.#attempt)))) {
      throw inUse(handle, await holdersOf(handle), tries(this.#attempt, deadline))
    }
  }

  async undo(): Promise<void> {
    if (!this.#work.isExclusive || this.#work.isGoing) return
    try {
      // Where detachSync() came meanwhile, the deferred detach is what is wanted.
      this.#work.handle.assertOpen()
      await this.#work.handle.takingBack(() => this.#takeBack())
    } catch {
      // The error that ended the detach is the one to be told.
    }
  }
}

/** LOOP_CLR_FD on a plain descriptor: whoever else uses the device, it goes when the last of them closes it. */
export class ClearLazilyPhase implements Phase {
  readonly #work: Detaching

  constructor(work: Detaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#work.isGoing
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const { handle, present } = this.#work
    if (present !== undefined && present.added.length > 0) return undefined
    const cleared = sequence.call('loopClrFd', handle.descriptor)
    return () => {
      this.#work.isGoing = cleared.succeeded
    }
  }

  async byHand(): Promise<void> {
    const { handle, present } = this.#work
    if (present !== undefined) await removeUnused(handle.number, handle.descriptor, present.added)
    const answer = await this.#work.handle.calls.loopClrFd(handle.descriptor)
    if (answer < 0) throw handle.explain('LOOP_CLR_FD', answer)
    this.#work.isGoing = true
  }
}

/** The last close, which is what detaches; and the nodes of partitions. */
export class VacatePhase implements Phase {
  readonly #work: Detaching
  #isDone = false
  #vacated: Step | undefined

  constructor(work: Detaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#isDone
  }

  /** The number stays taken, by nothing, until the handle is closed: detachSync() may be using it. */
  plan(sequence: Sequence): (() => void) | undefined {
    const { handle } = this.#work
    const vacated = sequence.call('vacate', handle.descriptor)
    this.#vacated = vacated
    const links = sequence.try('sysfsLinks', handle.number)
    return () => {
      if (!vacated.succeeded) return
      handle.closeVacated()
      this.#work.isGone = links.answer !== undefined && links.answer === sysfs.linksWithoutPartitions('free')
      this.#finish()
    }
  }

  async byHand(): Promise<void> {
    await this.#work.handle.closeNow()
    this.#finish()
  }

  /** It has succeeded, too late for its caller: the next detach() is told. */
  comeBack(): void {
    const { handle } = this.#work
    if (!this.#vacated?.succeeded || handle.isClosing) return
    handle.closeVacated()
    handle.isDetached = true
  }

  #finish(): void {
    const { handle, present, isGone } = this.#work
    removeNodesOfGone(handle.number, present?.partitions ?? [])
    if (isGone) noteFree(handle.number)
    this.#isDone = true
  }
}

/** K12, up to 6.10: the second LOOP_CLR_FD has detached it at once. */
function isFree(number: number): boolean {
  return sysfs.isMounted() && !sysfs.isBound(number)
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
