/**
 * Every block of code in the documentation runs, in a folder prepared as below, and leaves nothing behind; or its fence
 * says why not: ```sh no-run: needs a CD drive
 */

import { execFile, execFileSync, spawnSync } from 'node:child_process'
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest'
import * as loopctl from '../../lib/index.ts'
import * as ioctl from '../../lib/ioctl.ts'
import { env, needs, needsKernel } from '../needs.ts'
import { attachedUnder, test } from './support.ts'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const LIMIT = 60_000
const PAGES = [
  'README.md',
  ...readdirSync(join(ROOT, 'docs'))
    .filter((name) => name.endsWith('.md'))
    .map((name) => `docs/${name}`),
  'examples/README.md',
  'examples/container/README.md',
]

interface Block {
  /** The page and the line. */
  place: string
  language: string
  code: string
  /** Why it is not run. */
  reason?: string
}

function blocksOf(page: string, text: string): Block[] {
  const blocks: Block[] = []
  let current: Block | undefined
  for (const [index, line] of text.split('\n').entries()) {
    const [, info] = /^ *(?:```|~~~)(.*)$/.exec(line) ?? []
    if (info === undefined) {
      if (current) current.code += `${line}\n`
    } else if (current) {
      blocks.push(current)
      current = undefined
    } else {
      const place = `${page}:${index + 1}`
      const [, language = '', reason] = /^(\w+)(?: no-run: (\S.*))?$/.exec(info) ?? []
      if (reason === undefined && !['js', 'ts', 'sh'].includes(language)) {
        throw new Error(`${place}: the fence wants js, ts or sh, or to say why it is not run`)
      }
      current = { place, language, code: '', ...(reason === undefined ? {} : { reason }) }
    }
  }
  if (current) throw new Error(`${current.place}: the block has no end`)
  return blocks
}

/** The code of the `@example` of each function in a source. */
function examplesOf(file: string): [name: string, Block][] {
  const text = readFileSync(join(ROOT, 'lib', file), 'utf8')
  const documented = /\/\*\*((?:(?!\*\/)[^])*?)\*\/\nexport (?:async )?function (\w+)/g
  return [...text.matchAll(documented)].flatMap(([, comment = '', name = '']) => {
    const lines = comment.split('\n').map((line) => line.replace(/^ *\* ?/, ''))
    const code = /^@example\n```ts\n([^]*?)^```$/m.exec(lines.join('\n'))?.[1]
    return code === undefined ? [] : [[name, { place: `lib/${file} ${name}`, language: 'ts', code: importing(code) }]]
  })
}

const modules: Record<string, object> = { 'loopctl': loopctl, 'loopctl/ioctl': ioctl }

/** With what it uses of the library: the page that it is on says where that is from. */
function importing(code: string): string {
  const imports = Object.entries(modules).flatMap(([module, members]) => {
    const used = Object.keys(members).filter((name) => new RegExp(`\\b${name}\\b`).test(code))
    return used.length === 0 ? [] : [`import { ${used.join(', ')} } from '${module}'\n`]
  })
  return imports.join('') + code
}

const examples = new Map(
  readdirSync(join(ROOT, 'lib'), { recursive: true, encoding: 'utf8' })
    .filter((file) => file.endsWith('.ts'))
    .flatMap(examplesOf),
)

const all = [...PAGES.flatMap((page) => blocksOf(page, readFileSync(join(ROOT, page), 'utf8'))), ...examples.values()]
const idle = all.filter(({ reason }) => reason !== undefined)
const scripts = all.filter(({ reason, language }) => reason === undefined && language !== 'sh')
const shell = all.filter(({ reason, language }) => reason === undefined && language === 'sh')

/** Where the scripts are compiled, and find `loopctl` as an installed package. */
const workshop = mkdtempSync(join(tmpdir(), 'loopctl-docs-'))
let complaints = ''

const nameOf = ({ place }: Block) => place.replaceAll(/\W+/g, '-')

beforeAll(() => {
  const write = (name: string, text: string) => {
    mkdirSync(dirname(join(workshop, name)), { recursive: true })
    writeFileSync(join(workshop, name), text, { mode: 0o755 })
  }
  write('package.json', '{ "type": "module" }')
  write('bin/loopctl', `#!/bin/sh\nexec '${process.execPath}' '${ROOT}/dist/cli/main.js' "$@"\n`)
  mkdirSync(join(workshop, 'node_modules'))
  symlinkSync(ROOT, join(workshop, 'node_modules/loopctl'))
  symlinkSync(join(ROOT, 'node_modules/@types'), join(workshop, 'node_modules/@types'))
  for (const block of scripts) write(`src/${nameOf(block)}.${block.language}`, block.code)
  const compilerOptions = {
    target: 'es2023', // without `await using`, which Node has since 24
    lib: ['es2023', 'esnext.disposable'],
    module: 'nodenext',
    moduleDetection: 'force',
    types: ['node'],
    strict: true,
    allowJs: true,
    checkJs: true,
    skipLibCheck: true,
    rootDir: 'src',
    outDir: 'out',
  }
  write('tsconfig.json', JSON.stringify({ compilerOptions, include: ['src'] }))
  const tsc = join(ROOT, 'node_modules/.bin/tsc')
  complaints = spawnSync(tsc, ['--project', workshop, '--pretty', 'false'], { encoding: 'utf8', cwd: workshop }).stdout
}, LIMIT)

afterAll(() => rmSync(workshop, { recursive: true }))

/** What the pages may take for granted: an empty disk, an SD card with two partitions, a tree of files, a CD, a hard disk. */
function prepare(folder: string): void {
  needsKernel('squashfs')
  needs('sfdisk', 'mkfs.ext4', 'mkfs.vfat', 'mksquashfs')
  writeFileSync(join(folder, 'disk.img'), '')
  truncateSync(join(folder, 'disk.img'), 64 << 20)
  writeFileSync(join(folder, 'sdcard.img'), '')
  truncateSync(join(folder, 'sdcard.img'), 64 << 20)
  const table = 'label: gpt\nsize=16M,type=U,name=boot\ntype=L,name=root\n'
  execFileSync('sfdisk', ['--quiet', join(folder, 'sdcard.img')], { input: table, env })
  for (const name of ['root', 'cd', 'hd']) mkdirSync(join(folder, name))
  writeFileSync(join(folder, 'root/hostname'), 'example\n')
  const image = join(folder, 'cd/root.squashfs')
  execFileSync('mksquashfs', [join(folder, 'root'), image, '-quiet', '-no-progress'], { env })
}

async function run(folder: string, program: string, ...words: string[]): Promise<void> {
  prepare(folder)
  try {
    const { stderr } = await promisify(execFile)(program, words, {
      cwd: folder,
      // Before the test's own limit, so that what is left is taken back.
      timeout: LIMIT - 10_000,
      env: {
        ...env,
        PATH: `${workshop}/bin:${env['PATH']}`,
        TMPDIR: folder,
        // Node warns of the two together.
        FORCE_COLOR: undefined,
        NO_COLOR: undefined,
      },
    })
    // That a device is shared is what the page asks for.
    expect(stderr.replace(/^loopctl: \S+ was attached already and is shared: [^\n]+\n/gm, '')).toBe('')
    expect(mountsIn(folder)).toEqual([])
    await vi.waitFor(() => expect(attachedUnder(folder), 'devices left attached').toEqual([]), 5_000)
  } finally {
    for (const point of mountsIn(folder)) execFileSync('umount', [point])
    for (const { number, backingFile } of await loopctl.list()) {
      if (backingFile?.startsWith(folder)) await (await loopctl.open(number)).detach()
    }
  }
}

/** The last one first. */
function mountsIn(folder: string): string[] {
  const points = readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .map((line) => line.split(' ')[4] ?? '')
  return points.filter((point) => point.startsWith(folder)).toReversed()
}

describe('the code in the documentation', () => {
  it('names each block that is not run, and why', () => {
    for (const { place, reason } of idle) console.log(`not run: ${place}: ${reason}`)
    expect(idle.length).toBeLessThan(all.length / 2)
  })

  it('there is an example of every function', () => {
    const functions = Object.values(modules).flatMap((members) =>
      Object.entries(members).filter(([, member]) => typeof member === 'function' && !/^class\b/.test(String(member))),
    )
    expect(functions.length).toBeGreaterThan(40)
    expect(functions.map(([name]) => name).filter((name) => !examples.has(name))).toEqual([])
  })

  it('a fence without a language or a reason is found', () => {
    for (const fence of ['```', '```json', '```sh no-run:', '```sh fast']) {
      expect(() => blocksOf('page.md', `${fence}\n\`\`\`\n`), fence).toThrow('page.md:1')
    }
    expect(blocksOf('p', '```js\na\n```\n\n```text no-run: output\nb\n```\n')).toEqual([
      { place: 'p:1', language: 'js', code: 'a\n' },
      { place: 'p:5', language: 'text', code: 'b\n', reason: 'output' },
    ])
  })

  it('the scripts have the right types', () => {
    expect(complaints).toBe('')
  })

  test.for(scripts)('$place', { timeout: LIMIT }, async (block, { folder }) => {
    await run(folder, process.execPath, join(workshop, 'out', `${nameOf(block)}.js`))
  })

  test.for(shell)('$place', { timeout: LIMIT }, async ({ code }, { folder }) => {
    await run(folder, 'sh', '-eu', '-c', code)
  })
})

describe('links in the documentation', () => {
  it.for(PAGES)('%s leads to what is there', (page) => {
    const text = readFileSync(join(ROOT, page), 'utf8')
    for (const [, target = ''] of text.matchAll(/\]\(([^)]+)\)/g)) {
      if (/^https?:/.test(target)) continue
      const [path = '', anchor] = target.split('#')
      const file = path === '' ? join(ROOT, page) : join(ROOT, dirname(page), path)
      expect(spawnSync('test', ['-e', file]).status, target).toBe(0)
      if (anchor === undefined) continue
      const headings = [...readFileSync(file, 'utf8').matchAll(/^#+ (.+)$/gm)].map(([, heading = '']) =>
        heading
          .toLowerCase()
          .replaceAll(/[^\w\- ]/g, '')
          .replaceAll(' ', '-'),
      )
      expect(headings, target).toContain(anchor)
    }
  })
})
