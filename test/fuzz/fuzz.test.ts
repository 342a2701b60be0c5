/** The fuzzer, for a bounded time; its own words say which seed to give it where something is found. */

import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { needs } from '../needs.ts'
import { limit } from '../scale.ts'

const script = fileURLToPath(new URL('partition-tables.mjs', import.meta.url))

test(
  'thousands of mutated partition tables: each is read, and as others read it',
  () => {
    needs('sfdisk', 'partx')
    const words = ['--tables', '5000', '--every', '20', '--seconds', '60']
    const { stdout, stderr, status } = spawnSync(process.execPath, [script, ...words], { encoding: 'utf8' })
    expect(status, stderr).toBe(0)
    expect(stderr).toMatch(/^seed \d+$/m)
    console.log(stderr.trim())
    const { tables, unexpected, seen } = JSON.parse(stdout) as {
      tables: number
      unexpected: number
      seen: Record<string, number>
    }
    expect(unexpected).toBe(0)
    expect(tables).toBeGreaterThan(1000)
    for (const outcome of ['ours: gpt', 'ours: mbr', 'ours: none', 'ours: refused', 'sfdisk: same', 'partx: same']) {
      expect(seen[outcome], outcome).toBeGreaterThan(10)
    }
  },
  limit(120_000),
)
