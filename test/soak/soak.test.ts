/**
 * `npm run soak`: LOOPCTL_SOAK seconds of everything in random order in one process, beside the model test. What the process
 * holds between the operations has to stay level.
 */

import { execFileSync, spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { expect } from 'vitest'
import { attachedUnder, test } from '../kernel/support.ts'
import { needs } from '../needs.ts'
import { limit } from '../scale.ts'

const MIX = fileURLToPath(new URL('fixtures/mix.mjs', import.meta.url))
const SECONDS = Number(process.env['LOOPCTL_SOAK'])
const SEED = Math.floor(Math.random() * 2 ** 31)
const MiB = 1 << 20

interface Sample {
  /** Operations so far. */
  done: number
  /** Bytes. */
  heap: number
  rss: number
  descriptors: number
  threads: number
}

interface End {
  counts: Record<string, number>
  atStart: Sample
  atRest: Sample
}

function median(samples: Sample[], what: keyof Sample): number {
  const sorted = samples.map((sample) => sample[what]).toSorted((a, b) => a - b)
  return sorted[sorted.length >> 1] ?? Number.NaN
}

test(
  `${SECONDS} s of everything: memory, descriptors and threads stay level; seed ${SEED}`,
  { timeout: limit(120_000 + SECONDS * 1000) },
  ({ folder }) => {
    needs('sfdisk')
    // In memory: LOOP_CONFIGURE flushes the file.
    execFileSync('mount', ['-t', 'tmpfs', 'tmpfs', folder])
    try {
      const words = ['--expose-gc', MIX, folder, String(SECONDS), String(SEED)]
      const { stdout, stderr, status } = spawnSync(process.execPath, words, { encoding: 'utf8', maxBuffer: 64 * MiB })
      expect(status, stderr).toBe(0)
      expect(attachedUnder(folder)).toEqual([])
      const lines = stdout.trim().split('\n')
      const { counts, atStart, atRest } = JSON.parse(lines.pop() ?? '') as End
      const samples = lines.map((line) => JSON.parse(line) as Sample)
      expect(Math.min(...Object.values(counts)), JSON.stringify(counts)).toBeGreaterThan(0)

      // What V8 compiles, and what malloc keeps for each thread, have settled after half of the time.
      const quarter = Math.floor(samples.length / 4)
      expect(quarter, stdout).toBeGreaterThan(2)
      const [early, late] = [samples.slice(2 * quarter, 3 * quarter), samples.slice(-quarter)]
      const operations = median(late, 'done') - median(early, 'done')
      const grown = (what: 'heap' | 'rss') => median(late, what) - median(early, what)
      console.log(
        `soak: ${JSON.stringify(counts)}; in ${operations} operations the heap grew by ${Math.round(grown('heap') / 1024)} KiB`,
        `and the resident set by ${Math.round(grown('rss') / 1024)} KiB; ${Math.max(...samples.map(({ threads }) => threads))} threads at most`,
      )
      expect(grown('heap')).toBeLessThan(MiB)
      expect(grown('rss')).toBeLessThan(16 * MiB)
      expect(new Set(samples.slice(quarter).map(({ descriptors }) => descriptors)).size).toBe(1)
      expect(atRest.threads).toBeLessThanOrEqual(atStart.threads)
    } finally {
      execFileSync('umount', [folder])
    }
  },
)
