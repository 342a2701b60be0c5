/**
 * The loop devices that one run of the tests makes for itself, so that it needs none of other programs', nor of another
 * run of the tests. LOOP_CTL_ADD makes a device for exactly one caller and answers EEXIST to every other: what it made
 * here belongs to this run, and is all that this run removes.
 */

import { setTimeout as pause } from 'node:timers/promises'
import { LoopControl, LoopError } from '../lib/index.ts'
import { limit } from './scale.ts'
import { WORKERS } from './workers.ts'

/**
 * More than all tests attach at once. LOOP_CTL_GET_FREE answers with the lowest free number, and makes a device only where
 * none is free: with these spares it makes none, whose maker nobody could know.
 */
const SPARES = 64

/** Each run has a block of so many numbers, for devices that a test asks for by their number. */
const BLOCK = 1_000
/** Above the spares of every run, so that LOOP_CTL_GET_FREE never offers the device of a test; below what max_part allows. */
const FIRST = 1_000
const LAST = 32_000

export interface OwnDevices {
  /** The first number of the block, with a device that marks the block as taken. The rest of the block is unused. */
  first: number
  /** Removes what was made. A device that somebody keeps attached is left, and named. */
  remove: () => Promise<void>
}

export async function makeOwnDevices(): Promise<OwnDevices> {
  const made: number[] = []
  try {
    await using control = await LoopControl.open()
    const first = await claimBlock(control)
    made.push(first)
    for (let i = 0; i < SPARES; i++) made.push(await control.add())
    return { first, remove: () => removeAll(made) }
  } catch (error) {
    await removeAll(made)
    throw error
  }
}

/** The first of the numbers in the block for one of the files that run at once, which vitest counts from 1. */
export function shareOf(worker: number, first: number): number {
  return first + 1 + ((worker - 1) % WORKERS) * Math.floor(BLOCK / WORKERS)
}

/** Makes the first device of a block whose first device nobody else has made. */
async function claimBlock(control: LoopControl): Promise<number> {
  const blocks = Math.floor((LAST - FIRST) / BLOCK)
  const start = Math.floor(Math.random() * blocks)
  for (let i = 0; i < blocks; i++) {
    const number = FIRST + ((start + i) % blocks) * BLOCK
    try {
      return await control.add(number)
    } catch (error) {
      if (!LoopError.is(error, 'device-exists')) throw error
    }
  }
  throw new Error(
    `all ${blocks} blocks of numbers are taken by other runs of the tests, or left by runs that were killed`,
  )
}

/** The highest first: the lower ones are what LOOP_CTL_GET_FREE offers to others meanwhile. */
async function removeAll(numbers: readonly number[]): Promise<void> {
  await using control = await LoopControl.open()
  const end = performance.now() + limit(10_000)
  for (const number of numbers.toReversed()) {
    if (!(await removeFree(control, number, end))) {
      console.warn(`\n*** /dev/loop${number}, made for the tests, is left: another program has attached it ***\n`)
    }
  }
}

/**
 * Removes a device that is to be free. LOOP_CTL_GET_FREE may have offered it to somebody else, who is waited for until
 * `end`, a moment of `performance.now()`.
 *
 * @returns whether the device is gone
 */
export async function removeFree(
  control: LoopControl,
  number: number,
  end: number = performance.now() + limit(8_000),
): Promise<boolean> {
  for (;;) {
    try {
      await control.remove(number)
      return true
    } catch (error) {
      if (LoopError.is(error, 'no-such-device')) return true
      if (!LoopError.is(error, 'in-use')) throw error
      if (performance.now() > end) return false
      await pause(20)
    }
  }
}
