/**
 * The loop devices that one run of the tests makes for itself, so that it needs none of other programs', nor of another
 * run of the tests. A process of its own makes them and removes them: fixtures/devices.mjs.
 */

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { text } from 'node:stream/consumers'
import { setTimeout as pause } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { type LoopControl, LoopError } from '../lib/index.ts'
import { limit } from './scale.ts'
import { AT_ONCE, WORKERS } from './workers.ts'

/**
 * More than the tests attach at once: one file takes up to 50, most take few. An attach takes the lowest free device, and
 * makes one only where none is free: with these spares it makes none, whose maker nobody could know.
 */
const SPARES = 64 * AT_ONCE

/** Each run has a block of so many numbers, for devices that a test asks for by their number. */
const BLOCK = 1_000
/** Above the spares of every run, so that nobody who takes the lowest free device gets one of a test; below what max_part allows. */
const FIRST = 1_000
const LAST = 32_000

export interface OwnDevices {
  /** The first number of the block, with a device that marks the block as taken. The rest of the block is unused. */
  first: number
  /** Removes what was made. */
  remove: () => Promise<void>
}

export async function makeOwnDevices(): Promise<OwnDevices> {
  const script = fileURLToPath(new URL('fixtures/devices.mjs', import.meta.url))
  const words = [FIRST, LAST, BLOCK, SPARES, limit(10_000)].map(String)
  // Detached: a Ctrl-C on the terminal ends this process, which it sees, and not the other.
  const child = spawn(process.execPath, [script, ...words], { stdio: ['pipe', 'pipe', 'inherit'], detached: true })
  const said = text(child.stdout)
  const ended = once(child, 'exit')
  const [first] = await Promise.race([once(child.stdout, 'data'), ended.then(() => [Buffer.of()])])
  const number = Number(String(first) || 'NaN')
  if (Number.isNaN(number)) throw new Error(`the devices for the tests could not be made: ${await said}`)
  return {
    first: number,
    remove: async () => {
      child.stdin.end()
      const [status] = (await ended) as [number | null]
      if (status !== 0) throw new Error(`the devices of the tests could not be removed: exit ${status}`)
    },
  }
}

/** The first of the numbers in the block for one of the files that run at once, which vitest counts from 1. */
export function shareOf(worker: number, first: number): number {
  return first + 1 + ((worker - 1) % WORKERS) * Math.floor(BLOCK / WORKERS)
}

/**
 * Removes a device that is to be free. Somebody else may have it open for a moment, who is waited for.
 *
 * @returns whether the device is gone
 */
export async function removeFree(control: LoopControl, number: number): Promise<boolean> {
  const end = performance.now() + limit(8_000)
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
