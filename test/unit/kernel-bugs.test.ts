/** docs/kernel-bugs.md against the tests that it names, and the comments that name its bugs. */

import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'

const DOCS = fileURLToPath(new URL('../../docs/kernel-bugs.md', import.meta.url))
const LIB = fileURLToPath(new URL('../../lib', import.meta.url))

const rows = readFileSync(DOCS, 'utf8')
  .split('\n')
  .filter((line) => /^\| K\d/.test(line))
  .map((line) => {
    const [bug = '', , affected = '', remedy = '', tests = ''] = line
      .slice(1, -1)
      .split('|')
      .map((cell) => cell.trim())
    return { bug, affected, remedy, tests: [...tests.matchAll(/\]\(([^)]+)\): `([^`]+)`/g)].map(([, f, n]) => [f, n]) }
  })

/** The literals that are names of tests in a file; of a template, its text. */
function namesIn(file: string): string[] {
  const source = readFileSync(join(dirname(DOCS), file), 'utf8')
  return [...source.matchAll(/\btest\(\s*(['"`])(.+?)\1,/g)].map(([, , name = '']) => name)
}

describe('docs/kernel-bugs.md', () => {
  test('has a row for each bug', () => {
    expect(rows.map(({ bug }) => bug)).toEqual(Array.from({ length: 17 }, (_, i) => `K${i + 1}`))
  })

  test('names tests that there are', () => {
    const named = rows.flatMap(({ tests }) => tests)
    expect(named.length).toBeGreaterThan(8)
    const missing = named.filter(([file = '', name = '']) => !namesIn(file).some((text) => text.includes(name)))
    expect(missing).toEqual([])
  })

  test('a bug that a tested kernel has, and something is done about, has a test', () => {
    const untested = rows.filter(
      ({ affected, remedy, tests }) =>
        !affected.startsWith('none') && !remedy.startsWith('nothing: ') && tests.length === 0,
    )
    expect(untested).toEqual([])
  })

  test('lib/ names each bug that it does something about, and none that is not in the table', () => {
    const files = readdirSync(LIB, { recursive: true, encoding: 'utf8' }).filter((file) => file.endsWith('.ts'))
    const sources = files.map((file) => readFileSync(join(LIB, file), 'utf8'))
    const named = new Set(sources.flatMap((source) => source.match(/\bK\d+\b/g) ?? []))
    const done = rows.filter(({ remedy }) => !remedy.startsWith('nothing: ')).map(({ bug }) => bug)
    expect(done.filter((bug) => !named.has(bug))).toEqual([])
    expect([...named].filter((bug) => !rows.some((row) => row.bug === bug))).toEqual([])
  })
})
