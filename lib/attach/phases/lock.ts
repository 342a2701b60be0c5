/** /dev/loop-control opened and locked while a device is chosen and configured. */

import type { Phase } from '../../common/phases.ts'
import { findFree } from '../../handle/free-devices.ts'
import { binding } from '../../kernel/binding.ts'
import { CONTROL } from '../../kernel/devnode.ts'
import { closeSync, O_RDWR } from '../../kernel/files.ts'
import type { Sequence } from '../../kernel/sequence.ts'
import { deviceExists } from '../../kernel/sysfs.ts'
import { type Attaching, known } from '../attaching.ts'
import { LOCK_EX, LOCK_NB, LOCK_UN, lockFile } from '../lock.ts'
import { openControl } from '../loop-control.ts'
import type { TurnPhase } from './turn.ts'

/** Opens /dev/loop-control, for the lock and for making a device. One that is there and free can be had without. */
export class ControlPhase implements Phase {
  readonly #work: Attaching

  constructor(work: Attaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#work.isControlTried || this.#work.isOver
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    const control = sequence.call('open', sequence.path(CONTROL), O_RDWR)
    work.control = control
    return () => {
      work.control = control.fd
      work.isControlTried = control.succeeded
    }
  }

  async byHand(): Promise<void> {
    const { number } = this.#work.wanted
    this.#work.isControlTried = true
    try {
      this.#work.control = await openControl(this.#work.deadline.bound)
    } catch (error) {
      const isThere = number === undefined ? ((await findFree()) ?? []).length > 0 : deviceExists(number)
      if (!isThere) throw error
    }
  }

  async undo(): Promise<void> {
    const fd = known(this.#work.control)
    this.#work.control = -1
    if (fd >= 0) closeSync(fd)
  }
}

/** flock(2) on /dev/loop-control, and letting go of it and of the turn as soon as the file is attached. */
export class LockPhase implements Phase {
  readonly #work: Attaching
  #isLocked = false
  /** Tried long enough: the attach goes on without it. */
  #isGivenUp = false

  constructor(work: Attaching) {
    this.#work = work
  }

  get isDone(): boolean {
    const { isOver, isControlTried, control } = this.#work
    return this.#isLocked || this.#isGivenUp || isOver || (isControlTried && control === -1)
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const locked = sequence.call('flock', this.#work.control, LOCK_EX | LOCK_NB)
    return () => {
      this.#isLocked = locked.succeeded
    }
  }

  async byHand(): Promise<void> {
    const { control, deadline } = this.#work
    this.#isLocked = await lockFile(known(control), deadline)
    this.#isGivenUp = !this.#isLocked
  }

  /** Where a device refused: others may attach meanwhile. */
  release(): void {
    if (this.#isLocked) binding().flockSync(known(this.#work.control), LOCK_UN)
    this.#isLocked = false
    this.#isGivenUp = false
  }

  /** The descriptor is closed, and with it the lock is gone. */
  forget(): void {
    this.#isLocked = false
  }

  async undo(): Promise<void> {
    this.release()
  }
}

/** As soon as the file is attached, the next one may choose a device. */
export class UnlockPhase implements Phase {
  readonly #work: Attaching
  readonly #lock: LockPhase
  readonly #turn: TurnPhase

  constructor(work: Attaching, lock: LockPhase, turn: TurnPhase) {
    this.#work = work
    this.#lock = lock
    this.#turn = turn
  }

  get isDone(): boolean {
    return this.#work.isOver && this.#work.control === -1
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    const { control } = work
    if (control === -1) {
      return () => {
        // Not where the calls ended before: then the device is still to be chosen.
        if (work.isAttached) this.#turn.end()
      }
    }
    sequence.try('flock', control, LOCK_UN)
    const closed = sequence.call('close', control)
    return () => {
      if (closed.answer !== undefined) this.#end()
    }
  }

  async byHand(): Promise<void> {
    this.#lock.release()
    const control = known(this.#work.control)
    this.#end()
    if (control >= 0) closeSync(control)
  }

  #end(): void {
    this.#work.control = -1
    this.#lock.forget()
    this.#turn.end()
  }
}
