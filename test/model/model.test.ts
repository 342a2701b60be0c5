/**
 * Three actors use the same few devices and files: two processes with the library, and raw ioctls that keep no rule. Each
 * step is compared with a model of a few lines. LOOPCTL_STRESS scales the number of steps.
 *
 * A failure is shrunk to a short sequence, and says the seed and the paths with which it is run again:
 * LOOPCTL_MODEL='{"seed":1,"path":"0:1","replayPath":"AB:C"}' npx vitest run test/model
 */

import { execFileSync } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import * as fc from 'fast-check'
import { describe, expect } from 'vitest'
import { test, unusedNumber } from '../kernel/support.ts'
import { limit, times } from '../scale.ts'
import { commands } from './commands.ts'
import { Machine } from './machine.ts'
import { Model } from './model.ts'

/** LOOPCTL_SOAK: for so many seconds, however many steps that are. */
const SOAK = Number(process.env['LOOPCTL_SOAK'] ?? 0) * 1000
const STEPS = SOAK > 0 ? Infinity : times(process.env['CI'] ? 20_000 : 2_000)
/** Steps of one sequence at most, and how many of them run at a time, each with devices and files of its own. */
const LENGTH = 150
const SIDE_BY_SIDE = 2
/** Devices of each. */
const NUMBERS = 4

interface Replay {
  seed?: number
  path?: string
  replayPath?: string
}

const replay = JSON.parse(process.env['LOOPCTL_MODEL'] ?? '{}') as Replay
const SEED = replay.seed ?? Math.floor(Math.random() * 2 ** 31)

/** Of those that this file of tests has for itself. */
function freeNumbers(count: number): number[] {
  const first = unusedNumber()
  return Array.from({ length: count }, (_, i) => first + i)
}

/** For so long a sequence that fails is made shorter. */
const SHRINKING = limit(60_000)

/** Sequence after sequence. */
async function runUntil(isOver: () => boolean, seed: number, machine: Machine): Promise<void> {
  const { path, replayPath } = replay
  const sequence = fc.commands([commands], {
    maxCommands: LENGTH,
    size: 'max',
    ...(replayPath !== undefined && { replayPath }),
  })
  for (let round = 0; !isOver(); round++) {
    let firstFailure = Number.POSITIVE_INFINITY
    const property = fc.asyncProperty(sequence, async (all) => {
      if (performance.now() > firstFailure + SHRINKING) return
      await machine.reset()
      const model = new Model()
      try {
        await fc.asyncModelRun(() => ({ model, real: machine }), all)
      } catch (error) {
        if (machine.isDisturbed(model)) return
        firstFailure = Math.min(firstFailure, performance.now())
        throw error
      }
    })
    await fc.assert(property, { seed: seed + round, numRuns: 1, ...(path !== undefined && { path }) })
    if (path !== undefined) return
  }
}

describe('three actors at the same devices', () => {
  test(
    `${SOAK > 0 ? `${SOAK / 1000} s of` : STEPS} steps as the model has them; seed ${SEED}`,
    { timeout: limit(60_000 + (SOAK || STEPS * 60)) },
    async ({ folder }) => {
      const lanes = replay.path === undefined ? SIDE_BY_SIDE : 1
      const numbers = freeNumbers(lanes * NUMBERS)
      const machines = Array.from({ length: lanes }, (_, i) => {
        const own = join(folder, `lane${i}`)
        mkdirSync(own)
        // In memory: LOOP_CONFIGURE flushes the file.
        execFileSync('mount', ['-t', 'tmpfs', 'tmpfs', own])
        return new Machine(own, numbers.slice(i * NUMBERS, (i + 1) * NUMBERS))
      })
      try {
        const end = performance.now() + (SOAK || Infinity)
        const runs = machines.map((machine, i) => {
          const isOver = () => machine.steps >= STEPS / lanes || performance.now() > end
          return runUntil(isOver, SEED + i * 1_000_000, machine)
        })
        const failed = (await Promise.allSettled(runs)).find((result) => result.status === 'rejected')
        if (failed !== undefined) throw failed.reason
        const done = machines.reduce((sum, { steps }) => sum + steps, 0)
        console.log(`model: ${done} steps, seed ${SEED}`)
        expect(done).toBeGreaterThanOrEqual(replay.path === undefined && SOAK === 0 ? STEPS : 1)
      } finally {
        for (const [i, machine] of machines.entries()) {
          await machine.end()
          execFileSync('umount', [join(folder, `lane${i}`)])
        }
      }
    },
  )
})
