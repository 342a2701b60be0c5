/** A bundle of a program with loopctl in it: works where the binary is at its place, or says how to bundle. */

import { execFileSync } from 'node:child_process'
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { build } from 'esbuild'
import { build as roll } from 'rolldown'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const LIMIT = 60_000
const SENTENCE = "loopctl was bundled, and its binary was not: tell the bundler external: ['loopctl']"

let folder = ''

beforeAll(() => {
  expect(existsSync(join(ROOT, 'dist/index.js')), 'npm run build').toBe(true)
  folder = mkdtempSync(join(tmpdir(), 'loopctl-bundle-'))
  mkdirSync(join(folder, 'node_modules'))
  symlinkSync(ROOT, join(folder, 'node_modules/loopctl'))
  writeFileSync(
    join(folder, 'program.mjs'),
    `import { list, LoopError } from 'loopctl'
    list().then(
      (devices) => console.log(JSON.stringify({ works: Array.isArray(devices) })),
      ({ reason, message, hint }) => console.log(JSON.stringify({ reason, message, hint })))`,
  )
})

afterAll(() => {
  rmSync(folder, { recursive: true, force: true })
})

type Format = 'esm' | 'cjs'

/** Each bundles the program into that file. */
const BUNDLERS: Record<string, (file: string, format: Format, external: string[]) => Promise<unknown>> = {
  esbuild: (outfile, format, external) =>
    build({
      entryPoints: [join(folder, 'program.mjs')],
      outfile,
      format,
      external,
      platform: 'node',
      bundle: true,
      minify: true,
      logLevel: 'silent',
    }),
  rolldown: (file, format, external) =>
    roll({
      input: join(folder, 'program.mjs'),
      external,
      platform: 'node',
      output: { file, format, minify: true },
      logLevel: 'silent',
    }),
}

function run(file: string): unknown {
  return JSON.parse(execFileSync(process.execPath, [file], { encoding: 'utf8', cwd: tmpdir() }))
}

const ways = Object.keys(BUNDLERS).flatMap((bundler) =>
  (['esm', 'cjs'] as const).map((format) => ({ bundler, format, extension: format === 'esm' ? 'mjs' : 'cjs' })),
)

describe.for(ways)('a bundle by $bundler, $format', ({ bundler, format, extension }) => {
  test("with external: ['loopctl'] works", { timeout: LIMIT }, async () => {
    const file = join(folder, `${bundler}/external.${extension}`)
    await BUNDLERS[bundler]?.(file, format, ['loopctl'])
    expect(run(file)).toEqual({ works: true })
  })

  test('without it says so, and takes no addon of another program', { timeout: LIMIT }, async () => {
    const file = join(folder, `${bundler}/${format}/out/inside.${extension}`)
    await BUNDLERS[bundler]?.(file, format, [])
    const others = join(folder, bundler, 'build/Release')
    mkdirSync(others, { recursive: true })
    writeFileSync(join(others, 'other.node'), 'no addon')
    expect(run(file)).toEqual({
      reason: 'unsupported-platform',
      message: `ENOTSUP: load: ${SENTENCE}`,
      hint: expect.stringContaining("external: ['loopctl']"),
    })
  })
})

const built = join(ROOT, 'build/Release/loopctl.node')
const binary = `prebuilds/linux-${process.arch}/loopctl.${existsSync('/etc/alpine-release') ? 'musl' : 'glibc'}.node`

test.skipIf(!existsSync(built))('works where the binary is at its place', { timeout: LIMIT }, async () => {
  const file = join(folder, 'placed/a/b/program.mjs')
  await BUNDLERS['esbuild']?.(file, 'esm', [])
  const place = join(folder, 'placed', binary)
  mkdirSync(dirname(place), { recursive: true })
  copyFileSync(built, place)
  expect(run(file)).toEqual({ works: true })
})

test('every binary of the package stands in the table, in full', () => {
  const source = readFileSync(join(ROOT, 'lib/kernel/addon.ts'), 'utf8')
  const named = [...source.matchAll(/new URL\('\.\.\/\.\.\/(prebuilds\/[^']+)', import\.meta\.url\)/g)]
  const wanted = ['arm64', 'x64'].flatMap((arch) =>
    ['glibc', 'musl'].map((libc) => `prebuilds/linux-${arch}/loopctl.${libc}.node`),
  )
  expect(named.map(([, path = '']) => path).toSorted()).toEqual(wanted)
})
