/** Calls of the addon one after another in one hop to a thread, which costs more than most of them. */

import { binding, type CallName, type Calls, NoThread } from './binding.ts'
import { type Asked, assertNotOver, type Bound, callBounded, GivenUp } from './bounded.ts'
import { callBoundedSync } from './bounded-sync.ts'
import { tell, wantsSingleCalls } from './observe-calls.ts'
import { isTraced, traceCall } from './trace.ts'

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

type Value = number | Uint8Array | Step
/** A number can be the answer of an earlier step. */
type OrStep<Values extends unknown[]> = { [I in keyof Values]: Values[I] extends number ? number | Step : Values[I] }

/** When the sequence goes on: as in native/sequence.cc. */
const UNLESS_FAILED = 0
const IF_EXPECTED = 1
const ALWAYS = 2
const NEW_PART = 4
const UNDOING = 8
const TIMED = 16

interface Planned {
  name: CallName
  values: readonly Value[]
  flow: number
  expected: number
  step: Step
}

// struct Step in native/sequence.cc
const STEP_SIZE = 48
const [INTS, DOUBLES] = [STEP_SIZE / 4, STEP_SIZE / 8]
const [CALL, FLOW, ANSWERS, MICROSECONDS, ARGUMENTS] = [0, 1, 2, 3, 4]
const [EXPECTED, ANSWER] = [4, 5]

/** Data that calls fill is filled when the sequence has run. */
export class Sequence {
  readonly #planned: Planned[] = []
  #newPart = 0
  #undoing = 0

  /** The sequence ends here if the call fails. */
  call<Name extends CallName>(name: Name, ...values: OrStep<Calls[Name]>): Step {
    return this.#plan(UNLESS_FAILED, 0, name, values)
  }

  /** The sequence ends here if the answer is another. */
  expect<Name extends CallName>(expected: number, name: Name, ...values: OrStep<Calls[Name]>): Step {
    return this.#plan(IF_EXPECTED, expected, name, values)
  }

  /** The sequence goes on in any case. */
  try<Name extends CallName>(name: Name, ...values: OrStep<Calls[Name]>): Step {
    return this.#plan(ALWAYS, 0, name, values)
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

  #plan(flow: number, expected: number, name: CallName, values: readonly unknown[]): Step {
    const step = new Step(this.#planned.length)
    this.#planned.push({ name, values: values as Value[], flow: flow | this.#newPart | this.#undoing, expected, step })
    this.#newPart = 0
    return step
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
    const tape = this.#encode()
    const run = async (): Promise<void> => {
      await binding().sequenceRun(this.#planned.length, tape, false)
      this.#decode(tape)
    }
    await (bound === undefined ? run() : callBounded('sequence', run, bound, asked))
  }

  /**
   * The same, for an exit handler: the thread of JavaScript waits for it. Where no thread is to be had, the calling one
   * makes the calls, and has no end then.
   *
   * @throws GivenUp
   */
  runWithinSync(ms: number, asked?: Asked): void {
    if (wantsSingleCalls()) return this.#runSinglySync()
    const tape = this.#encode()
    const run = (): Promise<void> => binding().sequenceRun(this.#planned.length, tape, true)
    try {
      callBoundedSync('sequence', run, ms, asked)
      this.#decode(tape)
    } catch (error) {
      if (error instanceof NoThread) return this.#runSinglySync()
      if (error instanceof GivenUp && error.hasBegun) void error.back.then(() => this.#decode(tape))
      throw error
    }
  }

  #encode(): Uint8Array {
    let end = this.#planned.length * STEP_SIZE
    const data: [at: number, bytes: Uint8Array][] = []
    const place = (bytes: Uint8Array): number => {
      const at = end
      data.push([at, bytes])
      end += Math.ceil(bytes.length / 8) * 8
      return at
    }
    /** Itself, the number of the step it comes from, or where on the tape it is. */
    const numberOf = (value: Value): number =>
      typeof value === 'number' ? value : value instanceof Step ? value.index : place(value)
    const numbers = this.#planned.map(({ values }) => values.map(numberOf))

    const tape = new Uint8Array(end)
    const ints = new Int32Array(tape.buffer)
    const doubles = new Float64Array(tape.buffer)
    const timed = isTraced() ? TIMED : 0
    for (const [i, { name, values, flow, expected }] of this.#planned.entries()) {
      const at = i * INTS
      ints[at + CALL] = rowOf(name)
      ints[at + FLOW] = flow | timed
      ints[at + ANSWERS] = values.reduce<number>((bits, value, k) => bits | (value instanceof Step ? 1 << k : 0), 0)
      ints.set(numbers[i] ?? [], at + ARGUMENTS)
      doubles[i * DOUBLES + EXPECTED] = expected
      doubles[i * DOUBLES + ANSWER] = Number.NaN
    }
    for (const [at, bytes] of data) tape.set(bytes, at)
    return tape
  }

  #decode(tape: Uint8Array): void {
    const doubles = new Float64Array(tape.buffer)
    let at = this.#planned.length * STEP_SIZE
    for (const [i, { name, values, step }] of this.#planned.entries()) {
      const answer = doubles[i * DOUBLES + ANSWER] ?? Number.NaN
      if (!Number.isNaN(answer)) {
        step.answer = answer
        tell(name)
      }
      for (const value of values) {
        if (!(value instanceof Uint8Array)) continue
        value.set(tape.subarray(at, at + value.length))
        at += Math.ceil(value.length / 8) * 8
      }
    }
    if (isTraced()) this.#trace(tape)
  }

  #trace(tape: Uint8Array): void {
    const floats = new Float32Array(tape.buffer)
    for (const [i, { name, values, step }] of this.#planned.entries()) {
      if (step.answer === undefined) continue
      const told = values.map((value) => (value instanceof Step ? value.fd : value))
      traceCall(name, told, step.answer, floats[i * INTS + MICROSECONDS] ?? 0)
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
    for (const { name, values, flow, expected, step } of this.#planned) {
      if ((flow & UNDOING) !== 0 || (!goesOn && (flow & NEW_PART) === 0)) continue
      const numbers = values.map((value) => (value instanceof Step ? value.fd : value))
      const answer = yield { name, numbers }
      step.answer = answer
      const kind = flow & ~NEW_PART
      goesOn = kind === ALWAYS || (kind === IF_EXPECTED ? answer === expected : answer >= 0)
    }
  }
}

let rows: ReadonlyMap<string, number> | undefined

function rowOf(name: CallName): number {
  rows ??= new Map(binding().sequenceRows.map((row, i) => [row, i]))
  return rows.get(name) ?? -1
}
