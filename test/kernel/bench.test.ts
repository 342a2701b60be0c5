import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { copyFileSync, mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { beforeEach, describe, expect, vi } from 'vitest'
import type { Report } from '../../bench/run.js'
import { env, needs } from '../needs.ts'
import { deviceNames, test } from './support.ts'
import { limit } from '../scale.ts'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const RUN = join(ROOT, 'bench/run.js')

/** The folders that runs of the benchmarks make in memory. */
function folders(): string[] {
  return readdirSync('/dev/shm').filter((name) => name.startsWith('loopctl-bench-'))
}

/** Those of somebody else's run go when it ends; ours would stay. */
async function expectNoFolderLeft(before: readonly string[]): Promise<void> {
  const left = new Set(folders().filter((name) => !before.includes(name)))
  const still = () => folders().filter((name) => left.has(name))
  await vi.waitFor(() => expect(still()).toEqual([]), { timeout: limit(60_000), interval: 50 })
}

// Its numbers are not looked at: only that it still runs, and leaves nothing. Other programs can make devices meanwhile.
describe('npm run bench', () => {
  beforeEach(() => needs('cc', 'mkfs.ext4'))

  test('measures, draws, and leaves nothing', { timeout: limit(120_000), retry: 2 }, async ({ folder }) => {
    const before = folders()
    const devices = deviceNames()
    const results = join(folder, 'results.json')
    const disk = join(folder, 'disk')
    mkdirSync(disk)
    const scenarios = [
      'start',
      'attach',
      'garbage',
      'options',
      'mount',
      'status',
      'list',
      'detach',
      'remove',
      'contention',
      'change',
    ]
    const words = ['--rounds', '1', '--devices', '2', '--json', results]
    for (const name of scenarios) words.push('--only', name)
    const run = promisify(execFile)
    const { stderr } = await run(process.execPath, [RUN, ...words], { env: { ...env, TMPDIR: disk } })
    expect(stderr.trimEnd().split('\n')).toEqual(scenarios)
    expect(readdirSync(disk)).toEqual([])
    expect(deviceNames().filter((name) => !devices.includes(name))).toEqual([])
    await expectNoFolderLeft(before)

    const { rows } = JSON.parse(readFileSync(results, 'utf8')) as Report
    expect(rows.map(({ name }) => name)).toEqual(expect.arrayContaining(['status', 'list; 2 attached']))
    for (const { name, results: contestants, comparisons } of rows) {
      expect(contestants.length, name).toBeGreaterThan(0)
      for (const { who, median } of contestants) expect(median, `${name}: ${who}`).toBeTypeOf('number')
      for (const { of, value } of comparisons) expect(value, `${name}: ${of}`).toBeTypeOf('number')
    }

    copyFileSync(join(ROOT, 'docs/benchmarks.md'), join(folder, 'benchmarks.md'))
    await run(process.execPath, [join(ROOT, 'bench/plot.js'), results, folder], { env })
    expect(readFileSync(join(folder, 'benchmarks.md'), 'utf8')).toContain('| list; 2 attached | C |')
    const figures = readdirSync(folder).filter((name) => name.endsWith('.svg'))
    expect(figures).toHaveLength(3)
    for (const name of figures) {
      const figure = readFileSync(join(folder, name), 'utf8')
      expect(figure).toMatch(/^<svg .*<\/svg>\n$/s)
      expect(figure).not.toMatch(/NaN|undefined/)
    }
  })

  test('interrupted, it leaves nothing', { timeout: limit(60_000), retry: 2 }, async ({ folder }) => {
    const before = folders()
    const devices = deviceNames()
    const disk = join(folder, 'disk')
    mkdirSync(disk)
    const child = spawn(process.execPath, [RUN, '--only', 'detach', '--rounds', '100000'], {
      env: { ...env, TMPDIR: disk },
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    const ended = once(child, 'exit')
    const said = text(child.stderr)
    await once(child.stderr, 'data')
    child.kill('SIGINT')
    expect(await ended).toEqual([130, null])
    expect(await said).toBe('detach\ninterrupted\n')
    expect(readdirSync(disk)).toEqual([])
    expect(deviceNames().filter((name) => !devices.includes(name))).toEqual([])
    await expectNoFolderLeft(before)
  })
})
