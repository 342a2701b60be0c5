import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { copyFileSync, mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { beforeEach, describe, expect } from 'vitest'
import type { Report } from '../../bench/run.js'
import { env, needs } from '../needs.ts'
import { test } from './support.ts'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const RUN = join(ROOT, 'bench/run.js')

/** What is there of loop devices, and of folders that a run makes. */
function whatIsThere(): string[] {
  const names = ['/sys/block', '/dev/shm'].flatMap((folder) => readdirSync(folder))
  return names.filter((name) => /^(loop\d|loopctl-bench-)/.test(name)).toSorted()
}

// Its numbers are not looked at: only that it still runs, and leaves nothing.
describe('npm run bench', () => {
  beforeEach(() => needs('cc'))

  test('measures, draws, and leaves nothing', { timeout: 120_000 }, async ({ folder }) => {
    const before = whatIsThere()
    const results = join(folder, 'results.json')
    const disk = join(folder, 'disk')
    mkdirSync(disk)
    const scenarios = ['start', 'attach', 'options', 'status', 'list', 'detach', 'remove', 'contention', 'change']
    const words = ['--rounds', '1', '--devices', '2', '--json', results]
    for (const name of scenarios) words.push('--only', name)
    const run = promisify(execFile)
    const { stderr } = await run(process.execPath, [RUN, ...words], { env: { ...env, TMPDIR: disk } })
    expect(stderr.trimEnd().split('\n')).toEqual(scenarios)
    expect(readdirSync(disk)).toEqual([])
    expect(whatIsThere()).toEqual(before)

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

  test('interrupted, it leaves nothing', { timeout: 60_000 }, async ({ folder }) => {
    const before = whatIsThere()
    const child = spawn(process.execPath, [RUN, '--only', 'detach', '--rounds', '100000'], {
      env: { ...env, TMPDIR: folder },
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    const ended = once(child, 'exit')
    const said = text(child.stderr)
    await once(child.stderr, 'data')
    child.kill('SIGINT')
    expect(await ended).toEqual([130, null])
    expect(await said).toBe('detach\ninterrupted\n')
    expect(readdirSync(folder)).toEqual([])
    expect(whatIsThere()).toEqual(before)
  })
})
