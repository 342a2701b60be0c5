/** What the examples, and the benchmarks, do when something goes wrong, and at the end. */

import { LoopError } from 'loopctl'

/** @param {unknown} error */
export function complain(error) {
  console.error(error instanceof Error ? error.message.trim() : String(error))
  if (LoopError.is(error) && error.hint) console.error(`hint: ${error.hint}`)
  process.exitCode = 1
}

/**
 * The last step first, and every one although another failed.
 *
 * @param {Set<() => unknown>} steps
 */
export async function takeBack(steps) {
  for (const step of [...steps].toReversed()) {
    try {
      await step()
    } catch (error) {
      complain(error)
    }
  }
}
