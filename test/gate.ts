/** The one place that decides whether the tests on real devices can run, and says so. */

import { closeSync, existsSync, openSync, readdirSync } from 'node:fs'
import type { TestProject } from 'vitest/node'
import { LoopControl, LoopError } from '../lib/index.ts'
import { describeMissing, missingTools } from '../scripts/tools.js'

declare module 'vitest' {
  interface ProvidedContext {
    /** Why no real device can be had; empty where one can. */
    noKernel: string
  }
}

export default function gate(project: TestProject): (() => Promise<void>) | undefined {
  const reason = whyNot()
  const missing = missingTools(['tests'])
  if (missing.length > 0 && process.env['LOOPCTL_REQUIRE_KERNEL'] === '1') {
    throw new Error(`LOOPCTL_REQUIRE_KERNEL=1, but ${describeMissing(missing)}: npm run setup`)
  }
  project.provide('noKernel', reason)
  if (reason === '') {
    const before = new Set(loopDevices())
    return () => removeAll(loopDevices().filter((number) => !before.has(number)))
  }
  if (process.env['LOOPCTL_REQUIRE_KERNEL'] === '1') {
    throw new Error(
      `LOOPCTL_REQUIRE_KERNEL=1, but tests on real devices cannot run: ${reason}; npm run setup says what they need`,
    )
  }
  console.warn(`\n*** TESTS ON REAL DEVICES ARE SKIPPED: ${reason} ***\n`)
  return undefined
}

function loopDevices(): number[] {
  return readdirSync('/sys/block').flatMap((name) => Number(/^loop(\d+)$/.exec(name)?.[1] ?? []))
}

/** The free devices that were made because many were wanted at once: a machine keeps them for ever. */
async function removeAll(numbers: number[]): Promise<void> {
  await using control = await LoopControl.open()
  await Promise.all(
    numbers.map(async (number) => {
      try {
        await control.remove(number)
      } catch (error) {
        // Another program's, which has removed it.
        if (!LoopError.is(error, 'no-such-device')) throw error
      }
    }),
  )
}

function whyNot(): string {
  if (process.platform !== 'linux') return `loop devices exist on Linux only, this is ${process.platform}`
  if (process.getuid?.() !== 0) return 'not run as root'
  try {
    closeSync(openSync('/dev/loop-control', 'r+'))
  } catch (error) {
    return String(error)
  }
  if (!existsSync('/sys/block')) return '/sys is not mounted'
  const missing = missingTools(['devices'])
  return missing.length === 0 ? '' : `${describeMissing(missing)}: npm run setup`
}
