/**
 * One attach at a time in this process: they would only fall over each other at the same free device and at the lock of
 * /dev/loop-control. Whoever waits for its turn has no descriptor open. Where an attach does not get on, because the
 * filesystem of its file does not answer, its turn passes to the next, and other attaches from the same mount wait
 * apart, so that they hold up nobody else.
 */

import type { FileArgument } from '../../common/arguments.ts'
import type { Deadline } from '../../common/deadline.ts'
import type { Phase } from '../../common/phases.ts'
import { areManyUnderWay, whenFewerAreUnderWay } from '../../detach/under-way.ts'
import { refusal } from '../../errors/errors.ts'
import { mountIdOf, readMountsSync } from '../../kernel/mountinfo.ts'
import type { Attaching } from '../attaching.ts'

/** Milliseconds that an attach may keep its turn while others wait. One that is not held up takes a few. */
const PATIENCE = 250

interface Turn {
  readonly argument: FileArgument
  /** The mount of the file, once it has been looked up: only where that matters. */
  mount: number | undefined
}

interface Waiter {
  readonly turn: Turn
  readonly begin: () => void
}

const waiting: Waiter[] = []
let current: Turn | undefined
let timer: NodeJS.Timeout | undefined

/** Turns that were passed on before they ended: their filesystems do not answer. */
const stalled = new Set<Turn>()

/** Undefined where somebody is before it. */
function takeFreeTurn(argument: FileArgument): Turn | undefined {
  if (current !== undefined || waiting.length > 0 || stalled.size > 0 || areManyUnderWay()) return undefined
  current = { argument, mount: undefined }
  return current
}

/** @throws `timeout`, the signal's reason */
async function takeTurn(argument: FileArgument, deadline: Deadline): Promise<Turn> {
  const free = takeFreeTurn(argument)
  if (free !== undefined) return free
  const turn: Turn = { argument, mount: undefined }
  await waitFor(deadline, (begin) => {
    const waiter = { turn, begin }
    waiting.push(waiter)
    passOn()
    return () => {
      const at = waiting.indexOf(waiter)
      if (at >= 0) waiting.splice(at, 1)
      else endTurn(turn)
    }
  })
  return turn
}

/** Waits until `wake` is called; `enqueue` says how to be called, and returns how to leave the queue again. */
async function waitFor(deadline: Deadline, enqueue: (wake: () => void) => () => void): Promise<void> {
  let wake: (() => void) | undefined
  const woken = new Promise<void>((resolve) => {
    wake = resolve
  })
  const leave = enqueue(() => wake?.())
  let isWoken = false
  try {
    isWoken = await deadline.waitFor(woken)
  } catch (error) {
    leave()
    throw error
  }
  if (isWoken) return
  leave()
  throw refusal(
    'timeout',
    'ioctl',
    `its turn did not come in ${deadline.waited} ms: this process has other attaches under way`,
    {
      path: '/dev/loop-control',
      hint: 'raise the timeout, or attach fewer at once',
    },
  )
}

function endTurn(turn: Turn): void {
  stalled.delete(turn)
  if (current === turn) current = undefined
  passOn()
}

function passOn(): void {
  if (current !== undefined) {
    // As long as somebody waits, the one whose turn it is is looked at.
    const watched = current
    if (waiting.length > 0) timer ??= setTimeout(() => stall(watched), PATIENCE)
    return
  }
  clearTimeout(timer)
  timer = undefined
  if (waiting.length === 0) return
  if (areManyUnderWay()) {
    whenFewerAreUnderWay(passOn)
    return
  }
  const at = findNext()
  const next = waiting[at]
  if (next === undefined) return
  waiting.splice(at, 1)
  current = next.turn
  next.begin()
  passOn()
}

function stall(turn: Turn): void {
  timer = undefined
  if (current === turn) {
    stalled.add(turn)
    current = undefined
  }
  passOn()
}

/** The first that waits for nothing but its turn: those from the mount of a stalled one would stall too. */
function findNext(): number {
  if (stalled.size === 0) return 0
  const mounts = readMountsSync()
  const mountOf = (turn: Turn): number | undefined =>
    (turn.mount ??= mountIdOf('fd' in turn.argument ? turn.argument.fd : turn.argument.path.toString(), mounts))
  const held = new Set([...stalled].map(mountOf))
  return waiting.findIndex(({ turn }) => {
    const mount = mountOf(turn)
    return mount === undefined || !held.has(mount)
  })
}

/** The turn of this process. */
export class TurnPhase implements Phase {
  readonly #work: Attaching
  #turn: Turn | undefined

  constructor(work: Attaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#turn !== undefined || this.#work.isOver
  }

  /** No call: where the turn is free, what comes after it is planned at once. */
  plan(): (() => void) | undefined {
    this.#turn = takeFreeTurn(this.#work.argument)
    return this.#turn === undefined ? undefined : () => {}
  }

  async byHand(): Promise<void> {
    this.#turn = await takeTurn(this.#work.argument, this.#work.deadline)
  }

  /** Lets the next one begin. */
  end(): void {
    if (this.#turn !== undefined) endTurn(this.#turn)
    this.#turn = undefined
  }
}
