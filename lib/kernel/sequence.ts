/** Calls of the addon one after another in one hop to a thread, which costs more than most of them. */

import { binding, type CallName, type Calls, NoThread } from './binding.ts'
import { type Asked, assertNotOver, type Bound, callBounded, GivenUp } from './bounded.ts'
import { callBoundedSync } from './bounded-sync.ts'
import { isObserved, tell, wantsSingleCalls } from './observe-calls.ts'
import { giveBackTape, Room, type Tape, takeTape } from './tape.ts'
import { isTraced, traceCall } from './trace.ts'
import { encodePath } from './uapi.ts'

/** A call of a sequence: once that has run, its answer; undefined where it ended before. */
export class Step {
  answer: number | undefined
  readonly index: number

  constructor(index: number) {
    this.index = index
  }

  get succeeded(): boolean {
    return this.answer !== undefined && this.answer >= 0
  }

  /** For the descriptor that a call opens; -1 where it did not. */
  get fd(): number {
    return this.answer === undefined || this.answer < 0 ? -1 : this.answer
  }
}

type Value = number | Uint8Array | Room | Step
/** A number can be the answer of an earlier step, and data can be on the tape already. */
type OrStep<Values extends unknown[]> = {
  [I in keyof Values]: Values[I] extends number
    ? number | Step
    : Values[I] extends Uint8Array
      ? Uint8Array | Room
      : never
}

/** When the sequence goes on: as in native/sequence.cc. */
const UNLESS_FAILED = 0
const IF_EXPECTED = 1
const ALWAYS = 2
const NEW_PART = 4
const UNDOING = 8
const TIMED = 16

/** A step as it was planned, for whoever listens to each. */
interface Planned {
  name: CallName
  values: readonly Value[]
  flow: number
  expected: number
  step: Step
}

/** The caller's array, and where its bytes are on the tape. */
interface Copy {
  bytes: Uint8Array
  room: Room
}

/** Arrays that calls fill are filled when the sequence has run; rooms are, until it is given back. */
export class Sequence {
  readonly #tape: Tape = takeTape()
  readonly #steps: Step[] = []
  readonly #copies: Copy[] = []
  /** Where somebody listens, or the calls may have to be made one by one. */
  readonly #planned: Planned[] | undefined
  #hasRooms = false
  #isGivenBack = false
  #newPart = 0
  #undoing = 0

  /** `isSync`: for {@link runWithinSync}. */
  constructor(isSync = false) {
    this.#planned = isSync || isObserved() || isTraced() ? [] : undefined
  }

  /** The sequence ends here if the call fails. */
  call<Name extends CallName>(name: Name, ...values: OrStep<Calls[Name]>): Step
  call(name: CallName, a?: Value, b?: Value, c?: Value, d?: Value): Step {
    return this.#plan(UNLESS_FAILED, 0, name, a, b, c, d)
  }

  /** The sequence ends here if the answer is another. */
  expect<Name extends CallName>(expected: number, name: Name, ...values: OrStep<Calls[Name]>): Step
  expect(expected: number, name: CallName, a?: Value, b?: Value, c?: Value, d?: Value): Step {
    return this.#plan(IF_EXPECTED, expected, name, a, b, c, d)
  }

  /** The sequence goes on in any case. */
  try<Name extends CallName>(name: Name, ...values: OrStep<Calls[Name]>): Step
  try(name: CallName, a?: Value, b?: Value, c?: Value, d?: Value): Step {
    return this.#plan(ALWAYS, 0, name, a, b, c, d)
  }

  /** What follows is called whatever became of what was before. */
  part(): void {
    this.#newPart = NEW_PART
  }

  /**
   * What follows is called only where the sequence was given up on, when its thread has come back; then what the
   * sequence opened and attached is closed and detached, whether there are such calls or not.
   */
  undoing(): void {
    this.#newPart = NEW_PART
    this.#undoing = UNDOING
  }

  /** Room for a struct that a call reads or fills, zeroed: without an array of its own, and until {@link giveBack}. */
  room(size: number): Room {
    this.#hasRooms = true
    return this.#tape.addRoom(size)
  }

  /** A path, the same way. */
  path(path: string | Buffer): Room {
    if (typeof path !== 'string') return this.#tape.addBytes(encodePath(path))
    return this.#tape.addText(path)
  }

  /** To be called when the sequence has run, and the rooms have been read. */
  giveBack(): void {
    if (!this.#isGivenBack) giveBackTape(this.#tape)
    this.#isGivenBack = true
  }

  #plan(
    flow: number,
    expected: number,
    name: CallName,
    a: Value | undefined,
    b: Value | undefined,
    c: Value | undefined,
    d: Value | undefined,
  ): Step {
    const flows = flow | this.#newPart | this.#undoing
    const index = this.#tape.addStep(rowOf(name), isTraced() ? flows | TIMED : flows, expected)
    if (a !== undefined) this.#setArgument(index, 0, a)
    if (b !== undefined) this.#setArgument(index, 1, b)
    if (c !== undefined) this.#setArgument(index, 2, c)
    if (d !== undefined) this.#setArgument(index, 3, d)
    const step = new Step(index)
    this.#steps.push(step)
    this.#newPart = 0
    if (this.#planned !== undefined) {
      const values = [a, b, c, d].filter((value) => value !== undefined)
      this.#planned.push({ name, values, flow: flows, expected, step })
    }
    return step
  }

  #setArgument(step: number, argument: number, value: Value): void {
    if (typeof value === 'number') this.#tape.setNumber(step, argument, value)
    else if (value instanceof Step) this.#tape.setAnswer(step, argument, value.index)
    else if (value instanceof Room) this.#tape.setData(step, argument, value)
    else {
      const room = this.#tape.addBytes(value)
      this.#copies.push({ bytes: value, room })
      this.#tape.setData(step, argument, room)
    }
  }

  /**
   * To be called once. Steps of a sequence that was given up on have their answers once that has come back.
   *
   * @throws GivenUp where there is a bound
   */
  async run(bound?: Bound, asked?: Asked): Promise<void> {
    // Call by call it is a test's: given up on only before it begins.
    if (wantsSingleCalls()) {
      if (bound !== undefined) assertNotOver('sequence', bound, asked)
      return this.#runSingly()
    }
    if (bound === undefined) await this.#start(false)
    else {
      try {
        await callBounded('sequence', () => this.#start(false), bound, asked)
      } catch (error) {
        if (error instanceof GivenUp && error.hasBegun) error.back = this.#decodeAfter(error.back)
        throw error
      }
    }
    this.#decode()
    if (!this.#hasRooms) this.giveBack()
  }

  /**
   * The same, for an exit handler: the thread of JavaScript waits for it. Where no thread is to be had, the calling one
   * makes the calls, and has no end then.
   *
   * @throws GivenUp
   */
  runWithinSync(ms: number, asked?: Asked): void {
    if (wantsSingleCalls()) return this.#runSinglySync()
    try {
      callBoundedSync('sequence', () => this.#start(true), ms, asked)
      this.#decode()
    } catch (error) {
      if (error instanceof NoThread) return this.#runSinglySync()
      if (error instanceof GivenUp && error.hasBegun) void this.#decodeAfter(error.back)
      throw error
    }
  }

  #start(closes: boolean): Promise<void> {
    return binding().sequenceRun(this.#tape.count, this.#tape.bytes, closes)
  }

  async #decodeAfter(back: Promise<unknown>): Promise<void> {
    await back
    this.#decode()
  }

  #decode(): void {
    const tape = this.#tape
    for (const step of this.#steps) {
      const answer = tape.answerOf(step.index)
      if (!Number.isNaN(answer)) step.answer = answer
    }
    for (const { bytes, room } of this.#copies) bytes.set(room.bytes)
    if (this.#planned !== undefined) this.#tell(this.#planned)
  }

  #tell(planned: readonly Planned[]): void {
    for (const { name, values, step } of planned) {
      if (step.answer === undefined) continue
      tell(name)
      if (isTraced()) traceCall(name, values.map(toNative), step.answer, this.#tape.microsecondsOf(step.index))
    }
  }

  async #runSingly(): Promise<void> {
    const calls = this.#callSingly()
    for (let next = calls.next(); next.done !== true;) {
      const { name, numbers } = next.value
      next = calls.next(await (binding()[name] as (...native: unknown[]) => Promise<number>)(...numbers))
    }
  }

  #runSinglySync(): void {
    const calls = this.#callSingly()
    for (let next = calls.next(); next.done !== true;) {
      const { name, numbers } = next.value
      next = calls.next((binding()[`${name}Sync`] as (...native: unknown[]) => number)(...numbers))
    }
  }

  /** Yields the calls that are to be made, and is told what each of them answers. */
  *#callSingly(): Generator<{ name: CallName; numbers: (number | Uint8Array)[] }, void, number> {
    let goesOn = true
    for (const { name, values, flow, expected, step } of this.#planned ?? []) {
      if ((flow & UNDOING) !== 0 || (!goesOn && (flow & NEW_PART) === 0)) continue
      const numbers = values.map(toNative)
      const answer = yield { name, numbers }
      step.answer = answer
      const kind = flow & ~NEW_PART
      goesOn = kind === ALWAYS || (kind === IF_EXPECTED ? answer === expected : answer >= 0)
    }
  }
}

/** As a call by itself takes it. */
function toNative(value: Value): number | Uint8Array {
  return value instanceof Step ? value.fd : value instanceof Room ? value.bytes : value
}

let rows: ReadonlyMap<string, number> | undefined

function rowOf(name: CallName): number {
  rows ??= new Map(binding().sequenceRows.map((row, i) => [row, i]))
  return rows.get(name) ?? -1
}
