/** Programs that ask the kernel for any loop device, kept to numbers of the test's own: fixtures/own_numbers.c. */

import { execFileSync } from 'node:child_process'
import { chmodSync, copyFileSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, inject } from 'vitest'
import { findMissing } from '../programs.ts'

const SOURCE = fileURLToPath(new URL('fixtures/own_numbers.c', import.meta.url))
const COUNT = 60

/** Whether programs can be kept to numbers at all. */
export const canOwnNumbers: boolean =
  inject('noKernel') !== '' || findMissing('devices that are made', 'cc').length === 0

let built: string | undefined
afterAll(() => {
  if (built !== undefined) rmSync(built, { recursive: true })
})

/** Compiled when first needed, where every user can read it. */
function library(): string {
  if (built === undefined) {
    built = mkdtempSync(join(tmpdir(), 'loopctl-preload-'))
    chmodSync(built, 0o755)
    execFileSync('cc', ['-O1', '-Wall', '-Wextra', '-shared', '-fPIC', '-o', join(built, 'own_numbers.so'), SOURCE])
  }
  return join(built, 'own_numbers.so')
}

export interface OwnNumbers {
  /** The environment of the program. */
  env: NodeJS.ProcessEnv
  /** The numbers of the devices that it has made so far, in order. */
  made: () => number[]
}

/** Keeps a program to the numbers from the first on. `ledger`: a file that does not exist yet, for what it makes. */
export function keptToNumbers(first: number, ledger: string, count: number = COUNT): OwnNumbers {
  return {
    env: {
      ...process.env,
      // The sanitizers' runtimes want to be the first.
      LD_PRELOAD: [process.env['LD_PRELOAD'], library()].filter(Boolean).join(' '),
      LOOPCTL_TEST_NUMBERS: `${first}-${first + count - 1}`,
      LOOPCTL_TEST_MADE: ledger,
    },
    made: () => (existsSync(ledger) ? readFileSync(ledger, 'utf8').trimEnd().split('\n').map(Number) : []),
  }
}

/** The same for a container that has the folder: what is to be set in its environment. */
export function keptInContainer(first: number, folder: string): Record<string, string> {
  const copy = join(folder, 'own_numbers.so')
  copyFileSync(library(), copy)
  chmodSync(copy, 0o755)
  return { LD_PRELOAD: copy, LOOPCTL_TEST_NUMBERS: `${first}-${first + COUNT - 1}` }
}

/** Of the numbers from the first on, those that have a device, or a node of one or of a partition in /dev. */
export function namesFrom(first: number): { devices: string[]; nodes: string[] } {
  const isOwn = (name: string) => {
    const number = Number(/^loop(\d+)(?:p\d+)?$/.exec(name)?.[1] ?? '-1')
    return number >= first && number < first + COUNT
  }
  return {
    devices: readdirSync('/sys/block').filter(isOwn).toSorted(),
    nodes: readdirSync('/dev').filter(isOwn).toSorted(),
  }
}
