/** Calls of the addon one after another in one hop to the pool, which costs more than most of them. */

import { constants } from 'node:os'
import { binding, type CallName, type Calls } from './binding.ts'
import { openDevice } from './devnode.ts'
import * as files from './files.ts'
import { tell, wantsSingleCalls } from './seam.ts'

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
const [CALL, FLOW, ANSWERS, ARGUMENTS] = [0, 1, 2, 4]
const [EXPECTED, ANSWER] = [4, 5]

/** Data that calls fill is filled when the sequence has run. */
export class Sequence {
  readonly #leavesOpen: boolean
  readonly #planned: Planned[] = []
  #newPart = 0

  /** `leavesOpen`: what it opens it may leave open. */
  constructor({ leavesOpen = false }: { leavesOpen?: boolean } = {}) {
    this.#leavesOpen = leavesOpen
  }

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

  #plan(flow: number, expected: number, name: CallName, values: readonly unknown[]): Step {
    const step = new Step(this.#planned.length)
    this.#planned.push({ name, values: values as Value[], flow: flow | this.#newPart, expected, step })
    this.#newPart = 0
    return step
  }

  /** To be called once. */
  async run(): Promise<void> {
    if (wantsSingleCalls() || (this.#leavesOpen && mustKnowDescriptors())) return this.#runSingly()
    const tape = this.#encode()
    await binding().sequenceRun(this.#planned.length, tape)
    this.#decode(tape)
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
    for (const [i, { name, values, flow, expected }] of this.#planned.entries()) {
      const at = i * INTS
      ints[at + CALL] = rowOf(name)
      ints[at + FLOW] = flow
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
  }

  async #runSingly(): Promise<void> {
    let goesOn = true
    for (const { name, values, flow, expected, step } of this.#planned) {
      if (!goesOn && (flow & NEW_PART) === 0) continue
      const numbers = values.map((value) => (value instanceof Step ? value.fd : value))
      const answer = await callSingly(name, numbers)
      step.answer = answer
      const kind = flow & ~NEW_PART
      goesOn = kind === ALWAYS || (kind === IF_EXPECTED ? answer === expected : answer >= 0)
    }
  }
}

/**
 * Whether descriptors have to be opened by node:fs: it closes those of a worker thread when that ends, and Deno's cannot
 * close any others.
 */
function mustKnowDescriptors(): boolean {
  return process.versions['deno'] !== undefined || !process.getBuiltinModule('node:worker_threads').isMainThread
}

let rows: ReadonlyMap<string, number> | undefined

function rowOf(name: CallName): number {
  rows ??= new Map(binding().sequenceRows.map((row, i) => [row, i]))
  return rows.get(name) ?? -1
}

type AnyCall = (...values: unknown[]) => Promise<number>

/** Calls that node:fs has, which is to know of the descriptors. */
const SINGLE: Partial<Record<CallName, unknown>> = {
  close: files.close,
  fsync: files.fsync,
  open: (path: Uint8Array, flags: number) => files.open(bytesOf(path), flags),
  openLoop: openDevice,
  openRegular,
}

function callSingly(name: CallName, values: unknown[]): Promise<number> {
  const call = (SINGLE[name] ?? binding()[name]) as AnyCall
  return call(...values)
}

/** Less the NUL at the end. */
function bytesOf(path: Uint8Array): Buffer {
  return Buffer.from(path.subarray(0, -1))
}

async function openRegular(path: Uint8Array, flags: number): Promise<number> {
  const given = bytesOf(path)
  const stat = await files.stat(given)
  if (typeof stat === 'number') return stat
  return stat.isFile() ? files.open(given, flags | files.O_NONBLOCK) : -constants.errno.EINVAL
}
