/** One after another: the operations of one handle, each of which waits for its turn no longer than its own time. */

import type { Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'

export class Queue {
  readonly #waiting: (() => void)[] = []
  #isTaken = false
  /** The operation whose turn it is has ended for its caller, and its call has not come back. */
  #isStuck = false

  /** Whether an operation is under way for its caller. */
  get isRunning(): boolean {
    return this.#isTaken && !this.#isStuck
  }

  /** Whether a call that has not come back is in the way. */
  get isStuck(): boolean {
    return this.#isStuck
  }

  /**
   * Undefined where the turn has come at once; else resolves when it has. Whoever has entered must leave.
   *
   * @throws `timeout`, the signal's reason
   */
  enter(deadline: Deadline, path: string): Promise<void> | undefined {
    deadline.throwIfAborted()
    if (this.#isTaken) return this.#wait(deadline, path)
    this.#isTaken = true
    return undefined
  }

  async #wait(deadline: Deadline, path: string): Promise<void> {
    let begin: (() => void) | undefined
    const turn = new Promise<void>((resolve) => {
      begin = resolve
    })
    const waiter = () => begin?.()
    this.#waiting.push(waiter)
    let hasTurn = false
    try {
      hasTurn = await deadline.waitFor(turn)
    } finally {
      if (!hasTurn) this.#giveUp(waiter)
    }
    if (hasTurn) return
    const who = this.#isStuck ? 'a call before it does not come back' : 'the operation before it has not ended'
    throw refusal('timeout', 'ioctl', `its turn did not come in ${deadline.waited} ms: ${who}`, { path })
  }

  /** Its turn may just have come: then it is passed on. */
  #giveUp(waiter: () => void): void {
    const at = this.#waiting.indexOf(waiter)
    if (at >= 0) this.#waiting.splice(at, 1)
    else this.#next()
  }

  /** `after`: the call that was given up on; the next operation begins when that has come back. */
  leave(after?: Promise<unknown>): void {
    if (after === undefined) {
      this.#next()
      return
    }
    this.#isStuck = true
    void this.#resumeAfter(after)
  }

  async #resumeAfter(back: Promise<unknown>): Promise<void> {
    await back
    this.#isStuck = false
    this.#next()
  }

  #next(): void {
    const next = this.#waiting.shift()
    this.#isTaken = next !== undefined
    next?.()
  }
}
