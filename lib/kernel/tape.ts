/**
 * The memory of a sequence of calls, as native/sequence.cc reads it: the steps, and then the data that calls read or fill.
 * Tapes are used again and again, so that a sequence makes no buffers of its own.
 */

import { little, type Place } from './uapi.ts'

/** struct Step in native/sequence.cc. */
const STEP_SIZE = 48
const [INTS, DOUBLES] = [STEP_SIZE / 4, STEP_SIZE / 8]
const [CALL, FLOW, ANSWERS, MICROSECONDS, ARGUMENTS] = [0, 1, 2, 3, 4]
const MOST_ARGUMENTS = 4
const [EXPECTED, ANSWER] = [4, 5]

/** What a new tape has room for: an attach has 20 steps, and a kilobyte of data. */
const STEPS = 24
const DATA_SIZE = 1_408

/** How many tapes are kept for the next sequences, and the size in bytes of the largest of them. */
const MOST_KEPT = 8
const LARGEST_KEPT = 8_192

const kept: Tape[] = []

/** A tape that nobody else uses, empty. */
export function takeTape(): Tape {
  return kept.pop() ?? new Tape()
}

/** For the next sequence: whoever gives a tape back must not look at it any more. */
export function giveBackTape(tape: Tape): void {
  tape.clear()
  if (kept.length < MOST_KEPT && tape.bytes.length <= LARGEST_KEPT) kept.push(tape)
}

/** Data on a tape, for as long as the sequence has the tape. */
export class Room implements Place {
  readonly size: number
  readonly #tape: Tape
  at: number

  constructor(tape: Tape, at: number, size: number) {
    this.#tape = tape
    this.at = at
    this.size = size
  }

  get data(): DataView {
    return this.#tape.data
  }

  get bytes(): Buffer {
    return this.#tape.bytes.subarray(this.at, this.at + this.size)
  }

  /** The text of so many bytes. */
  text(length: number): string {
    return this.#tape.bytes.toString('utf8', this.at, this.at + length)
  }
}

export class Tape {
  /** All of it, as the addon gets it. */
  bytes!: Buffer
  data!: DataView
  count = 0
  #ints!: Int32Array
  #doubles!: Float64Array
  /** How many steps there is room for. */
  #steps = STEPS
  /** Where the data ends. */
  #end = STEPS * STEP_SIZE
  readonly #rooms: Room[] = []
  /** Where in #ints it says where data is. */
  readonly #references: number[] = []

  constructor() {
    this.#use(Buffer.from(new ArrayBuffer(this.#end + DATA_SIZE)))
  }

  #use(bytes: Buffer): void {
    this.bytes = bytes
    this.data = new DataView(bytes.buffer)
    this.#ints = new Int32Array(bytes.buffer)
    this.#doubles = new Float64Array(bytes.buffer)
  }

  clear(): void {
    this.count = 0
    this.#end = this.#steps * STEP_SIZE
    this.#rooms.length = 0
    this.#references.length = 0
  }

  /** Adds a step without arguments; returns its number. */
  addStep(call: number, flow: number, expected: number): number {
    if (this.count === this.#steps) this.#grow(this.#steps, 0)
    const index = this.count++
    const ints = this.#ints
    const at = index * INTS
    ints[at + CALL] = call
    ints[at + FLOW] = flow
    ints[at + ANSWERS] = 0
    ints[at + MICROSECONDS] = 0
    for (let i = at + ARGUMENTS; i < at + ARGUMENTS + MOST_ARGUMENTS; i++) ints[i] = 0
    this.#doubles[index * DOUBLES + EXPECTED] = expected
    this.#doubles[index * DOUBLES + ANSWER] = Number.NaN
    return index
  }

  setNumber(step: number, argument: number, value: number): void {
    this.#ints[step * INTS + ARGUMENTS + argument] = value
  }

  /** The argument is what an earlier step answers. */
  setAnswer(step: number, argument: number, earlier: number): void {
    this.#ints[step * INTS + ARGUMENTS + argument] = earlier
    this.#ints[step * INTS + ANSWERS] = (this.#ints[step * INTS + ANSWERS] ?? 0) | (1 << argument)
  }

  setData(step: number, argument: number, room: Room): void {
    const at = step * INTS + ARGUMENTS + argument
    this.#ints[at] = room.at
    this.#references.push(at)
  }

  /** Room for so many bytes, which are zero. */
  addRoom(size: number): Room {
    const needed = Math.ceil(size / 8) * 8
    if (this.#end + needed > this.bytes.length) this.#grow(0, Math.max(needed, DATA_SIZE))
    const room = new Room(this, this.#end, size)
    this.#end += needed
    this.#doubles.fill(0, room.at / 8, this.#end / 8)
    this.#rooms.push(room)
    return room
  }

  addBytes(bytes: Uint8Array): Room {
    const room = this.addRoom(bytes.length)
    this.bytes.set(bytes, room.at)
    return room
  }

  /** A text that ends in a NUL. */
  addText(text: string): Room {
    const room = this.addRoom(Buffer.byteLength(text) + 1)
    this.bytes.write(text, room.at)
    return room
  }

  /** NaN: the sequence did not come to that step. */
  answerOf(step: number): number {
    return this.#doubles[step * DOUBLES + ANSWER] ?? Number.NaN
  }

  microsecondsOf(step: number): number {
    return this.data.getFloat32(step * STEP_SIZE + MICROSECONDS * 4, little)
  }

  #grow(steps: number, size: number): void {
    const [from, shift] = [this.#steps * STEP_SIZE, steps * STEP_SIZE]
    const old = this.bytes
    this.#use(Buffer.from(new ArrayBuffer(old.length + shift + size)))
    this.bytes.set(old.subarray(0, from))
    this.bytes.set(old.subarray(from, this.#end), from + shift)
    this.#steps += steps
    this.#end += shift
    for (const room of this.#rooms) room.at += shift
    for (const at of this.#references) this.#ints[at] = (this.#ints[at] ?? 0) + shift
  }
}
