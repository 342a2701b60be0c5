import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const LIB = join(ROOT, 'lib')

/** The longest file of lib/ that is no table. */
const MOST_LINES = 350

/** Files with one entry after another of the same form, which may be longer. */
const TABLES = new Set(['errors/causes.ts', 'ioctl.ts'])

/** The rooms from the top to the bottom, as CONTRIBUTING.md lists them. A file imports from its own and those below. */
const ROOMS = [
  ...(/^```rooms\n(.*?)^```$/ms.exec(readFileSync(join(ROOT, 'CONTRIBUTING.md'), 'utf8'))?.[1] ?? '').matchAll(
    /^(\S+) /gm,
  ),
].map(([, name = '']) => name)

/** The index in {@link ROOMS}; -1 where the file is in no room. */
function roomOf(file: string): number {
  return ROOMS.findIndex((room) => (room.endsWith('/') ? file.startsWith(room) : file === room))
}

/** The relative specifiers that a source imports from or exports from, types too. */
function specifiersOf(source: string): string[] {
  return [...source.matchAll(/\b(?:from|import)\s*\(?\s*['"](\.{1,2}\/[^'"]+)['"]/g)].map(
    ([, specifier = '']) => specifier,
  )
}

const files = readdirSync(LIB, { recursive: true, withFileTypes: true })
  .filter((entry) => !entry.isDirectory())
  .map((entry) => relative(LIB, join(entry.parentPath, entry.name)))

/** Every file of lib/, and the files that it imports from. */
const imports = new Map(
  files.map((file) => {
    const specifiers = specifiersOf(readFileSync(join(LIB, file), 'utf8'))
    return [file, specifiers.map((specifier) => join(dirname(file), specifier))]
  }),
)

/** A way from a file back to itself; undefined: there is none. */
function findCycle(graph: ReadonlyMap<string, readonly string[]>): string[] | undefined {
  const done = new Set<string>()
  const visit = (file: string, way: readonly string[]): string[] | undefined => {
    if (way.includes(file)) return [...way.slice(way.indexOf(file)), file]
    if (done.has(file)) return undefined
    for (const next of graph.get(file) ?? []) {
      const cycle = visit(next, [...way, file])
      if (cycle) return cycle
    }
    done.add(file)
    return undefined
  }
  for (const file of graph.keys()) {
    const cycle = visit(file, [])
    if (cycle) return cycle
  }
  return undefined
}

describe('the house', () => {
  test('every file of lib/ is in a room, and every room has files', () => {
    expect(files.length).toBeGreaterThan(20)
    expect(files.filter((file) => roomOf(file) < 0)).toEqual([])
    const used = new Set(files.map((file) => ROOMS[roomOf(file)]))
    expect(ROOMS.filter((room) => !used.has(room))).toEqual([])
  })

  test(`no file has more than ${MOST_LINES} lines but a table`, () => {
    const long = files
      .filter((file) => !TABLES.has(file))
      .map((file) => [file, readFileSync(join(LIB, file), 'utf8').split('\n').length - 1] as const)
      .filter(([, lines]) => lines > MOST_LINES)
    expect(long).toEqual([])
  })

  test('every relative import names a file of lib/', () => {
    const missing = [...imports].flatMap(([file, targets]) =>
      targets.filter((target) => !imports.has(target)).map((target) => `${file} -> ${target}`),
    )
    expect(missing).toEqual([])
  })

  test('nobody imports from a room above', () => {
    const upwards = [...imports].flatMap(([file, targets]) =>
      targets.filter((target) => roomOf(target) < roomOf(file)).map((target) => `${file} -> ${target}`),
    )
    expect(upwards).toEqual([])
  })

  test('there is no circle', () => {
    expect(findCycle(imports)).toBe(undefined)
  })

  test('the imports are seen, in every form', () => {
    const source = `
import { a } from './a.ts'
import type { B } from "../b.ts"
import {
  c,
  type C,
} from './c/c.ts'
import * as d from './d.ts'
import './e.ts'
export { f } from './f.ts'
export type { G } from './g.ts'
export * from './h.ts'
const i = await import('./i.ts')
import { j } from 'node:fs'
`
    expect(specifiersOf(source)).toEqual([
      './a.ts',
      '../b.ts',
      './c/c.ts',
      './d.ts',
      './e.ts',
      './f.ts',
      './g.ts',
      './h.ts',
      './i.ts',
    ])
    expect(imports.get('index.ts')).toContain('attach/options.ts')
    expect(imports.get('cli/main.ts')).toEqual(['cli/commands.ts', 'cli/parse.ts', 'cli/terminal.ts'])
    expect(imports.get('kernel/binding.ts')).toEqual(['kernel/addon.ts', 'kernel/observe-calls.ts', 'kernel/addon.ts'])
  })

  test('a circle is seen, however long, and a rhombus is none', () => {
    const graph = { a: ['b', 'c'], b: ['d'], c: ['d'], d: [] }
    expect(findCycle(new Map(Object.entries(graph)))).toBe(undefined)
    expect(findCycle(new Map(Object.entries({ ...graph, d: ['e'], e: ['b'] })))).toEqual(['b', 'd', 'e', 'b'])
    expect(findCycle(new Map(Object.entries({ a: ['a'] })))).toEqual(['a', 'a'])
  })
})
