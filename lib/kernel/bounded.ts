/**
 * Calls with an end. `within(bound).loopGetStatus64(fd, info)` and `sequence.run(bound)` answer as without a bound, or
 * reject with {@link GivenUp} as soon as the time is up or the signal is aborted, whatever the kernel does.
 *
 * What was given up on:
 *
 * - If it had not begun, it never will.
 * - If it had begun, its thread stays in the kernel. When the thread comes back, it makes no further call of a sequence,
 *   but for the undoing ones ({@link Sequence.undoing}), and then undoes what it did: it detaches what it attached, removes
 *   the device that it made, closes what it opened and unlinks what it named. It needs no JavaScript for that, and does
 *   so too where the environment has ended meanwhile. After that {@link GivenUp.back} resolves.
 * - A descriptor that it was given must stay open until then: close it with files.ts, which leaves it to the thread.
 * - It keeps no process alive.
 *
 * A bound says who is asked: a device by its number, a file by its path. While a call to one of them is stuck, no other
 * call to the same one begins, and of those that have not been given up on (yet) at most four run at once: the others
 * wait, each for as long as its own bound allows.
 */

import { type Binding, binding, type CallName, type Calls } from './binding.ts'
import { decide } from './trace.ts'
import { Watcher } from './watchers.ts'

/** The number of a device, or the path of a file. */
export type Asked = number | string

export interface Bound {
  /** Milliseconds that are left now; Infinity: any time. A call that finds 0 does not begin. */
  readonly left: number
  readonly signal?: AbortSignal | undefined
}

/** For what takes back a workflow whose own time is up. */
export const UNDOING: Bound = { left: 1_000 }

/** A call that did not come back in time. */
export class GivenUp extends Error {
  override readonly name = 'GivenUp'
  /** A row of native/calls.cc, or `sequence`. */
  readonly call: string
  readonly asked: Asked | undefined
  /** Whether its thread is still in the kernel. */
  readonly hasBegun: boolean
  /** Whether it was the signal; its reason is the `cause`. */
  readonly isAborted: boolean
  /**
   * Resolves, with the answer where there is one, once the call has come back and is undone; never rejects. Whoever has
   * more to undo after that puts a promise of it in its place.
   */
  back: Promise<unknown>
  /** Whether it is for certain that what the call was for has not been done, or is undone. */
  isUndone = true

  constructor(call: string, asked: Asked | undefined, signal: AbortSignal | undefined, back?: Promise<unknown>) {
    const who = typeof asked === 'number' ? `/dev/loop${asked}` : asked
    super(`${call} did not come back in time${who === undefined ? '' : `: ${who} does not answer`}`)
    this.call = call
    this.asked = asked
    this.hasBegun = back !== undefined
    this.isAborted = signal?.aborted ?? false
    if (this.isAborted) this.cause = signal?.reason
    this.back = back ?? Promise.resolve()
    decide(() => `${this.isAborted ? 'aborted' : 'given up on'}: ${this.message}`)
  }
}

/** Those of {@link Binding} that are promises. */
export type Bounded = { readonly [Name in CallName]: Binding[Name] } & Pick<
  Binding,
  'readNames' | 'readWhole' | 'sysfsRead'
>

/** The calls of the addon, each with that end; without a bound as they are. */
export function within(bound: Bound | undefined, asked?: Asked): Bounded {
  return bound === undefined ? binding() : new (boundedCalls())(bound, asked)
}

/** A call that may hang: undefined where it was given up on. */
export async function callWithin<Name extends CallName>(
  ms: number,
  asked: Asked | undefined,
  name: Name,
  ...values: Calls[Name]
): Promise<number | undefined> {
  try {
    const call = within({ left: ms }, asked)[name] as (...native: Calls[Name]) => Promise<number>
    return await call(...values)
  } catch (error) {
    if (error instanceof GivenUp) return undefined
    throw error
  }
}

/** The devices and files of which calls were given up on and have not come back; of this environment. */
export function listUnanswering(): Asked[] {
  return [...gates].filter(([, gate]) => gate.stuck > 0).map(([asked]) => asked)
}

/** Leaves the descriptor to the thread of a stuck call that uses it, which closes it. False: there is none. */
export function leaveToThread(fd: number): boolean {
  return stuckCalls > 0 && binding().leaveSync(fd) === 1
}

type BoundedCalls = new (bound: Bound, asked: Asked | undefined) => Bounded

let known: BoundedCalls | undefined

function boundedCalls(): BoundedCalls {
  if (known !== undefined) return known
  class Calling {
    readonly bound: Bound
    readonly asked: Asked | undefined

    constructor(bound: Bound, asked: Asked | undefined) {
      this.bound = bound
      this.asked = asked
    }
  }
  const addon = binding()
  for (const name of [...addon.sequenceRows, 'sysfsRead', 'readWhole', 'readNames'] as const) {
    const call = addon[name] as (...values: unknown[]) => Promise<unknown>
    Object.defineProperty(Calling.prototype, name, {
      get(this: Calling) {
        return (...values: unknown[]) => callBounded(name, () => call(...values), this.bound, this.asked)
      },
    })
  }
  return (known = Calling as unknown as BoundedCalls)
}

/** @throws GivenUp where a call would not begin */
export function assertNotOver(name: string, { left, signal }: Bound, asked: Asked | undefined): void {
  if (left <= 0 || signal?.aborted === true) throw new GivenUp(name, asked, signal)
}

/**
 * Starts a call that is one hop, and waits for it within the bound.
 *
 * @throws GivenUp
 */
export function callBounded<T>(
  name: string,
  start: () => Promise<T>,
  bound: Bound,
  asked: Asked | undefined,
): Promise<T> {
  const { left, signal } = bound
  if (left <= 0 || signal?.aborted === true) return Promise.reject(new GivenUp(name, asked, signal))
  const end = performance.now() + left
  const gate = asked === undefined ? undefined : gateOf(asked)
  const entered = gate?.enter(end, signal) ?? true
  if (entered === true) return startBounded(name, start, end, signal, asked, gate)
  return entered.then((hasEntered) => {
    if (!hasEntered) throw new GivenUp(name, asked, signal)
    if (signal?.aborted === true) {
      gate?.leave(false)
      throw new GivenUp(name, asked, signal)
    }
    return startBounded(name, start, end, signal, asked, gate)
  })
}

/** Without awaiting anything: the call has begun when this returns. */
function startBounded<T>(
  name: string,
  start: () => Promise<T>,
  end: number,
  signal: AbortSignal | undefined,
  asked: Asked | undefined,
  gate: Gate | undefined,
): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    let call = -1
    let isStuck = false
    const watcher = new Watcher(end, signal, () => {
      const answer = binding().giveUpSync(call)
      // It has come back, and is about to be told.
      if (answer === 0) return
      if (answer === 2) {
        isStuck = true
        stuckCalls++
        gate?.stick()
      }
      reject(new GivenUp(name, asked, signal, answer === 2 ? back : undefined))
    })
    const leave = () => {
      watcher.forget()
      if (isStuck) stuckCalls--
      gate?.leave(isStuck)
    }
    let promise: Promise<T>
    try {
      promise = start()
      call = binding().lastCallSync()
    } catch (error) {
      promise = Promise.reject(error)
    }
    const back = promise.then(
      (answer) => {
        leave()
        resolve(answer)
        return answer
      },
      (error: unknown) => {
        leave()
        reject(error)
      },
    )
  })
}

/** What was given up on without having had a turn keeps others from their turn until it has come back. */
export function whenUnstuck<T>(asked: Asked | undefined, back: Promise<T>): Promise<T> {
  const gate = asked === undefined ? undefined : gateOf(asked)
  stuckCalls++
  if (gate !== undefined) gate.stuck++
  return back.finally(() => {
    stuckCalls--
    gate?.leave(true)
  })
}

/** Calls of this environment that were given up on and have not come back. */
let stuckCalls = 0

/** How many calls to one device or file run at once. */
const MOST_AT_ONCE = 4

/** How many gates are kept for the next call to the same device or file, with nobody in them. */
const MOST_KEPT = 64

const gates = new Map<Asked, Gate>()

function gateOf(asked: Asked): Gate {
  let gate = gates.get(asked)
  if (gate === undefined) gates.set(asked, (gate = new Gate(asked)))
  return gate
}

/** What lets calls to one device or file begin. */
class Gate {
  stuck = 0
  #running = 0
  readonly #waiting = new Set<() => void>()
  readonly #asked: Asked

  constructor(asked: Asked) {
    this.#asked = asked
  }

  /** False where the bound ended first. Who has entered must leave. */
  enter(end: number, signal: AbortSignal | undefined): Promise<boolean> | true {
    if (this.#isOpen() && this.#waiting.size === 0) {
      this.#running++
      return true
    }
    return new Promise((resolve) => {
      const watcher = new Watcher(
        end,
        signal,
        () => {
          this.#waiting.delete(enter)
          this.#endIfEmpty()
          resolve(false)
        },
        true,
      )
      const enter = () => {
        watcher.forget()
        this.#running++
        resolve(true)
      }
      this.#waiting.add(enter)
    })
  }

  /** A call that has entered was given up on. */
  stick(): void {
    this.#running--
    this.stuck++
  }

  leave(wasStuck: boolean): void {
    if (wasStuck) this.stuck--
    else this.#running--
    if (this.#waiting.size > 0) this.#letIn()
    this.#endIfEmpty()
  }

  #letIn(): void {
    for (const enter of this.#waiting) {
      if (!this.#isOpen()) break
      this.#waiting.delete(enter)
      enter()
    }
  }

  #isOpen(): boolean {
    return this.stuck === 0 && this.#running < MOST_AT_ONCE
  }

  #endIfEmpty(): void {
    if (gates.size <= MOST_KEPT) return
    if (this.#running === 0 && this.stuck === 0 && this.#waiting.size === 0) gates.delete(this.#asked)
  }
}
