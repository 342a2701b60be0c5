/** The tarball that would be published: what is in it, and that it works where there is no compiler. */

import { execFileSync, spawnSync } from 'node:child_process'
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { test as kernelTest } from '../kernel/support.ts'
import { needs } from '../needs.ts'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const FIXTURES = fileURLToPath(new URL('fixtures', import.meta.url))
const LIMIT = 300_000
const PREBUILDS = ['arm64', 'x64'].flatMap((arch) =>
  ['glibc', 'musl'].map((libc) => `prebuilds/linux-${arch}/loopctl.${libc}.node`),
)

/** Without what npm tells the scripts that it runs. */
const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^npm_/i.test(name)))

let work = ''
let tarball = ''
let project = ''

describe('the package', { timeout: LIMIT }, () => {
  beforeAll(() => {
    const missing = PREBUILDS.filter((file) => !existsSync(join(ROOT, file)))
    expect(missing, 'npm run build:prebuilds').toEqual([])
    work = mkdtempSync(join(tmpdir(), 'loopctl-pack-'))
    execFileSync('npm', ['pack', '--silent', '--ignore-scripts', '--pack-destination', work], { cwd: ROOT, env })
    tarball = join(work, readdirSync(work)[0] ?? '')
    project = install()
  }, LIMIT)

  afterAll(() => {
    rmSync(work, { recursive: true, force: true })
  })

  test('holds the sources of lib/, what is made of them, the documentation, the binaries, and nothing else', () => {
    const sources = readdirSync(join(ROOT, 'lib'), { recursive: true, encoding: 'utf8' })
      .filter((file) => file.endsWith('.ts'))
      .map((file) => file.slice(0, -'.ts'.length))
    const made = readdirSync(join(ROOT, 'dist'), { recursive: true, encoding: 'utf8' }).filter((file) =>
      /\.(?:js(?:\.map)?|cjs|d\.cts)$/.test(file),
    )
    // What the README links to: npm shows it beside the package, and it is read in node_modules too.
    const documents = ['.', 'docs', 'examples'].flatMap((folder) =>
      readdirSync(join(ROOT, folder), { recursive: folder === 'examples', withFileTypes: true })
        .filter((entry) => entry.isFile() && (folder === 'examples' || /\.(?:md|svg)$/.test(entry.name)))
        .map((entry) => join(relative(ROOT, entry.parentPath), entry.name)),
    )
    const wanted = [
      'LICENSE',
      ...documents,
      'man/loopctl.1',
      'package.json',
      ...sources.flatMap((name) => [`lib/${name}.ts`, `dist/${name}.d.ts`, `dist/${name}.d.ts.map`]),
      ...made.map((file) => `dist/${file}`),
      ...PREBUILDS,
    ]
    expect(made).toEqual(expect.arrayContaining(['index.js', 'index.cjs', 'index.d.cts', 'cli/main.js']))
    const packed = execFileSync('tar', ['-tzf', tarball], { encoding: 'utf8' }).trim().split('\n')
    expect(packed.map((file) => file.replace(/^package\//, '')).toSorted()).toEqual(wanted.toSorted())
  })

  test('a user gets node-gyp-build with it, and nothing else', () => {
    const tree = execFileSync('npm', ['ls', '--all', '--parseable'], { cwd: project, encoding: 'utf8', env })
    const names = tree
      .trim()
      .split('\n')
      .slice(1)
      .map((path) => path.split('node_modules/').at(-1) ?? '')
    expect(names.toSorted()).toEqual(['loopctl', 'node-gyp-build'])
  })

  test('links of its pages lead to what is in it, or to how it is worked on', () => {
    const root = join(project, 'node_modules/loopctl')
    const pages = ['README.md', 'CHANGELOG.md', ...readdirSync(join(root, 'docs')).map((name) => `docs/${name}`)]
    for (const page of pages.filter((name) => name.endsWith('.md'))) {
      for (const [, target = ''] of readFileSync(join(root, page), 'utf8').matchAll(/\]\(([^)#]+)/g)) {
        if (/^https?:|(?:^|\/)(?:test\/|scripts\/|bench\/|CONTRIBUTING)/.test(target)) continue
        expect(existsSync(join(root, dirname(page), target)), `${page}: ${target}`).toBe(true)
      }
    }
  })

  test('is small', () => {
    expect(statSync(tarball).size).toBeLessThan(1_200_000)
  })

  test('has no script that package managers would block, and compiles nothing', () => {
    const { scripts, gypfile } = JSON.parse(
      execFileSync('tar', ['-xzOf', tarball, 'package/package.json'], { encoding: 'utf8' }),
    ) as { scripts: Record<string, string>; gypfile: unknown }
    expect(Object.keys(scripts)).not.toEqual(expect.arrayContaining([expect.stringMatching(/^(?:pre|post)?install$/)]))
    // Otherwise npm publish tells the registry that there is one.
    expect(gypfile).toBe(false)
    expect(existsSync(join(project, 'node_modules/loopctl/build'))).toBe(false)
    expect(existsSync(join(project, 'node_modules/.bin/loopctl'))).toBe(true)
  })

  test('says for which machines there is a binary, where there is none for this one', () => {
    const script = `
      Object.defineProperty(process, 'arch', { value: 'riscv64' })
      const { attach, LoopError } = await import('loopctl')
      const error = await attach('disk.img').catch((error) => error)
      console.log(JSON.stringify({ is: LoopError.is(error), reason: error.reason, message: error.message, hint: error.hint }))`
    const output = execFileSync(process.execPath, ['--input-type=module', '-e', script], {
      cwd: project,
      env: { ...env, npm_config_arch: 'riscv64' },
      encoding: 'utf8',
    })
    expect(JSON.parse(output)).toEqual({
      is: true,
      reason: 'unsupported-platform',
      message: expect.stringMatching(
        /no usable binary for linux-riscv64; there is linux-arm64 \(glibc, musl\), linux-x64 \(glibc, musl\): No native build was found/,
      ),
      hint: expect.stringContaining('npx prebuildify --napi --tag-libc && npm pack'),
    })
  })

  const node = process.execPath
  const musl = { LIBC: 'musl', LD_LIBRARY_PATH: 'musl', LD_PRELOAD: 'musl/ld-linux-x86-64.so.2' }
  kernelTest.for([
    { title: 'this Node', command: [node], file: 'linux-x64/loopctl.glibc.node' },
    { title: 'this Node by require()', command: [node], file: 'linux-x64/loopctl.glibc.node', way: 'require' },
    { title: 'Node 22 by require()', runtime: 'node22', file: 'linux-x64/loopctl.glibc.node', way: 'require' },
    { title: 'Node 24', runtime: 'node24', file: 'linux-x64/loopctl.glibc.node' },
    { title: 'Node 26', runtime: 'node26', file: 'linux-x64/loopctl.glibc.node' },
    { title: 'Bun', runtime: 'bun', file: 'linux-x64/loopctl.glibc.node' },
    { title: 'Bun by require()', runtime: 'bun', file: 'linux-x64/loopctl.glibc.node', way: 'require' },
    // Less is not enough for /dev.
    { title: 'Deno', runtime: 'deno', words: ['run', '--allow-all'], file: 'linux-x64/loopctl.glibc.node' },
    {
      title: 'Node for arm64, emulated',
      command: ['qemu-aarch64-static', '-L', '/usr/aarch64-linux-gnu'],
      runtime: 'node-arm64',
      tools: ['qemu-aarch64-static', '/usr/aarch64-linux-gnu/lib/libstdc++.so.6'] as const,
      file: 'linux-arm64/loopctl.glibc.node',
    },
    {
      title: 'Bun for musl',
      runtime: 'bun-musl',
      tools: ['/lib/ld-musl-x86_64.so.1'] as const,
      file: 'linux-x64/loopctl.musl.node',
      variables: musl,
    },
  ])(
    'attaches, changes and detaches on $title',
    { timeout: LIMIT },
    ({ command = [], runtime, tools = [], words = [], file, way = 'import', variables = {} }, { image, folder }) => {
      needs(...tools)
      if (runtime === 'bun-musl') makeMusl()
      const fetched = runtime === undefined ? [] : [fetchRuntime(runtime)]
      const [program = '', ...rest] = [...command, ...fetched, ...words]
      const [cd, disk] = [image('cd.img', 1 << 20, 7), image('disk.img', 1 << 20, 7)]
      const { status, stdout, stderr } = spawnSync(program, [...rest, 'smoke.mjs', way, cd, disk], {
        cwd: project,
        env: { ...env, ...variables },
        encoding: 'utf8',
      })
      expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
      expect(JSON.parse(stdout)).toEqual({
        attached: join(folder, 'cd.img'),
        size: 1 << 20,
        readOnly: true,
        changed: join(folder, 'disk.img'),
        detached: 'detached',
        left: false,
        binary: join(project, 'node_modules/loopctl/prebuilds', file),
      })
    },
  )
})

function fetchRuntime(name: string): string {
  return execFileSync(join(ROOT, 'scripts/runtimes'), [name], { encoding: 'utf8', env }).trim()
}

function which(program: string): string {
  return execFileSync('sh', ['-c', `command -v ${program}`], { encoding: 'utf8' }).trim()
}

/** Into an empty project, with nothing to be found but node, npm and a shell. */
function install(): string {
  const folder = join(work, 'project')
  const bin = join(work, 'bin')
  mkdirSync(folder)
  mkdirSync(bin)
  symlinkSync(process.execPath, join(bin, 'node'))
  symlinkSync(which('npm'), join(bin, 'npm'))
  symlinkSync('/bin/sh', join(bin, 'sh'))
  execFileSync('npm', ['install', '--prefer-offline', '--no-audit', '--no-fund', tarball], {
    cwd: folder,
    env: { ...env, PATH: bin },
    stdio: 'pipe',
  })
  copyFileSync(join(FIXTURES, 'smoke.mjs'), join(folder, 'smoke.mjs'))
  return folder
}

/** musl's loader finds there what Bun for musl needs beside it. */
function makeMusl(): void {
  const folder = join(project, 'musl')
  mkdirSync(folder)
  for (const library of ['libstdc++.so.6', 'libgcc_s.so.1']) {
    copyFileSync(`/usr/lib/x86_64-linux-gnu/${library}`, join(folder, library))
  }
  const loader = join(folder, 'ld-linux-x86-64.so.2')
  execFileSync('gcc', ['-shared', '-fPIC', '-nostdlib', '-o', loader, join(FIXTURES, 'glibc-for-musl.c')])
}
