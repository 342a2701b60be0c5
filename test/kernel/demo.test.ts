/** `npm run demo`: its story, and that nothing of it is left, however it ends. */

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs'
import { constants } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { beforeEach, describe, expect } from 'vitest'
import { Reader } from '../../scripts/demo/reader.js'
import { needs } from '../needs.ts'
import { limit } from '../scale.ts'
import { AS_NOBODY, copyForNobody, OWN_DEV, privately } from './environments.ts'
import { sysfs, test } from './support.ts'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const LONG = { timeout: limit(60_000) }

interface Demo {
  child: ChildProcess
  /** Until it has said that, on either output. */
  said: (text: string) => Promise<void>
  end: Promise<{ code: number | null; stdout: string; stderr: string }>
}

/** Starts the demo, behind the words of `enter`, with the folder for its temporary files. */
function start(folder: string, environment: NodeJS.ProcessEnv = {}, enter: string[] = [], root = ROOT): Demo {
  const [program, ...words] = [...enter, process.execPath, join(root, 'scripts/demo.js')]
  const child = spawn(program, words, {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, FORCE_COLOR: undefined, NO_COLOR: undefined, ...environment, TMPDIR: folder },
    // A process group of its own, as a shell gives it one: Ctrl-C goes to all that are in it.
    detached: true,
  })
  const output = { stdout: '', stderr: '' }
  const waiting = new Set<() => void>()
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (text: string) => {
      output[name] += text
      for (const look of waiting) look()
    })
  }
  const end = once(child, 'close').then(([code]) => {
    // Another test's mount namespace can have got a copy of the mount: that is waited for, and said.
    const stderr = output.stderr.replaceAll(/^waiting for process .*\n/gm, '')
    return { code: code as number | null, stdout: output.stdout, stderr }
  })
  const said = (text: string) =>
    new Promise<void>((resolve, reject) => {
      const look = () => {
        if (output.stdout.includes(text) || output.stderr.includes(text)) resolve()
      }
      waiting.add(look)
      look()
      void end.then(() => reject(new Error(`the demo ended without saying ${text}: ${JSON.stringify(output)}`)))
    })
  return { child, said, end }
}

/** sysfs, the mount table, the folder and /proc are the witnesses. */
function expectNothingLeft(folder: string): void {
  const isOurs = (path: string | undefined) => path?.startsWith(`${folder}/`) === true
  const numbers = readdirSync('/sys/block').flatMap((name) => /^loop(\d+)$/.exec(name)?.[1] ?? [])
  const files = numbers.map((number) => sysfs(Number(number), 'loop/backing_file'))
  expect(files.filter(isOurs)).toEqual([])
  expect(readFileSync('/proc/self/mountinfo', 'utf8')).not.toContain(folder.replaceAll(' ', '\\040'))
  expect(readdirSync(folder)).toEqual([])
  const processes = readdirSync('/proc').filter((name) => /^\d+$/.test(name))
  expect(processes.filter((pid) => isOurs(workingFolderOf(pid)))).toEqual([])
}

function workingFolderOf(pid: string): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/cwd`)
  } catch {
    return undefined
  }
}

async function expectTakenBack(end: Demo['end'], folder: string): Promise<void> {
  const { code, stdout, stderr } = await end
  expect(stderr).toBe('interrupted by SIGINT\neverything was taken back\n')
  expect(code).toBe(128 + constants.signals.SIGINT)
  expect(stdout).not.toContain('left:')
  expectNothingLeft(folder)
}

/** A PATH in which the program is this script, and a folder for temporary files beside. */
function replaceProgram(folder: string, program: string, script: string): { path: string; temporary: string } {
  const [bin, temporary] = [join(folder, 'bin'), join(folder, 'tmp')]
  for (const path of [bin, temporary]) mkdirSync(path)
  writeFileSync(join(bin, program), `#!/bin/sh\n${script}\n`, { mode: 0o755 })
  return { path: `${bin}:${process.env['PATH']}`, temporary }
}

/** The numbers in the one line of the text that has this form. */
function numbersIn(text: string, form: RegExp): number[] {
  const found = form.exec(text)
  expect(found, String(form)).not.toBe(null)
  return (found ?? []).slice(1).map(Number)
}

describe('the program that the demo runs', () => {
  test('counts what it reads, and tells a read that found other bytes', LONG, async ({ folder }) => {
    const path = join(folder, 'file')
    const content = Buffer.alloc(4 << 16, 1)
    writeFileSync(path, content)
    const reader = new Reader(path, content, new AbortController().signal)
    try {
      const first = await reader.passes(3)
      expect(first.reads).toBeGreaterThanOrEqual(12)
      expect(first.errors).toBe(0)
      writeFileSync(path, Buffer.alloc(1 << 16, 2), { flag: 'r+' })
      await expect(reader.passes(2)).rejects.toThrow(/missed \d+ of \d+ reads: .* at 0 there were other bytes/)
    } finally {
      await reader.stop()
    }
    await expect(reader.count()).rejects.toThrow('the program ended: SIGKILL')
  })
})

describe('the demo', () => {
  beforeEach(() => needs('mkfs.ext4'))

  test('tells its story, in 80 columns, without colours where it is piped', LONG, async ({ folder }) => {
    const { code, stdout, stderr } = await start(folder).end
    expect(stderr).toBe('')
    expect(code).toBe(0)
    expectNothingLeft(folder)

    expect(stdout.split('\n').filter((line) => line.length > 80)).toEqual([])
    expect(stdout).not.toContain('\u001B')
    expect(stdout).toMatch(/^ {2}-> written through the filesystem$/m)
    expect(stdout).toContain(`mountPoint: '${folder}/loopctl-demo-`)
    expect(stdout.match(/^ {2}-> detached$/gm)).toHaveLength(2)
    const [readsBefore, errorsBefore] = numbersIn(stdout, /^ {2}-> (\d+) reads, (\d+) errors$/m)
    const [served] = numbersIn(stdout, /^ {2}-> (\d+) MiB came from the new file$/m)
    const [reads, errors] = numbersIn(stdout, /^ {2}-> (\d+) reads, (\d+) errors; the slowest took \d+ ms$/m)
    expect(readsBefore).toBeGreaterThan(0)
    expect([errorsBefore, errors]).toEqual([0, 0])
    // Two passes over 512 blocks after the first file was deleted.
    expect(reads).toBeGreaterThanOrEqual((readsBefore ?? 0) + 2 * 512)
    // The 32 MiB of the file, but for what a page cache can have kept.
    expect(served).toBeGreaterThan(16)
    expect(stdout).toMatch(/^ {5}\/dev\/loop\d+ +58720256 +true +\S+\/hd\/system\.img$/m)
    expect(stdout).toMatch(/^ {5}\/dev\/loop\d+ +58720256 +true +\/dev\/loop\d+$/m)
    expect(stdout).toMatch(/^ {2}-> left: \[\]\n$/m)

    // The code that it shows is the code that it runs, all of it.
    const source = readFileSync(join(ROOT, 'scripts/demo.js'), 'utf8')
    const story = /^async function story\(folder\) \{\n(.*?)^\}/ms.exec(source)?.[1] ?? ''
    const lines = story.split('\n').filter((line) => line !== '' && !line.startsWith("  await step('"))
    expect(lines.length).toBeGreaterThan(40)
    const shown = stdout.split('\n').filter((line) => line.startsWith('     '))
    expect(shown).toEqual(expect.arrayContaining(lines.map((line) => `   ${line}`)))
  })

  const moments = ['\n1. ', '\n5. ', 'on cd/system.img\n', '\n8. ']
  test.for(moments)('interrupted at %j, and again when it knows, leaves nothing', LONG, async (text, { folder }) => {
    // Paths with a blank are written otherwise in the mount table.
    const temporary = join(folder, 'a folder')
    mkdirSync(temporary)
    const { child, said, end } = start(temporary)
    // A negative number is the group: as Ctrl-C does it.
    const interrupt = () => process.kill(-(child.pid ?? NaN), 'SIGINT')
    await said(text)
    interrupt()
    await said('interrupted by SIGINT')
    interrupt()
    await expectTakenBack(end, temporary)
  })

  // In the middle of a step.
  test.for(['mkfs.ext4', 'blockdev'])(
    'interrupted while %s runs, leaves nothing',
    LONG,
    async (program, { folder }) => {
      // -V only asks whether there is one.
      const script = `[ "$1" = -V ] || kill -INT $PPID; PATH=\${PATH#*:}; exec ${program} "$@"`
      const { path, temporary } = replaceProgram(folder, program, script)
      await expectTakenBack(start(temporary, { PATH: path }).end, temporary)
    },
  )

  test('waits for a mount namespace that has a copy of its mount', LONG, async ({ folder }) => {
    const { child, said, end } = start(folder)
    await said('\n7. ')
    const other = spawn('unshare', ['--mount', '--propagation', 'private', 'sh', '-c', 'echo there; read end'])
    await once(other.stdout, 'data')
    expect(readFileSync(`/proc/${other.pid}/mountinfo`, 'utf8')).toContain(folder)
    child.kill('SIGINT')
    await said('whose mount namespace has a copy of')
    expect(readFileSync('/proc/self/mountinfo', 'utf8')).not.toContain(folder)
    other.stdin.end()
    await expectTakenBack(end, folder)
  })

  test('leaves nothing when nobody reads its output any more', LONG, async ({ folder }) => {
    const { child, said, end } = start(folder)
    await said('\n6. ')
    child.stdout?.destroy()
    const { code, stderr } = await end
    expect(stderr).toBe('nobody reads the output any more\neverything was taken back\n')
    expect(code).toBe(1)
    expectNothingLeft(folder)
  })

  test.for(['mkfs.ext4', 'blockdev'])('leaves nothing when %s fails', LONG, async (program, { folder }) => {
    const { path, temporary } = replaceProgram(folder, program, 'echo "no, not today" >&2; exit 3')
    const { code, stderr } = await start(temporary, { PATH: path }).end
    expect(stderr).toMatch(new RegExp(`^${program} .*: no, not today\neverything was taken back\n$`))
    expect(code).toBe(1)
    expectNothingLeft(temporary)
  })

  test('says in one sentence which programs are missing', LONG, async ({ folder }) => {
    // Where programs of root are, it looks whatever the path is.
    const hide = 'for each in /usr/sbin /sbin; do [ -L "$each" ] || mount --bind "$dev" "$each"; done'
    const enter = privately(hide)(folder)
    const { code, stdout, stderr } = await start(folder, { PATH: '/usr/bin:/bin' }, enter).end
    expect(stdout).toBe('')
    expect(stderr).toBe('The demo needs mkfs.ext4, blockdev: install the packages e2fsprogs, util-linux.\n')
    expect(code).toBe(1)
    expectNothingLeft(folder)
  })

  test('says in one sentence that it wants root', LONG, async ({ folder }) => {
    const copy = copyForNobody('scripts')
    try {
      const { code, stdout, stderr } = await start(folder, {}, AS_NOBODY, copy).end
      expect(stdout).toBe('')
      expect(stderr).toBe('The demo attaches and mounts, which only root may: run it with sudo.\n')
      expect(code).toBe(1)
    } finally {
      rmSync(copy, { recursive: true })
    }
  })

  test('says in one sentence that there is no loop driver', LONG, async ({ folder }) => {
    const [dev, temporary] = [join(folder, 'dev'), join(folder, 'tmp')]
    for (const path of [dev, temporary]) mkdirSync(path)
    // A device that is there would be attached to without loop-control.
    const hide = `${OWN_DEV}; rm "$dev"/loop*; mount --move "$dev" /dev; mount -t tmpfs none /sys/block`
    const enter = privately(hide)(dev)
    const { code, stdout, stderr } = await start(temporary, {}, enter).end
    expect(stdout).toBe('')
    expect(stderr).toMatch(/^Loop devices do not work here: .*\.\n$/)
    expect(code).toBe(1)
    expectNothingLeft(temporary)
  })
})
