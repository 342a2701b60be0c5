/** How long a workflow may still wait, and whether its caller has given up on it. */

import { checkSignal, checkTimeout } from './arguments.ts'

/** What bounds a wait; of everything that asks the kernel. */
export interface Wait {
  /** Gives up, undoes what had been done, and rejects with the signal's reason. */
  signal?: AbortSignal | undefined
  /** Milliseconds for the whole of it; 0: one try, without waiting. */
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
  readonly #timeout: number
  readonly #start: number
  readonly #end: number
  readonly #signal: AbortSignal | undefined

  /** `timeout` in milliseconds; 0: one try, no waiting. */
  constructor(timeout: number, signal?: AbortSignal) {
    this.#timeout = timeout
    this.#start = performance.now()
    this.#end = this.#start + timeout
    this.#signal = signal
  }

  throwIfAborted(): void {
    this.#signal?.throwIfAborted()
  }

  /** Milliseconds since the beginning. */
  get waited(): number {
    return Math.round(performance.now() - this.#start)
  }

  get left(): number {
    return Math.max(0, this.#end - performance.now())
  }

  /** Whether the time is up; never for a timeout of 0, which means one try however long that takes. */
  get isOver(): boolean {
    return this.#timeout > 0 && this.left === 0
  }

  /** Whether it is one try, which may take as long as it takes. */
  get isUnbounded(): boolean {
    return this.#timeout === 0
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
    await new Promise<void>((resolve, reject) => {
      const signal = this.#signal
      const end = () => {
        clearTimeout(timer)
        signal?.removeEventListener('abort', aborted)
        resolve()
      }
      const aborted = () => {
        clearTimeout(timer)
        reject(signal?.reason as Error)
      }
      const timer = setTimeout(end, Math.min(ms, left))
      signal?.addEventListener('abort', aborted, { once: true })
      void wake?.then(end)
    })
    return true
  }
}

/** The n-th wait (from 1) for something that passes by itself: short at first, at most 50 ms, and never in step. */
export function backoff(attempt: number): number {
  return Math.min(50, 2 ** Math.min(attempt, 6) / 2) * (0.5 + Math.random())
}

/** `after 3 attempts in 120 ms`; nothing to say of the first. */
export function tries(attempt: number, { waited }: Deadline): string | undefined {
  return attempt === 1 ? undefined : `after ${attempt} attempts in ${waited} ms`
}
