/**
 * What a test needs beside the library and a loop device. Where it is missing the test is skipped, and test/skips.ts
 * tells why at the end of the run; with LOOPCTL_REQUIRE_KERNEL=1 a missing tool is an error.
 */

import { TestRunner } from 'vitest'
import { describeMissing, isThere, PATH, type Tool } from '../scripts/tools.js'
import { LACKS, type LackName } from './kernel-lacks.ts'

/** For the tools: ordinary users have no sbin in their path. */
export const env: NodeJS.ProcessEnv = { ...process.env, PATH, LC_ALL: 'C.UTF-8' }

/** Skips the test that runs where one of these programs or files is missing. Call it in a test, or in `beforeEach`. */
export function needs(...tools: Tool[]): void {
  const missing = tools.filter((tool) => !isThere(tool))
  if (missing.length === 0) return
  const reason = `${describeMissing(missing)}: npm run setup`
  if (process.env['LOOPCTL_REQUIRE_KERNEL'] === '1') throw new Error(`LOOPCTL_REQUIRE_KERNEL=1, but ${reason}`)
  skip(reason)
}

/** Skips the test that runs where the kernel lacks one of these. Call it in a test, or in `beforeEach`. */
export function needsKernel(...names: LackName[]): void {
  for (const name of names) if (!kernelHas(name)) skipForKernel(name)
}

/** Whether the kernel has that, of which it can be told beforehand. */
export function kernelHas(name: LackName): boolean {
  const lack = LACKS[name]
  return !('isLacking' in lack && lack.isLacking())
}

/** Skips the test that runs, which has seen by itself that the kernel lacks this. */
export function skipForKernel(name: LackName): never {
  return skip(LACKS[name].reason)
}

function skip(reason: string): never {
  const test = TestRunner.getCurrentTest()
  if (!test) throw new Error(`not in a test: ${reason}`)
  return test.context.skip(reason)
}
