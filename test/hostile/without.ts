/** Programs that find less than the kernel has: without.c, compiled when first needed. */

import { execFileSync, spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll } from 'vitest'

const SOURCE = fileURLToPath(new URL('without.c', import.meta.url))
const built = mkdtempSync(join(tmpdir(), 'loopctl-without-'))
const launcher = join(built, 'without')
afterAll(() => rmSync(built, { recursive: true, force: true }))

/** What a filesystem can lack, as without.c calls it. */
export type Lack = 'tmpfile' | 'flags' | 'links'

/** Why none can be had; empty where they can. */
export const whyNot: string = build()

function build(): string {
  try {
    execFileSync('cc', ['-O1', '-Wall', '-Wextra', '-Werror', '-o', launcher, SOURCE], { stdio: 'pipe' })
  } catch (error) {
    return `without.c cannot be compiled: ${String(error)}`
  }
  const { status, stderr } = spawnSync(launcher, ['tmpfile', '--', 'true'], { encoding: 'utf8' })
  return status === 0 ? '' : `no seccomp filter can be had: ${stderr}`
}

if (whyNot !== '') {
  if (process.env['LOOPCTL_REQUIRE_KERNEL'] === '1') throw new Error(`LOOPCTL_REQUIRE_KERNEL=1, but ${whyNot}`)
  console.warn(`\n*** MIGRATIONS TO LESSER FILESYSTEMS ARE NOT TRIED: ${whyNot} ***\n`)
}

/** The command, under a filter where something is lacking. */
export function without(lacks: readonly Lack[], command: readonly string[]): [program: string, words: string[]] {
  const [program = '', ...words] = lacks.length > 0 ? [launcher, lacks.join(), '--', ...command] : command
  return [program, words]
}
