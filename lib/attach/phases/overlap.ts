/** No byte of a file has two writers: looked at before the device is configured, and once more after it. */

import { backoff, Deadline } from '../../common/deadline.ts'
import type { Phase } from '../../common/phases.ts'
import { LoopError } from '../../errors/errors.ts'
import type { Handle } from '../../handle/handle.ts'
import { openHandle } from '../../handle/open.ts'
import type { Bound } from '../../kernel/bounded.ts'
import { devicePath } from '../../kernel/devnode.ts'
import { diskSeqCountsAttachments } from '../../kernel/features.ts'
import { closeSync } from '../../kernel/files.ts'
import type { Sequence } from '../../kernel/sequence.ts'
import { decide } from '../../kernel/trace.ts'
import { type Attaching, known } from '../attaching.ts'
import type { Backing } from '../backing.ts'
import { openControl } from '../loop-control.ts'
import { conflicts, type Found, isFileUnshared, overlapError, scanAttachments } from '../overlap.ts'

/** Before LOOP_CONFIGURE: refuses, or finds the attachment that is to be used in place of a new one. */
export class LookPhase implements Phase {
  readonly #work: Attaching
  #isDone: boolean

  constructor(work: Attaching) {
    this.#work = work
    this.#isDone = work.wanted.overlap === 'allow'
  }

  get isDone(): boolean {
    return this.#isDone || this.#work.isOver
  }

  /** Where nobody else has the file open, no loop device has it either. */
  plan(sequence: Sequence): (() => void) | undefined {
    if (!canBeProbed(this.#work)) return undefined
    const probed = sequence.call('leaseProbe', this.#work.file)
    return () => {
      this.#isDone = probed.succeeded
    }
  }

  async byHand(): Promise<void> {
    const work = this.#work
    const backing = backingOf(work)
    const found = await this.#look(backing)
    work.deadline.throwIfAborted()
    if (work.wanted.overlap === 'reuse') {
      for (const candidate of found.filter((other) => this.#isAsWanted(other))) {
        work.handle ??= await this.#share(backing, candidate)
        if (work.handle !== undefined)
          decide(() => `${devicePath(candidate.number)} is attached to it already, and shared`)
      }
    }
    if (work.handle === undefined) refuseConflict(work, found)
    this.#isDone = true
  }

  async #look(backing: Backing): Promise<Found[]> {
    try {
      return await this.#lookUntilSettled(backing)
    } catch (error) {
      // A process that may attach nothing is told so, not of a device that it may not ask either.
      if (LoopError.is(error, 'overlap')) await assertMayAttach(this.#work.deadline.bound)
      throw error
    }
  }

  /** An attachment with autoclear may be only going: whoever looked at it for a moment has deferred its detach. */
  async #lookUntilSettled(backing: Backing): Promise<Found[]> {
    const { settings, wanted, deadline } = this.#work
    const patience = new Deadline(Math.min(GOING_MS, deadline.bound.left), deadline.bound.signal)
    for (let attempt = 1; ; attempt++) {
      const found = isFileUnshared(backing) ? [] : await scanAttachments(backing, deadline.bound)
      const other = found.find((candidate) => conflicts(candidate, settings))
      const isSettled = other === undefined || !other.autoclear || wanted.overlap === 'reuse'
      if (isSettled || !(await patience.pause(backoff(attempt)))) return found
    }
  }

  #isAsWanted(other: Found): boolean {
    const { number } = this.#work.wanted
    const { offset, sizeLimit, readOnly, blockSize } = this.#work.settings
    return (
      other.isSameFile &&
      other.offset === offset &&
      other.sizeLimit === sizeLimit &&
      other.readOnly === readOnly &&
      (number === undefined || other.number === number) &&
      (blockSize === undefined || other.blockSize === blockSize)
    )
  }

  /** Opened first, so that it cannot go any more, and then looked at once more; undefined where it went before. */
  async #share(backing: Backing, { number, diskSeq }: Found): Promise<Handle | undefined> {
    const { deadline } = this.#work
    let handle: Handle
    try {
      handle = await openHandle(diskSeq === undefined ? { number } : { number, diskSeq }, deadline.wait)
    } catch (error) {
      if (!LoopError.is(error) || ['permission', 'resources', 'timeout'].includes(error.reason)) throw error
      return undefined
    }
    let isShared = false
    try {
      const still = (await scanAttachments(backing, this.#work.deadline.bound)).find((other) => other.number === number)
      isShared = still !== undefined && this.#isAsWanted(still)
      handle.isShared = isShared
      return isShared ? handle : undefined
    } finally {
      if (!isShared) await handle.close()
    }
  }
}

/**
 * After LOOP_CONFIGURE, by a probe on the same descriptor: the loop device has the same open file, so it is granted
 * unless somebody came in between, whatever lock that one keeps. Where it is refused, or not to be had, every device is
 * looked at, and of two that take the same bytes the newer one gives way.
 */
export class GuardPhase implements Phase {
  readonly #work: Attaching
  #isDone: boolean

  constructor(work: Attaching) {
    this.#work = work
    this.#isDone = work.wanted.overlap === 'allow'
  }

  get isDone(): boolean {
    return this.#isDone || this.#work.handle !== undefined
  }

  plan(sequence: Sequence): (() => void) | undefined {
    if (!canBeProbed(this.#work)) return undefined
    const probed = sequence.call('leaseProbe', this.#work.file)
    return () => {
      this.#isDone = probed.succeeded
      if (probed.answer !== undefined) this.#work.isUnshared = probed.succeeded
    }
  }

  async byHand(): Promise<void> {
    const work = this.#work
    const backing = backingOf(work)
    work.isUnshared = isFileUnshared(backing)
    if (!work.isUnshared) {
      decide(() => `${backing.path} may be open elsewhere: every device is looked at for the same bytes`)
      await this.#giveWay(backing)
    }
    this.#isDone = true
  }

  /**
   * The newer one gives way at once. The older one waits for that: the newer one may have looked when this one was not
   * attached yet, or not look at all, as losetup; then the older one gives way itself.
   */
  async #giveWay(backing: Backing): Promise<void> {
    const work = this.#work
    const patience = new Deadline(Math.min(NEWER_MS, work.deadline.bound.left), work.deadline.bound.signal)
    for (let attempt = 1; ; attempt++) {
      const found = await scanAttachments(backing, work.deadline.bound)
      const own = found.find(({ number }) => number === work.number)
      const others = found.filter((other) => other.number !== work.number && conflicts(other, work.settings))
      refuseConflict(
        work,
        others.filter((other) => isOlder(other, own)),
      )
      if (others.length === 0) return
      if (!(await patience.pause(backoff(attempt)))) refuseConflict(work, others)
    }
  }
}

/** Milliseconds that an attachment with autoclear gets for going. */
const GOING_MS = 30

/** Milliseconds that a newer attachment of the same bytes gets for giving way. */
const NEWER_MS = 500

/** Whether the other attachment was there first; by the number where the kernel does not count attachments. */
function isOlder(other: Found, own: Found | undefined): boolean {
  if (own === undefined) return true
  if (other.diskSeq === undefined || own.diskSeq === undefined || !diskSeqCountsAttachments()) {
    return other.number < own.number
  }
  return other.diskSeq < own.diskSeq
}

/** A descriptor of the caller's says nothing: its own loop device reads as free, and the caller's lease would go. */
function canBeProbed({ argument, backing }: Attaching): boolean {
  return 'path' in argument && (backing === undefined || backing.rdevice === undefined)
}

/** @throws `permission` */
async function assertMayAttach(bound: Bound): Promise<void> {
  try {
    closeSync(await openControl(bound))
  } catch (error) {
    if (LoopError.is(error, 'permission')) throw error
  }
}

function backingOf({ backing }: Attaching): Backing {
  if (backing === undefined) throw new TypeError('the backing file is not open')
  return backing
}

function refuseConflict(work: Attaching, found: readonly Found[]): void {
  const other = found.find((candidate) => conflicts(candidate, work.settings))
  if (!other) return
  const number = work.wanted.number ?? known(work.number)
  const backing = backingOf(work)
  throw overlapError('LOOP_CONFIGURE', number < 0 ? backing.path : devicePath(number), backing, other)
}
