/** How long a workflow may still wait, and whether its caller has given up on it. */

import { onAbort } from '../kernel/abort.ts'
import type { Bound } from '../kernel/bounded.ts'
import { checkOptions, checkSignal, checkTimeout } from './arguments.ts'

/** How long a call may take: options of every function that asks the kernel. */
export interface Wait {
  /** When it is aborted, the call rejects with the signal's reason, and undoes what it had done. */
  signal?: AbortSignal | undefined
  /** Milliseconds for the whole call; 0: one try, without waiting for other users. */
  timeout?: number | undefined
}

/** The options that bound a wait, checked; `timeout` in milliseconds is for where none is given. */
export function checkDeadline(given: Wait, timeout: number): Deadline {
  return new Deadline(
    given.timeout === undefined ? timeout : checkTimeout(given.timeout),
    given.signal === undefined ? undefined : checkSignal(given.signal),
  )
}

export class Deadline {
  #timeout: number
  #start: number
  #end: number
  #signal: AbortSignal | undefined
  readonly #bound: Bound

  /** `timeout` in milliseconds; 0: one try, no waiting. */
  constructor(timeout: number, signal?: AbortSignal) {
    this.#timeout = timeout
    this.#start = performance.now()
    this.#end = this.#start + timeout
    this.#signal = signal
    this.#bound = new DeadlineBound(this, () => this.#signal)
  }

  /** From now on there is only the time: what has been begun is brought to an end. */
  ignoreSignal(): void {
    this.#signal = undefined
  }

  /** Begins anew, for so many milliseconds and without the signal: to take back what was given up on. */
  renew(timeout: number): void {
    this.ignoreSignal()
    this.#timeout = timeout
    this.#start = performance.now()
    this.#end = this.#start + timeout
  }

  throwIfAborted(): void {
    this.#signal?.throwIfAborted()
  }

  /** Whether only one try was asked for. */
  get isOneTry(): boolean {
    return this.#timeout === 0
  }

  /** Milliseconds since the beginning. */
  get waited(): number {
    return Math.round(performance.now() - this.#start)
  }

  get left(): number {
    return Math.max(0, this.#end - performance.now())
  }

  /** For calls that end with it; where only one try was asked for, each has a second, and the last one 100 ms. */
  get bound(): Bound {
    return this.#bound
  }

  /** The same end for another function of the library. */
  get wait(): Wait {
    return { signal: this.#signal, timeout: this.isOneTry ? 0 : Math.min(MOST_MS, Math.max(1, Math.ceil(this.left))) }
  }

  /** Whether the time is up; never for a timeout of 0, which means one try however long that takes. */
  get isOver(): boolean {
    return this.#timeout > 0 && this.left === 0
  }

  /** The options for a part of the work, which has what is left of the time. */
  get rest(): Wait {
    return { timeout: this.isOneTry ? 0 : Math.max(1, Math.ceil(this.left)), signal: this.#signal }
  }

  /**
   * Waits, for at most the time that is left, or until `wake` resolves. False, at once, where no time is left.
   *
   * @throws the signal's reason, as soon as it is aborted
   */
  async pause(ms: number, wake?: Promise<void>): Promise<boolean> {
    this.throwIfAborted()
    const left = this.left
    if (left === 0) return false
    await this.#wait(Math.min(ms, left), wake)
    return true
  }

  /**
   * Waits until `done` resolves. False where the time was up before; where only one try was asked for, that of its turn.
   *
   * @throws the signal's reason, as soon as it is aborted
   */
  async waitFor(done: Promise<unknown>): Promise<boolean> {
    this.throwIfAborted()
    return this.#wait(this.isOneTry ? ONE_TURN : this.left, done)
  }

  /** Whether `wake` resolved before the time was up. */
  #wait(ms: number, wake: Promise<unknown> | undefined): Promise<boolean> {
    return new Promise((resolve, reject) => {
      const end = (isWoken: boolean) => {
        clearTimeout(timer)
        forget()
        resolve(isWoken)
      }
      // Without an end too, something that is waited for keeps the process alive.
      const timer = ms > MOST_MS ? setInterval(() => {}, MOST_MS) : setTimeout(end, ms, false)
      const forget = onAbort(this.#signal, (reason) => {
        clearTimeout(timer)
        reject(reason)
      })
      void wake?.then(() => end(true))
    })
  }
}

class DeadlineBound implements Bound {
  readonly #deadline: Deadline
  readonly #signal: () => AbortSignal | undefined

  constructor(deadline: Deadline, signal: () => AbortSignal | undefined) {
    this.#deadline = deadline
    this.#signal = signal
  }

  get signal(): AbortSignal | undefined {
    return this.#signal()
  }

  get left(): number {
    return this.#deadline.isOneTry ? ONE_TRY : Math.max(LAST_TRY, this.#deadline.left)
  }
}

/** Milliseconds that a call may take where only one try was asked for, and that it may wait for its turn in a queue. */
const ONE_TRY = 1_000
/** The same for a call that begins when the time is up: what waits is tried a last time then. */
const LAST_TRY = 100
const ONE_TURN = 10_000

/** The options that bound a wait are all that is given. */
export function checkWait(options: Wait | undefined, timeout: number): Deadline {
  return checkDeadline(checkOptions(options, ['signal', 'timeout']), timeout)
}

/** Default times in milliseconds: for what only looks, and for what changes something. */
export const LOOKING = 5_000
export const CHANGING = 10_000

/** setTimeout takes no more, some 24 days; what is longer has no end. */
const MOST_MS = 2 ** 31 - 1

/** The n-th wait (from 1) for something that passes by itself: short at first, at most 50 ms, and never in step. */
export function backoff(attempt: number): number {
  return Math.min(50, 2 ** Math.min(attempt, 6) / 2) * (0.5 + Math.random())
}

/** `after 3 attempts in 120 ms`; nothing to say of the first. */
export function tries(attempt: number, { waited }: Deadline): string | undefined {
  return attempt === 1 ? undefined : `after ${attempt} attempts in ${waited} ms`
}
