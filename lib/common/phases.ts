/**
 * A workflow as a list of phases, each of which has its rule once. In the usual case all of them go in one hop to a
 * thread: every phase that can say in advance which answers it expects is planned into one sequence of calls. The
 * sequence ends at the first answer that is another one. The phase it ended in then does its step by hand, with the
 * waiting, mending and explaining that may need, and what is left is planned again from there.
 */

import { type Asked, type Bound, GivenUp } from '../kernel/bounded.ts'
import { Sequence } from '../kernel/sequence.ts'
import { decide } from '../kernel/trace.ts'
import type { Deadline } from './deadline.ts'

export interface Phase {
  /** Whether nothing is left to be done. It can become false again, where a later phase has to begin anew. */
  readonly isDone: boolean
  /**
   * Adds the calls of the usual case. Returns what takes their answers over once the sequence has run; undefined: this
   * phase cannot be planned now, and so none after it. Calls that the sequence did not reach have no answer.
   */
  plan?(sequence: Sequence): (() => void) | undefined
  /** Does it call by call, in every case. Resolves without being done only where an earlier phase has to be done again. */
  byHand(): Promise<void>
  /** Takes back what was done, where the workflow fails. */
  undo?(): Promise<void>
  /** The sequence that its calls were in was given up on, and has come back: the steps have their answers. */
  comeBack?(): void
}

/**
 * Does all phases, or undoes them in reverse order. A sequence that is given up on is undone by its thread.
 *
 * @param asked the device or file that the calls depend on
 * @throws what a phase throws, GivenUp, or the signal's reason
 */
export async function runPhases(phases: readonly Phase[], deadline: Deadline, asked?: Asked): Promise<void> {
  try {
    for (;;) {
      deadline.throwIfAborted()
      const left = phases.filter(isLeft)
      await runPlanned(left, deadline.bound, asked)
      deadline.throwIfAborted()
      // One of them can also have to be done again.
      const next = phases.find(isLeft)
      if (next === undefined) return
      if (next.plan !== undefined) decide(() => `${nameOf(next)}: step by step`)
      await next.byHand()
    }
  } catch (error) {
    decide(() => `what was done is undone: ${String(error)}`)
    for (const phase of phases.toReversed()) await undo(phase)
    throw error
  }
}

function isLeft({ isDone }: Phase): boolean {
  return !isDone
}

/** `Backing` for a BackingPhase. */
function nameOf(phase: Phase): string {
  return phase.constructor.name.replace(/Phase$/, '')
}

/** What cannot be taken back must not keep the others from being taken back; the first error is the one to be told. */
async function undo(phase: Phase): Promise<void> {
  try {
    await phase.undo?.()
  } catch {
    // Its thread goes on with it, where it was given up on.
  }
}

async function tellLate(phases: readonly Phase[], back: Promise<unknown>): Promise<void> {
  await back
  for (const phase of phases) phase.comeBack?.()
}

async function runPlanned(phases: readonly Phase[], bound: Bound, asked: Asked | undefined): Promise<void> {
  const sequence = new Sequence()
  const takers: (() => void)[] = []
  for (const phase of phases) {
    const take = phase.plan?.(sequence)
    if (take === undefined) break
    takers.push(take)
  }
  if (takers.length === 0) return sequence.giveBack()
  decide(() => `in one hop: ${phases.slice(0, takers.length).map(nameOf).join(', ')}`)
  try {
    await sequence.run(bound, asked)
  } catch (error) {
    if (error instanceof GivenUp) void tellLate(phases, error.back)
    throw error
  }
  // Each of them, whatever the one before it found: descriptors have been opened that somebody has to know of.
  const refused: unknown[] = []
  for (const take of takers) {
    try {
      take()
    } catch (error) {
      refused.push(error)
    }
  }
  sequence.giveBack()
  if (refused.length > 0) throw refused[0]
}
