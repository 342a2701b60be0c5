/** How the command speaks: one voice for all errors, hints in its own words, and nothing that a terminal obeys. */

import { execFileSync, spawnSync } from 'node:child_process'
import { appendFileSync, closeSync, constants, mkdirSync, openSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach } from '../../lib/index.ts'
import { test } from './support.ts'

const MAIN = join(process.cwd(), 'dist/cli/main.js')
const MiB = 1 << 20

interface Result {
  status: number | null
  stdout: string
  stderr: string
}

function loopctl(...words: string[]): Result {
  return loopctlIn(process.cwd(), ...words)
}

function loopctlIn(cwd: string, ...words: string[]): Result {
  const { status, stdout, stderr } = spawnSync(process.execPath, [MAIN, ...words], { encoding: 'utf8', cwd })
  return { status, stdout, stderr }
}

/** Runs the words with that stdout, which is closed then. */
function writing(words: string, stdout: number): Pick<Result, 'status' | 'stderr'> {
  const { status, stderr } = spawnSync(process.execPath, [MAIN, ...words.split(' ')], {
    encoding: 'utf8',
    stdio: ['ignore', stdout, 'pipe'],
  })
  closeSync(stdout)
  return { status, stderr }
}

/** What stderr has with --json: an object on each line. */
function linesOf({ stderr }: Result): unknown[] {
  const lines = stderr.trimEnd().split('\n')
  return lines.map((line) => JSON.parse(line) as unknown)
}

/** The one error of --json. */
function errorOf({ stdout, stderr }: Result): Record<string, unknown> {
  expect(stdout).toBe('')
  expect(stderr).toMatch(/^[^\n]+\n$/)
  return (JSON.parse(stderr) as { error: Record<string, unknown> }).error
}

describe('a wrong usage', () => {
  test.for<[words: string[], stderr: string]>([
    [['lst'], "loopctl: unknown command 'lst'\nhint: did you mean list?\n"],
    [['frobnicate'], "loopctl: unknown command 'frobnicate'\nhint: loopctl --help shows how it is used\n"],
    [['list', '--al'], "loopctl: unknown option '--al'\nhint: did you mean --all?\n"],
    [['attach'], "loopctl: missing required argument 'file'\nhint: loopctl attach --help shows how it is used\n"],
    [
      ['remove', '1048576'],
      "loopctl: argument '1048576' is invalid. The number of a device is from 0 to 1048575.\nhint: loopctl remove --help shows how it is used\n",
    ],
    [['set', '7'], 'loopctl: there is nothing to set\nhint: loopctl set --help shows what can be set\n'],
    [['run', '/a', '--options', 'noatime', '--', 'true'], 'loopctl: --options goes with --mount\n'],
    [
      ['run', '/a', 'ls', '-r'],
      "loopctl: missing '--' before the command\nhint: write -- before the command: loopctl run FILE -- COMMAND...\n",
    ],
    [
      ['run', '/a', 'ls', '-l'],
      "loopctl: unknown option '-l'\nhint: write -- before the command: loopctl run FILE -- COMMAND...\n",
    ],
    [
      ['set', '7', '--autoclear'],
      'loopctl: argument of --autoclear is missing\nhint: loopctl set --help shows how it is used\n',
    ],
    [['help', 'lst'], "loopctl: unknown command 'lst'\nhint: did you mean list?\n"],
    [['lst', '--help'], "loopctl: unknown command 'lst'\nhint: did you mean list?\n"],
    [['detach'], 'loopctl: name devices, or a file with --file\n'],
    [['detach', '7', '--file', '/a'], 'loopctl: name devices or a file with --file, not both\n'],
    [['create', '', '1M'], 'loopctl: the path of the file must not be empty\n'],
    [['mount', '/a', ''], 'loopctl: the path of the folder must not be empty\n'],
    [
      ['attach', '--partition', 'UUID=x', '/a'],
      'loopctl: argument \'UUID=x\' of --partition is invalid. UUID= must be a UUID, or 1a2b3c4d-05 of an MBR, not "x".\nhint: loopctl attach --help shows how it is used\n',
    ],
    [
      ['attach', '--partition', '2', '--offset', '512', '/a'],
      'loopctl: --partition cannot be had with --offset, --size-limit or --partscan\n',
    ],
    [['attach', '--swappable', '/a'], 'loopctl: --swappable needs --read-only\n'],
    [
      ['attach', '--swappable', '-r', '--overlap', 'reuse', '/a'],
      'loopctl: --overlap cannot be reuse with --swappable\n',
    ],
  ])('%s', ([words, stderr]) => {
    expect(loopctl(...words)).toEqual({ status: 2, stdout: '', stderr })
  })

  test('with --json it is an object, as every error', () => {
    expect(errorOf(loopctl('list', '--json', '--al'))).toEqual({
      name: 'UsageError',
      code: 'ERR_USAGE',
      message: "unknown option '--al'",
      hint: 'did you mean --all?',
    })
  })

  test('without a command, the help comes first', () => {
    const { status, stdout, stderr } = loopctl()
    expect({ status, stdout }).toEqual({ status: 2, stdout: '' })
    expect(stderr).toMatch(/^Usage: loopctl .*\nloopctl: a command is missing\n$/s)
  })
})

describe('what is odd, and allowed', () => {
  const WARNING = {
    code: 'tail-cut',
    message: 'the last 100 bytes of the file are cut off: a device has whole sectors of 512 bytes',
    hint: 'truncate --size=%512 makes it whole sectors, with zeros',
  }
  const TEXT = `loopctl: warning: ${WARNING.message}\nhint: ${WARNING.hint}\n`
  const UNDO: Record<string, readonly string[]> = { attach: ['detach', '--file', 'disk'], mount: ['umount', 'mnt'] }

  test.for<[words: string[]]>([
    [['attach', 'disk']],
    [['mount', 'disk', 'mnt']],
    [['run', 'disk', '--', 'true']],
    [['run', '--mount', 'disk', '--', 'true']],
  ])('of %j is told as errors are, with --json as an object on a line', ([words], { image, folder }) => {
    const file = image('disk', 8 * MiB)
    execFileSync('mkfs.ext4', ['-q', file])
    appendFileSync(file, Buffer.alloc(100))
    mkdirSync(join(folder, 'mnt'))
    const [first = '', ...rest] = words
    const undo = () => {
      const [command, ...undone] = UNDO[first] ?? []
      if (command !== undefined) expect(loopctlIn(folder, command, ...undone)).toMatchObject({ status: 0, stderr: '' })
    }
    const { status, stderr } = loopctlIn(folder, ...words)
    undo()
    expect({ status, stderr }).toEqual({ status: 0, stderr: TEXT })
    const json = loopctlIn(folder, first, '--json', ...rest)
    undo()
    expect({ status: json.status, lines: linesOf(json) }).toEqual({ status: 0, lines: [{ warning: WARNING }] })
  })

  test('a note of run is an object with --json', async ({ image }) => {
    const file = image('disk', MiB)
    const script = 'sleep 30 <"$LOOP_DEVICE" >/dev/null 2>&1 & echo $!'
    const result = loopctl('run', '--json', file, '--', 'sh', '-c', script)
    process.kill(Number(result.stdout), 'SIGKILL')
    expect(result.status).toBe(0)
    expect(linesOf(result)).toEqual([
      {
        note: {
          message: expect.stringMatching(/^\/dev\/loop\d+ is still in use and is detached when that ends: EBUSY: /),
        },
      },
    ])
  })
})

describe('a command that cannot be run', () => {
  test.for<[program: string, status: number, problem: string, code: string]>([
    ['/nowhere/program', 127, 'command not found', 'ENOENT'],
    ['/', 126, 'cannot be started: permission denied', 'EACCES'],
  ])('%s', ([program, status, problem, code], { image }) => {
    const file = image('disk', MiB)
    expect(loopctl('run', file, '--', program)).toEqual({
      status,
      stdout: '',
      stderr: `loopctl: ${program}: ${problem}\n`,
    })
    const json = loopctl('run', '--json', file, '--', program)
    expect(json.status).toBe(status)
    expect(errorOf(json)).toMatchObject({ message: `${program}: ${problem}`, code, path: program })
  })
})

describe('stdout that cannot be written', () => {
  test.for<[words: string]>([['--help'], ['list --help'], ['help list'], ['doctor'], ['--version']])(
    '%s: a full disk is told',
    ([words]) => {
      expect(writing(words, openSync('/dev/full', 'w'))).toEqual({
        status: 1,
        stderr: 'loopctl: ENOSPC: write stdout: no space left on device\n',
      })
    },
  )

  test.for<[words: string]>([['--help'], ['completion'], ['doctor']])(
    '%s: a reader that has gone away is no failure',
    ([words], { folder }) => {
      const path = join(folder, 'pipe')
      execFileSync('mkfifo', [path])
      const reader = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
      const writer = openSync(path, constants.O_WRONLY)
      closeSync(reader)
      expect(writing(words, writer)).toEqual({ status: 0, stderr: '' })
    },
  )
})

describe('a file where a device is wanted', () => {
  test('detach suggests --file, and quotes the name for a shell', ({ folder }) => {
    writeFileSync(join(folder, 'disk.img'), '')
    writeFileSync(join(folder, "it's mine.img"), '')
    const plain = loopctlIn(folder, 'detach', 'disk.img')
    expect(plain.status).toBe(2)
    expect(plain.stderr).toBe(
      'loopctl: disk.img is a file, not a device\nhint: loopctl detach --file disk.img detaches the devices that are attached to it\n',
    )
    const { stderr } = loopctlIn(folder, 'detach', join(folder, "it's mine.img"))
    expect(stderr).toContain(`hint: loopctl detach --file '${folder}/it'\\''s mine.img' detaches`)
  })

  test('the others name list', ({ folder }) => {
    writeFileSync(join(folder, 'disk.img'), '')
    for (const words of [
      ['status', 'disk.img'],
      ['resize', './disk.img'],
      ['set', 'disk.img', '--offset', '0'],
    ]) {
      const { status, stderr } = loopctlIn(folder, ...words)
      expect(status).toBe(2)
      expect(stderr).toMatch(/disk\.img is a file, not a device\nhint: loopctl list .*disk\.img shows the devices/)
    }
  })
})

describe('hints', () => {
  test('of an overlap: every way out, as options', async ({ image }) => {
    const file = image('disk', MiB)
    await using device = await attach(file)
    for (const words of [
      ['attach', file],
      ['run', file, '--', 'true'],
    ]) {
      expect(loopctl(...words).stderr).toMatch(/^hint: .*--overlap reuse.*--overlap allow$/m)
    }
    expect(errorOf(loopctl('attach', '--json', file))['hint']).toContain('--overlap reuse')
    const { stdout } = loopctl('attach', '--overlap', 'reuse', file)
    expect(stdout).toBe(`${device.path}\n`)
  })

  test('of a device that is held', async ({ image }) => {
    await using device = await attach(image('disk', MiB))
    const { stderr } = loopctl('detach', '--timeout', '0', device.path)
    expect(stderr).toMatch(/^hint: .*detach with --lazy/m)
  })
})

/** ESC, BEL, a C1 control that begins a sequence, DEL, a bidirectional override, a line separator. */
const HOSTILE = 'x\u001B]0;a\u0007\u009B2J\u007F\u202Egmi\u2066\u200F\u2028'
const UNSAFE = /[^\P{Cc}\n]|\p{Bidi_Control}|[\u2028\u2029]/u

describe('a terminal is given nothing that it obeys', () => {
  test.for<[words: string[]]>([
    [[HOSTILE]],
    [['help', HOSTILE]],
    [[`--${HOSTILE}`]],
    [['attach', `--${HOSTILE}`]],
    [['attach', `/nowhere/${HOSTILE}`]],
    [['attach', '--offset', HOSTILE, '/a']],
    [['attach', '--overlap', HOSTILE, '/a']],
    [['attach', '--partition', HOSTILE, '/nowhere']],
    [['attach', '/a', HOSTILE]],
    [['create', `/nowhere/${HOSTILE}`, '1M']],
    [['detach', HOSTILE]],
    [['detach', '--file', `/nowhere/${HOSTILE}`]],
    [['list', `/nowhere/${HOSTILE}`]],
    [['list', '--output', HOSTILE]],
    [['mount', `/nowhere/${HOSTILE}`, '/mnt']],
    [['partitions', `/nowhere/${HOSTILE}`]],
    [['run', '/nowhere', '--', HOSTILE]],
    [['status', HOSTILE]],
    [['umount', `/nowhere/${HOSTILE}`]],
    [['completion', HOSTILE]],
  ])('%j', ([words]) => {
    for (const more of words.length === 1 ? [[]] : [[], ['--json']]) {
      const [first = '', ...rest] = words
      const { stdout, stderr } = loopctl(first, ...more, ...rest)
      expect(stdout + stderr).not.toBe('')
      expect(stdout + stderr).not.toMatch(UNSAFE)
    }
  })

  test('of the file, reference and partition of a device; JSON means the same', async ({ image }) => {
    const file = image(HOSTILE, MiB)
    const reference = HOSTILE.slice(0, 20)
    await using device = await attach(file, { reference })
    for (const words of [
      ['list', '--output', '+REF'],
      ['list', '--tree', file],
      ['status', device.path],
      ['attach', file],
      ['partitions', file],
    ]) {
      const { stdout, stderr } = loopctl(...words)
      expect(stdout + stderr).not.toMatch(UNSAFE)
    }
    const status = loopctl('status', '--json', device.path).stdout
    expect(status).not.toMatch(UNSAFE)
    expect(JSON.parse(status)).toMatchObject({ backingFile: file, reference })
    const [listed] = JSON.parse(loopctl('list', '--json', file).stdout) as object[]
    expect(listed).toMatchObject({ backingFile: file })
  })
})
