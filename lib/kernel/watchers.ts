/**
 * Waiting for a time or a signal. One timer serves all who wait, and is not touched by those who stop to wait before
 * their time; one listener serves all who wait for the same signal.
 */

import { onAbort } from './abort.ts'

/** Calls `onEnd` when the time has come (as performance.now() counts it) or the signal is aborted, once. */
export class Watcher {
  readonly end: number
  readonly #onEnd: () => void
  readonly #keepsAlive: boolean
  readonly #unlisten: (() => void) | undefined
  #isWatched: boolean
  /** Its neighbours in the list of all that have a time: a Set costs more than all the rest where it has but one. */
  #previous: Watcher | undefined
  #next: Watcher | undefined

  static #first: Watcher | undefined

  constructor(end: number, signal: AbortSignal | undefined, onEnd: () => void, keepsAlive = false) {
    this.end = end
    this.#onEnd = onEnd
    this.#keepsAlive = keepsAlive
    this.#unlisten = signal === undefined ? undefined : onAbort(signal, () => this.#tell())
    this.#isWatched = end < Infinity || keepsAlive
    if (!this.#isWatched) return
    this.#next = Watcher.#first
    if (this.#next !== undefined) this.#next.#previous = this
    Watcher.#first = this
    if (keepsAlive && alive++ === 0) timer?.ref()
    if (end < timerEnd || timer === undefined) arm(end)
  }

  /** Stops to wait. */
  forget(): void {
    this.#unlisten?.()
    if (!this.#isWatched) return
    this.#isWatched = false
    if (this.#previous === undefined) Watcher.#first = this.#next
    else this.#previous.#next = this.#next
    if (this.#next !== undefined) this.#next.#previous = this.#previous
    this.#previous = this.#next = undefined
    if (this.#keepsAlive && --alive === 0) timer?.unref()
  }

  #tell(): void {
    this.forget()
    this.#onEnd()
  }

  /** Tells those whose time has come; returns the time of the next one, if there is any. */
  static tellEnded(now: number): number | undefined {
    const ended: Watcher[] = []
    for (let each = Watcher.#first; each !== undefined; each = each.#next) if (each.end <= now) ended.push(each)
    // One that is told can have another forgotten.
    for (const each of ended) if (each.#isWatched) each.#tell()
    let next: number | undefined
    for (let each = Watcher.#first; each !== undefined; each = each.#next) next = Math.min(next ?? Infinity, each.end)
    return next
  }
}

let alive = 0
let timer: NodeJS.Timeout | undefined
let timerEnd = Infinity
/** A timer takes no more. */
const MOST_MS = 2 ** 31 - 1

function arm(end: number): void {
  clearTimeout(timer)
  timerEnd = end
  timer = setTimeout(endAll, Math.min(MOST_MS, Math.max(1, Math.ceil(end - performance.now()))))
  if (alive === 0) timer.unref()
}

function endAll(): void {
  timer = undefined
  timerEnd = Infinity
  const next = Watcher.tellEnded(performance.now())
  if (next !== undefined && timer === undefined) arm(next)
}
