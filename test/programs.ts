/** Programs that tests need beside the library. */

import { spawnSync } from 'node:child_process'

/** Ordinary users have no sbin in their path. */
export const env: NodeJS.ProcessEnv = {
  ...process.env,
  PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`,
  LC_ALL: 'C.UTF-8',
}

/** Those that are not there, which is said aloud; with LOOPCTL_REQUIRE_KERNEL=1 it is a failure. */
export function findMissing(what: string, ...programs: string[]): string[] {
  const missing = programs.filter(
    (program) => spawnSync('sh', ['-c', 'command -v "$0"', program], { env }).status !== 0,
  )
  if (missing.length === 0) return missing
  const text = `${what}: no ${missing.join(', ')} (the Debian packages are in .ci/run)`
  if (process.env['LOOPCTL_REQUIRE_KERNEL'] === '1') throw new Error(`LOOPCTL_REQUIRE_KERNEL=1, but ${text}`)
  console.warn(`\n*** TESTS ARE SKIPPED: ${text} ***\n`)
  return missing
}
