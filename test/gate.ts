/** The one place that decides whether the tests on real devices can run, and says so. */

import { closeSync, existsSync, openSync } from 'node:fs'
import type { TestProject } from 'vitest/node'
import { describeMissing, missingTools } from '../scripts/tools.js'
import { makeOwnDevices } from './own-devices.ts'

declare module 'vitest' {
  interface ProvidedContext {
    /** Why no real device can be had; empty where one can. */
    noKernel: string
    /** The first of the numbers that this run of the tests has for itself; see own-devices.ts. Where there are devices. */
    firstNumber: number
  }
}

export default async function gate(project: TestProject): Promise<(() => Promise<void>) | undefined> {
  const reason = whyNot()
  const missing = missingTools(['tests'])
  if (missing.length > 0 && process.env['LOOPCTL_REQUIRE_KERNEL'] === '1') {
    throw new Error(`LOOPCTL_REQUIRE_KERNEL=1, but ${describeMissing(missing)}: npm run setup`)
  }
  project.provide('noKernel', reason)
  if (reason === '') {
    const { first, remove } = await makeOwnDevices()
    project.provide('firstNumber', first)
    return remove
  }
  if (process.env['LOOPCTL_REQUIRE_KERNEL'] === '1') {
    throw new Error(
      `LOOPCTL_REQUIRE_KERNEL=1, but tests on real devices cannot run: ${reason}; npm run setup says what they need`,
    )
  }
  console.warn(`\n*** TESTS ON REAL DEVICES ARE SKIPPED: ${reason} ***\n`)
  return undefined
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
