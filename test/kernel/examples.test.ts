import { execFile } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { describe, expect, it } from 'vitest'
import { test } from './support.ts'
import { needs, needsKernel } from '../needs.ts'
import { limit } from '../scale.ts'

const EXAMPLES = fileURLToPath(new URL('../../examples', import.meta.url))
const LIMIT = limit(120_000)

/** Runs it to its end, and answers what it said; nothing of it may be left in the folder. */
async function runExample(folder: string, script: string, ...words: string[]): Promise<string[]> {
  const { stdout, stderr } = await promisify(execFile)(process.execPath, [`${EXAMPLES}/${script}`, ...words], {
    env: { ...process.env, LOOPCTL_EXAMPLE_FOLDER: folder },
    // Before the test's own limit, so that it can take back what it did.
    timeout: LIMIT - limit(20_000),
  })
  expect(stderr).toBe('')
  expect(readdirSync(folder)).toEqual([])
  expect(readFileSync('/proc/self/mountinfo', 'utf8')).not.toContain(folder)
  return stdout.trimEnd().split('\n')
}

it('there is no example that no test runs', () => {
  // support.js is a part of both; test/container has that of the containers.
  expect(readdirSync(EXAMPLES).toSorted()).toEqual(['README.md', 'container', 'failover', 'installer', 'support.js'])
})

describe('installer', () => {
  test.for(['squashfs', 'erofs', 'ext4', 'xfs'] as const)(
    'the CD is ejected under a program that runs from %s',
    { timeout: LIMIT },
    async (filesystem, { folder }) => {
      if (filesystem !== 'ext4') needsKernel(filesystem)
      needs(filesystem === 'squashfs' ? 'mksquashfs' : `mkfs.${filesystem}`)
      const lines = await runExample(folder, 'installer/installer.js', filesystem)
      expect(lines.filter((line) => line.startsWith('  '))).toEqual(['  copy', '  flush', '  verify', '  switch'])
      expect(lines.at(-1)).toMatch(/^\d+ passes, 0 errors; the CD was ejected while the program ran$/)
      // One before, two after.
      expect(Number.parseInt(lines.at(-1) ?? '', 10)).toBeGreaterThanOrEqual(3)
    },
  )
})

describe('failover', () => {
  test.for(['rename', 'unmount'])(
    'the replica takes over when the primary goes away by %s',
    { timeout: LIMIT },
    async (meltdown, { folder }) => {
      needsKernel('squashfs')
      needs('mksquashfs')
      const lines = await runExample(folder, 'failover/failover.js', meltdown)
      expect(lines.at(-1)).toMatch(/^\d+ passes, 0 errors; the primary went away while the program ran$/)
    },
  )
})
