/** A process of its own that does what it is told, and holds what it attached. */

import { attach, LoopControl, LoopError } from 'loopctl'
import { observe } from '../dist/kernel/observe-calls.js'
import { time } from './measure.js'

/** @type {import('loopctl').LoopDevice[]} */
const held = []

const operations = {
  /** @param {{ file: string, number?: number }[]} wanted */
  async attach(wanted) {
    for (const { file, number } of wanted) held.push(await attach(file, { number }))
    return []
  },

  detach() {
    const devices = held.splice(0)
    return time(1, () => Promise.all(devices.map((device) => device.detach())))
  },

  /** @param {number[]} numbers */
  async remove(numbers) {
    const control = await LoopControl.open()
    const removeOne = async (/** @type {number} */ number) => {
      try {
        await control.remove(number, { timeout: 60_000 })
      } catch (error) {
        // Of a run that was interrupted between this and its noting it.
        if (!LoopError.is(error, 'no-such-device')) throw error
      }
    }
    const took = await time(1, () => Promise.all(numbers.map(removeOne)))
    await control.close()
    return took
  },

  /** Resident set, and what lives on the heap. */
  memory() {
    globalThis.gc?.()
    const { rss, heapUsed, external } = process.memoryUsage()
    return [rss, heapUsed + external]
  },

  /** @param {{ file: string, rounds: number }} what answers bytes on the heap, each followed by those outside of it */
  async garbage({ file, rounds }) {
    const work = async () => {
      const device = await attach(file)
      await device.status()
      await device.detach()
    }
    // V8 makes fewer objects when it has compiled what makes them.
    await countGarbage(500, work)
    const [heap = 0, outside = 0] = medians(await countGarbage(500, async () => {}))
    const counted = await countGarbage(rounds, work)
    return counted.flatMap((bytes) => [Math.max(0, bytes.heap - heap), Math.max(0, bytes.outside - outside)])
  },

  /** @param {{ file: string, rounds: number }} what answers retries, and the slowest attach */
  async contend({ file, rounds }) {
    let tries = 0
    let slowest = 0
    const count = (/** @type {string} */ call) => {
      if (call === 'loopConfigure') tries++
    }
    observe(count, { inSequences: true })
    for (let round = 0; round < rounds; round++) {
      const start = performance.now()
      const device = await attach(file, { timeout: 60_000 })
      slowest = Math.max(slowest, performance.now() - start)
      await device.detach({ timeout: 60_000 })
    }
    return [tries - rounds, slowest * 1e6]
  },
}

/**
 * The bytes that each round takes of the memory, but for those in which V8 has collected.
 *
 * @param {number} rounds
 * @param {() => Promise<void>} work
 */
async function countGarbage(rounds, work) {
  const counted = []
  for (let round = 0; round < rounds; round++) {
    const before = process.memoryUsage()
    await work()
    const after = process.memoryUsage()
    const heap = after.heapUsed - before.heapUsed
    if (heap >= 0) counted.push({ heap, outside: after.external - before.external })
  }
  return counted
}

/** @param {readonly { heap: number, outside: number }[]} counted */
function medians(counted) {
  return [median(counted.map(({ heap }) => heap)), median(counted.map(({ outside }) => outside))]
}

/** @param {readonly number[]} values */
function median(values) {
  return values.toSorted((a, b) => a - b)[values.length >> 1]
}

/** @typedef {typeof operations} Operations */

/** @param {{ operation: keyof Operations, argument: never }} message */
async function answer({ operation, argument }) {
  process.send?.(await operations[operation](argument))
}

process.on('message', (/** @type {Parameters<typeof answer>[0]} */ message) => void answer(message))
// Ctrl-C is for the parent, which then ends this; what is attached goes with the process.
process.on('SIGINT', () => {})
process.on('disconnect', () => process.exit())
