import { type ChildProcessByStdio, execFileSync, spawn, type SpawnOptions } from 'node:child_process'
import {
  chmodSync,
  closeSync,
  constants,
  cpSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  readdirSync,
  readlinkSync,
  readSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { constants as os } from 'node:os'
import { dirname, join } from 'node:path'
import type { Readable, Writable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import { describe, expect, onTestFinished } from 'vitest'
import type { LoopInfo, LoopStatus } from '../../lib/index.ts'
import { attachedNumbers, losetup, loopFileName, sysfs, test, unusedNumber } from './support.ts'
import { limit } from '../scale.ts'

const MiB = 1 << 20
const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const NOBODY = 65_534

interface Result {
  status: number | null
  signal: NodeJS.Signals | null
  stdout: string
  stderr: string
}

/** The command under way; disposed it is gone. */
interface Started extends AsyncDisposable {
  readonly pid: number
  readonly stdin: Writable | null
  /** What it has written to stdout so far. */
  readonly said: () => string
  readonly ended: Promise<Result>
  /** False: it has ended. */
  kill(signal: NodeJS.Signals): boolean
}

function start(words: string[], options: SpawnOptions = {}, root: string = ROOT): Started {
  const child = spawn(process.execPath, [join(root, 'dist/cli/main.js'), ...words], options) as ChildProcessByStdio<
    Writable | null,
    Readable | null,
    Readable | null
  >
  // A test that takes too long is left in the middle.
  onTestFinished(() => void child.kill('SIGKILL'))
  const [stdout, stderr] = [collect(child.stdout), collect(child.stderr)]
  const ended = new Promise<Result>((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (status, signal) => resolve({ status, signal, stdout: stdout(), stderr: stderr() }))
  })
  return {
    pid: child.pid ?? -1,
    stdin: child.stdin,
    said: stdout,
    ended,
    kill: (signal) => child.kill(signal),
    [Symbol.asyncDispose]: async () => {
      child.kill('SIGKILL')
      await ended
    },
  }
}

function collect(stream: Readable | null): () => string {
  const chunks: Buffer[] = []
  stream?.on('data', (chunk: Buffer) => chunks.push(chunk))
  return () => Buffer.concat(chunks).toString()
}

/** Runs the built command to its end. */
function loopctl(...words: string[]): Promise<Result> {
  return start(words).ended
}

/** An end without a word on stderr. */
function clean(stdout = '', status = 0): Result {
  return { status, signal: null, stdout, stderr: '' }
}

/** The lines of a failure's stderr: the message, and the hint where there is one. Nothing else may be in it. */
function failed({ status, stderr }: Result): { message: string; hint: string | undefined } {
  expect(status, stderr).toBe(1)
  const lines = /^loopctl: (?<message>[^\n]+)\n(?:hint: (?<hint>[^\n]+)\n)?$/.exec(stderr)?.groups
  if (!lines) expect.fail(`not one line and a hint: ${stderr}`)
  return { message: lines['message'] ?? '', hint: lines['hint'] }
}

/** The errors of --json, one a line. */
function errorsOf(stderr: string): Record<string, unknown>[] {
  return stderr
    .trimEnd()
    .split('\n')
    .map((line) => (JSON.parse(line) as { error: Record<string, unknown> }).error)
}

/** Looks until it is so: another program that looks at every device can have one open for a moment. */
function eventually<T>(look: () => T) {
  return expect.poll(look, { timeout: limit(10_000), interval: 5 })
}

/** Looks without a break, for what is so for an instant only. */
function lookFor(condition: () => boolean): void {
  for (const end = performance.now() + limit(10_000); !condition();)
    expect(performance.now(), 'never seen').toBeLessThan(end)
}

/** LOOP_CLR_FD sets autoclear where it finds the device held; the command takes it off again at once. */
function hasFoundHeld({ number }: OwnDevice): boolean {
  return sysfs(number, 'loop/autoclear') === '1'
}

function numberOf(path: string): number {
  return Number(/^\/dev\/loop(\d+)$/.exec(path)?.[1])
}

/** Numbers of the devices attached to the file; sysfs is the witness. */
function attachedTo(file: string): number[] {
  return attachedNumbers().filter((number) => sysfs(number, 'loop/backing_file') === file)
}

interface OwnDevice extends AsyncDisposable {
  readonly path: string
  readonly number: number
}

/** Attached by the command; disposed it is detached by the command, where that has not happened yet. */
async function attached(file: string, ...options: string[]): Promise<OwnDevice> {
  const before = attachedTo(file)
  const result = await loopctl('attach', ...options, file)
  const number = attachedTo(file).find((candidate) => !before.includes(candidate)) ?? -1
  const path = `/dev/loop${number}`
  expect(result).toEqual(clean(`${path}\n`))
  // Of the folder, for the file may have been changed or deleted.
  const isOurs = () => sysfs(number, 'loop/backing_file')?.startsWith(dirname(file)) ?? false
  return {
    path,
    number,
    [Symbol.asyncDispose]: async () => {
      if (isOurs()) await loopctl('detach', '--lazy', path)
      await eventually(isOurs).toBe(false)
    },
  }
}

/** A device of the test's own that nobody else is given: its number is far from those that the kernel offers. */
async function made(): Promise<OwnDevice> {
  const number = unusedNumber()
  const path = `/dev/loop${number}`
  expect(await loopctl('add', String(number))).toEqual(clean(`${path}\n`))
  return {
    path,
    number,
    [Symbol.asyncDispose]: async () => {
      if (sysfs(number, 'size') !== undefined) expect(await loopctl('remove', path)).toEqual(clean())
    },
  }
}

/** A named pipe, neither end of which waits. */
interface Pipe extends Disposable {
  readonly reader: number
  readonly writer: number
  closeReader(): void
  closeWriter(): void
}

function pipe(folder: string): Pipe {
  const path = join(folder, 'pipe')
  execFileSync('mkfifo', [path])
  const reader = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
  const writer = openSync(path, constants.O_WRONLY | constants.O_NONBLOCK)
  const open = new Set([reader, writer])
  const close = (fd: number) => {
    if (open.delete(fd)) closeSync(fd)
  }
  return {
    reader,
    writer,
    closeReader: () => close(reader),
    closeWriter: () => close(writer),
    [Symbol.dispose]: () => open.forEach(close),
  }
}

/** Writes until not one byte more goes in; answers how many did. */
function fill(writer: number): number {
  let filled = 0
  for (const size of [65_536, 1]) {
    expect(() => {
      for (;;) filled += writeSync(writer, Buffer.alloc(size))
    }).toThrow('EAGAIN')
  }
  return filled
}

/** Whether the process has a handler of its own for the signal. */
function handles(pid: number, signal: NodeJS.Signals): boolean {
  const caught = /^SigCgt:\s*([0-9a-f]+)$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]
  return ((BigInt(`0x${caught}`) >> BigInt(os.signals[signal] - 1)) & 1n) === 1n
}

/** Whether the process has the file open. */
function hasOpen(pid: number, path: string): boolean {
  const folder = `/proc/${pid}/fd`
  return readdirSync(folder).some((fd) => {
    try {
      return readlinkSync(join(folder, fd)) === path
    } catch {
      return false
    }
  })
}

/** Makes an ext4 of the image, with a file `hello` in it. */
function makeExt4(folder: string, file: string): void {
  const content = join(folder, 'content')
  mkdirSync(content)
  writeFileSync(join(content, 'hello'), 'from the image\n')
  execFileSync('mkfs.ext4', ['-q', '-d', content, file])
}

/** The one line of JSON that a success has on stdout. */
function json(result: Result): unknown {
  expect(result, result.stderr).toMatchObject({ status: 0, stderr: '' })
  expect(result.stdout).toMatch(/^[^\n]+\n$/)
  return JSON.parse(result.stdout)
}

function mkdir(folder: string, name: string): string {
  const path = join(folder, name)
  mkdirSync(path)
  return path
}

/** The command where everybody can read it: the checkout may be in somebody's home. */
function copyForNobody(folder: string): string {
  chmodSync(folder, 0o755)
  const root = mkdir(folder, 'loopctl')
  const parts = ['package.json', 'dist', 'build/Release', 'prebuilds', 'node_modules/node-gyp-build']
  for (const part of parts.filter((name) => existsSync(join(ROOT, name)))) {
    cpSync(join(ROOT, part), join(root, part), { recursive: true, dereference: true })
  }
  execFileSync('chmod', ['-R', 'a+rX', root])
  return root
}

function asNobody(root: string, ...words: string[]): Promise<Result> {
  return start(words, { uid: NOBODY, gid: NOBODY, cwd: root }, root).ended
}

describe('usage', () => {
  const wrong: [what: string, words: string[], message: string][] = [
    ['no command', [], 'Usage: loopctl'],
    ['an unknown command', ['frobnicate'], "unknown command 'frobnicate'"],
    ['an unknown option', ['list', '--frobnicate'], "unknown option '--frobnicate'"],
    ['attach without a file', ['attach'], "missing required argument 'file'"],
    ['attach of two files', ['attach', '/a', '/b'], 'too many arguments'],
    ['run without a command', ['run', '/a'], "missing required argument 'command'"],
    ['run with options of the command before --', ['run', '/a', 'ls', '-l'], "unknown option '-l'"],
    ['detach of nothing', ['detach'], 'name devices, or a file with --file'],
    ['detach of devices and a file', ['detach', '7', '--file', '/a'], 'name devices or a file with --file, not both'],
    ['detach with a timeout that is no number', ['detach', '7', '--timeout', 'soon'], 'A whole number is wanted'],
    ['status without a device', ['status'], "missing required argument 'device'"],
    ['a device that is none', ['status', 'sda'], 'A device is 7, loop7, /dev/loop7 or the path of a link to it.'],
    ['a path that is no loop device', ['status', '/dev/sda'], '/dev/sda is not there.'],
    ['a partition', ['detach', '/dev/loop7p1'], '/dev/loop7p1 is a partition: name its device, /dev/loop7.'],
    ['a device beyond the last', ['status', '1048576'], 'The number of a device is from 0 to 1048575.'],
    ['change without a file', ['change', '7'], "missing required argument 'file'"],
    ['remove of nothing', ['remove'], "missing required argument 'devices'"],
    ['a size with an unknown unit', ['attach', '--offset', '1X', '/a'], 'A size is a whole number of bytes'],
    ['a negative size', ['attach', '--size-limit', '-1', '/a'], 'A size is a whole number of bytes'],
    ['a size with a fraction', ['attach', '-o', '1.5K', '/a'], 'A size is a whole number of bytes'],
    ['an empty size', ['attach', '-o', '', '/a'], 'A size is a whole number of bytes'],
    ['a size beyond all files', ['attach', '-o', '9007199254740992', '/a'], 'more than a file can have'],
    ['a block size that is none', ['attach', '-b', '1000', '/a'], '--block-size must be a power of two'],
    ['an unknown value of --direct-io', ['attach', '--direct-io=x', '/a'], 'it is --direct-io=prefer'],
    ['an unknown value of --overlap', ['attach', '--overlap', 'perhaps', '/a'], 'Allowed choices are'],
    ['a tag of 64 bytes', ['attach', '--reference', 'x'.repeat(64), '/a'], 'at most 63 bytes'],
    ['a number beyond the last', ['attach', '--number', '1048576', '/a'], 'from 0 to 1048575'],
    ['set of nothing', ['set', '7'], 'there is nothing to set'],
    ['set of nothing, as JSON', ['set', '7', '--json'], 'there is nothing to set'],
    ['a switch that is neither on nor off', ['set', '7', '--direct-io', 'maybe'], 'It is on or off'],
    ['a switch without a value', ['set', '7', '--autoclear'], 'argument of --autoclear is missing'],
  ]
  for (const [what, words, message] of wrong) {
    test(`${what}: exit 2, nothing on stdout`, async () => {
      const { stderr, ...result } = await loopctl(...words)
      expect(result, stderr).toEqual({ status: 2, signal: null, stdout: '' })
      expect(stderr).toContain(message)
      expect(stderr).not.toMatch(/^ {4}at /m)
      // One voice for all errors: here below the help, where there is no command.
      expect(stderr).toMatch(/(?:^|\n)(?:loopctl: [^\n]+\n(?:hint: [^\n]+\n)?|\{"error":\{.*\}\}\n)$/)
    })
  }

  test('--help and --version are answers, not errors', async () => {
    const help = await loopctl('--help')
    expect(help).toMatchObject({ status: 0, stderr: '' })
    for (const name of 'attach run detach list status change resize set add remove free watch doctor'.split(' ')) {
      expect(help.stdout).toMatch(new RegExp(`^  ${name} `, 'm'))
    }
    const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string }
    expect(await loopctl('--version')).toEqual(clean(`${version}\n`))
    expect(await loopctl('attach', '--help')).toMatchObject({ status: 0, stderr: '' })
  })
})

describe('attach', () => {
  test('prints the path and nothing else, and the device outlives it', async ({ image }) => {
    const file = image('disk', MiB, 0x41)
    await using device = await attached(file)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
    expect(sysfs(device.number, 'loop/autoclear')).toBe('0')
    expect(losetup(device.path)).toMatchObject({ 'back-file': file, 'autoclear': false, 'ro': false })
    expect(readFileSync(device.path).equals(readFileSync(file))).toBe(true)
  })

  test('--json prints the status that is in effect once it has ended', async ({ image }) => {
    const file = image('disk')
    const status = json(await loopctl('attach', '--json', file)) as LoopStatus
    try {
      expect(status).toMatchObject({ path: `/dev/loop${status.number}`, backingFile: file, autoclear: false })
      expect(json(await loopctl('status', '--json', status.path))).toEqual(status)
    } finally {
      await loopctl('detach', status.path)
    }
  })

  for (const name of ['-r', '--read-only']) {
    test(name, async ({ image }) => {
      await using device = await attached(image('disk'), name)
      expect(sysfs(device.number, 'ro')).toBe('1')
      expect(losetup(device.path)).toMatchObject({ ro: true })
    })
  }

  for (const [offset, sizeLimit] of [
    ['-o', '-s'],
    ['--offset', '--size-limit'],
  ] as const) {
    test(`${offset} and ${sizeLimit}`, async ({ image }) => {
      await using device = await attached(image('disk'), offset, '4K', sizeLimit, '8192')
      expect(sysfs(device.number, 'loop/offset')).toBe('4096')
      expect(sysfs(device.number, 'loop/sizelimit')).toBe('8192')
      expect(sysfs(device.number, 'size')).toBe('16')
    })
  }

  for (const name of ['-b', '--block-size']) {
    test(name, async ({ image }) => {
      await using device = await attached(image('disk'), name, '4K')
      expect(sysfs(device.number, 'queue/logical_block_size')).toBe('4096')
    })
  }

  test('--direct-io does not take the file for its value, nor does it have to come first', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file, '--direct-io')
    expect(sysfs(device.number, 'loop/dio')).toBe('1')

    const after = await loopctl('attach', image('other'), '--direct-io', '-r')
    expect(after).toMatchObject({ status: 0, stderr: '' })
    const path = after.stdout.trimEnd()
    try {
      expect(sysfs(numberOf(path), 'loop/dio')).toBe('1')
      expect(sysfs(numberOf(path), 'ro')).toBe('1')
    } finally {
      await loopctl('detach', path)
    }
  })

  test('--direct-io is an error where it cannot be, --direct-io=prefer is not', async ({ image }) => {
    const file = image('disk')
    const { message, hint } = failed(await loopctl('attach', '--direct-io', '-r', '-o', '100', file))
    expect(message).toMatch(/^EINVAL: LOOP_SET_DIRECT_IO \/dev\/loop\d+: /)
    expect(hint).toContain('4096')
    await eventually(() => attachedTo(file)).toEqual([])
    const buffered = await loopctl('attach', '--direct-io=prefer', '-r', '-o', '100', file)
    const [number = -1] = attachedTo(file)
    try {
      expect(buffered).toMatchObject({ status: 0, stdout: `/dev/loop${number}\n` })
      expect(buffered.stderr).toContain('warning: the backing file takes no direct I/O')
      expect(sysfs(number, 'loop/dio')).toBe('0')
    } finally {
      await loopctl('detach', '--lazy', String(number))
    }
    await using direct = await attached(image('aligned'), '--direct-io=prefer')
    expect(sysfs(direct.number, 'loop/dio')).toBe('1')
  })

  for (const name of ['-P', '--partscan']) {
    test(name, async ({ image }) => {
      await using device = await attached(image('disk'), name)
      expect(sysfs(device.number, 'loop/partscan')).toBe('1')
    })
  }

  for (const [name, prefix] of [
    ['-n', ''],
    ['--number', 'loop'],
    ['--number', '/dev/loop'],
  ] as const) {
    test(`${name} ${prefix}N makes the device where there is none`, async ({ image }) => {
      const number = unusedNumber()
      const file = image('disk')
      try {
        await using device = await attached(file, name, `${prefix}${number}`)
        expect(device.number).toBe(number)
      } finally {
        expect(await loopctl('remove', String(number))).toEqual(clean())
      }
    })
  }

  test('--number that is taken: exit 1, with a hint, and the attachment there stays', async ({ image }) => {
    const file = image('first')
    await using device = await attached(file)
    const second = await loopctl('attach', '-n', String(device.number), image('second'))
    const { message, hint } = failed(second)
    expect(message).toBe(`EBUSY: LOOP_CONFIGURE ${device.path}: the device is attached already, to ${file}`)
    expect(hint).toContain('leave out the number')
    expect(second.stdout).toBe('')
    expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
  })

  test('--overlap and --reference', async ({ image }) => {
    const reference = `${'é'.repeat(31)}!` // 63 bytes
    await using device = await attached(image('disk'), '--overlap', 'allow', '--reference', reference)
    expect(loopFileName(device.path)).toBe(reference)
  })

  test('short options can be written together', async ({ image }) => {
    await using device = await attached(image('disk'), '-rPs4K')
    expect(sysfs(device.number, 'ro')).toBe('1')
    expect(sysfs(device.number, 'loop/partscan')).toBe('1')
    expect(sysfs(device.number, 'loop/sizelimit')).toBe('4096')
  })

  for (const [text, bytes] of Object.entries({
    '4096': 4096,
    '1K': 1024,
    '1k': 1024,
    '1KiB': 1024,
    '1MiB': MiB,
    '1M': MiB,
    '512KB': 512_000,
    '1G': 1024 * MiB,
    '0': 0,
  })) {
    test(`the size ${text} is ${bytes} bytes`, async ({ image }) => {
      await using device = await attached(image('disk', 2 * MiB), '-s', text)
      expect(sysfs(device.number, 'loop/sizelimit')).toBe(String(bytes))
      expect(sysfs(device.number, 'size')).toBe(String(Math.floor(Math.min(bytes || Infinity, 2 * MiB) / 512)))
    })
  }

  test('a file that begins with a dash comes after --', async ({ folder, image }) => {
    const file = image('--direct-io')
    const { ended } = start(['attach', '--', '--direct-io'], { cwd: folder })
    const { status, stdout, stderr } = await ended
    expect(status, stderr).toBe(0)
    const path = stdout.trimEnd()
    try {
      expect(sysfs(numberOf(path), 'loop/backing_file')).toBe(file)
      expect(sysfs(numberOf(path), 'loop/dio')).toBe('0')
    } finally {
      await loopctl('detach', path)
    }
  })

  test('a missing file: exit 1, one line, no stack', async ({ folder }) => {
    const file = join(folder, 'missing')
    const { message, hint } = failed(await loopctl('attach', file))
    expect(message).toBe(`ENOENT: stat ${file}: no such file or directory`)
    expect(hint).toBe(undefined)
  })

  test('--json: an error is an object on stderr', async ({ folder }) => {
    const file = join(folder, 'missing')
    const { status, stdout, stderr } = await loopctl('attach', '--json', file)
    expect({ status, stdout }).toEqual({ status: 1, stdout: '' })
    expect(errorsOf(stderr)).toEqual([
      {
        name: 'LoopError',
        message: `ENOENT: stat ${file}: no such file or directory`,
        code: 'ENOENT',
        errno: -2,
        syscall: 'stat',
        reason: 'no-such-file',
        path: file,
        backingFile: file,
      },
    ])
  })

  test('--json: a wrong value is an error with its code, and exit 2', async () => {
    const { status, stderr } = await loopctl('attach', '--json', '-b', '1000', '/a')
    expect(status).toBe(2)
    expect(errorsOf(stderr)).toMatchObject([{ code: 'ERR_OUT_OF_RANGE', name: 'RangeError' }])
  })

  test('stdout that nobody reads undoes it', async ({ folder, image }) => {
    const file = image('disk')
    using output = pipe(folder)
    output.closeReader()
    const plain = await start(['attach', file], { stdio: ['ignore', output.writer, 'pipe'] }).ended
    expect(failed(plain).message).toBe('EPIPE: write stdout: nobody reads it any more')
    await eventually(() => attachedTo(file)).toEqual([])
    const { status, stderr } = await start(['attach', '--json', file], { stdio: ['ignore', output.writer, 'pipe'] })
      .ended
    expect(status).toBe(1)
    expect(errorsOf(stderr)).toMatchObject([{ code: 'EPIPE' }])
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('stdout that cannot be written undoes it', async ({ image }) => {
    const file = image('disk')
    const full = openSync('/dev/full', 'w')
    const { ended } = start(['attach', file], { stdio: ['ignore', full, 'pipe'] })
    closeSync(full)
    const result = await ended
    expect(failed(result).message).toContain('ENOSPC')
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('the device is kept only once its path has been read out', async ({ folder, image }) => {
    const file = image('disk')
    using output = pipe(folder)
    const filled = fill(output.writer)
    await using command = start(['attach', file], { stdio: ['ignore', output.writer, 'pipe'] })
    output.closeWriter()
    await eventually(() => attachedTo(file).length).toBe(1)
    const [number = -1] = attachedTo(file)
    expect(sysfs(number, 'loop/autoclear')).toBe('1')

    expect(readSync(output.reader, Buffer.alloc(filled))).toBe(filled)
    expect(await command.ended).toMatchObject({ status: 0, stderr: '' })
    const rest = Buffer.alloc(100)
    expect(rest.toString('utf8', 0, readSync(output.reader, rest))).toBe(`/dev/loop${number}\n`)
    expect(sysfs(number, 'loop/autoclear')).toBe('0')
    expect(await loopctl('detach', String(number))).toEqual(clean('detached\n'))
  })

  const ends: [what: string, act: (command: Started, output: Pipe) => unknown, end: Partial<Result>][] = [
    ['the reader goes away', (_, output) => output.closeReader(), { status: 1, signal: null }],
    ['it is killed', (command) => command.kill('SIGKILL'), { status: null, signal: 'SIGKILL' }],
    [
      'it is interrupted, and once more',
      (command) => eventually(() => command.kill('SIGTERM')).toBe(false),
      // a third one can come when the process is past handling it
      {},
    ],
  ]
  for (const [what, act, end] of ends) {
    test(`nothing is left where ${what} before that`, async ({ folder, image }) => {
      const file = image('disk')
      using output = pipe(folder)
      fill(output.writer)
      await using command = start(['attach', file], { stdio: ['ignore', output.writer, 'pipe'] })
      output.closeWriter()
      await eventually(() => attachedTo(file).length).toBe(1)
      await act(command, output)
      expect(await command.ended).toMatchObject(end)
      await eventually(() => attachedTo(file)).toEqual([])
    })
  }

  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    test(`${signal} while it waits: exit 130 without a word, nothing attached`, async ({ image }) => {
      const file = image('disk')
      await using device = await made()
      const held = openSync(device.path, constants.O_RDONLY | constants.O_EXCL)
      try {
        await using command = start(['attach', '-n', String(device.number), file])
        lookFor(() => hasOpen(command.pid, device.path))
        command.kill(signal)
        expect(await command.ended).toEqual(clean('', 130))
      } finally {
        closeSync(held)
      }
      await eventually(() => attachedTo(file)).toEqual([])
    })
  }
})

describe('run', () => {
  test('the command has the device in LOOP_DEVICE and our streams; afterwards it is gone', async ({ image }) => {
    const file = image('disk', 65_536, 0x42)
    const script = 'echo "$LOOP_DEVICE"; cat; head -c 3 "$LOOP_DEVICE" >&2'
    await using command = start(['run', file, '--', 'sh', '-c', script])
    command.stdin?.end('from stdin\n')
    const { status, stdout, stderr } = await command.ended
    expect({ status, stderr }).toEqual({ status: 0, stderr: 'BBB' })
    expect(stdout).toMatch(/^\/dev\/loop\d+\nfrom stdin\n$/)
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('what the command writes is in the file', async ({ image }) => {
    const file = image('disk', 65_536)
    const script = 'printf written | dd of="$LOOP_DEVICE" bs=7 count=1 conv=notrunc status=none'
    expect(await loopctl('run', file, '--', 'sh', '-c', script)).toEqual(clean())
    expect(readFileSync(file).subarray(0, 7).toString()).toBe('written')
  })

  test("takes attach's options, and autoclear is on", async ({ image }) => {
    const script = 'cd /sys/block/${LOOP_DEVICE#/dev/}; cat ro loop/offset loop/sizelimit loop/partscan loop/autoclear'
    const words = ['-r', '-o', '4K', '--size-limit', '8K', '-P', '--direct-io', image('disk')]
    expect(await loopctl('run', ...words, '--', 'sh', '-c', script)).toEqual(clean('1\n4096\n8192\n1\n1\n'))
  })

  for (const [script, status] of [
    ['exit 0', 0],
    ['exit 42', 42],
    ['kill -TERM $$', 'SIGTERM'],
    ['kill -INT $$', 'SIGINT'],
    ['kill -KILL $$', 'SIGKILL'],
    // It would be a core of loopctl.
    ['ulimit -c 0; kill -QUIT $$', 128 + 3],
  ] as const) {
    test(`it ends as \`${script}\` does: ${status}`, async ({ image }) => {
      const file = image('disk', 65_536)
      const end = typeof status === 'number' ? { status, signal: null } : { status: null, signal: status }
      expect(await loopctl('run', file, '--', 'sh', '-c', script)).toEqual({ ...clean(), ...end })
      await eventually(() => attachedTo(file)).toEqual([])
    })
  }

  test('a program that is not there: 127; one that cannot be run: 126; the device is gone', async ({
    folder,
    image,
  }) => {
    const file = image('disk', 65_536)
    const missing = await loopctl('run', file, '--', join(folder, 'missing'))
    expect(missing).toMatchObject({ status: 127, stdout: '' })
    expect(missing.stderr).toMatch(/^loopctl: [^\n]*missing[^\n]*\n$/)
    await eventually(() => attachedTo(file)).toEqual([])
    expect(await loopctl('run', file, '--', file)).toMatchObject({ status: 126, stdout: '' })
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('options after -- belong to the command', async ({ image }) => {
    const words = ['--json', '--direct-io', '-r', '--help', '--version', '--', '--bogus']
    const script = 'cat "/sys/block/${LOOP_DEVICE#/dev/}/ro"; printf "%s\\n" "$@"'
    const result = await loopctl('run', image('disk'), '--', 'sh', '-c', script, 'sh', ...words)
    expect(result).toEqual(clean(`0\n${words.join('\n')}\n`))
  })

  test('an error of its own is one line, and JSON where asked for; the command does not run', async ({ folder }) => {
    const file = join(folder, 'missing')
    const plain = await loopctl('run', file, '--', 'echo', 'ran')
    expect(failed(plain).message).toContain('ENOENT')
    expect(plain.stdout).toBe('')
    const { status, stdout, stderr } = await loopctl('run', '--json', file, '--', 'echo', 'ran')
    expect({ status, stdout }).toEqual({ status: 1, stdout: '' })
    expect(errorsOf(stderr)).toMatchObject([{ code: 'ENOENT', reason: 'no-such-file', path: file }])
  })

  test('a --json of the command does not make its own errors JSON', async ({ folder }) => {
    failed(await loopctl('run', join(folder, 'missing'), '--', 'echo', '--json'))
  })

  for (const signal of ['SIGINT', 'SIGQUIT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'] as const) {
    test(`${signal} reaches the command, whose status is passed on; the device is gone`, async ({ image }) => {
      const file = image('disk', 65_536)
      const script = `
        process.on('${signal}', () => { console.log('got it'); process.exit(7) })
        setTimeout(() => {}, 60_000)
        console.log('ready')`
      await using command = start(['run', file, '--', process.execPath, '-e', script])
      await eventually(command.said).toBe('ready\n')
      // the last that it sets up, which it does when the command runs already
      await eventually(() => handles(command.pid, 'SIGUSR2')).toBe(true)
      expect(attachedTo(file)).toHaveLength(1)
      command.kill(signal)
      expect(await command.ended).toEqual(clean('ready\ngot it\n', 7))
      await eventually(() => attachedTo(file)).toEqual([])
    })
  }

  test('SIGTERM ends a command that does nothing about it, loopctl with it, and the device is gone', async ({
    image,
  }) => {
    const file = image('disk', 65_536)
    await using command = start(['run', file, '--', 'sh', '-c', 'echo ready; exec sleep 60'])
    await eventually(command.said).toBe('ready\n')
    await eventually(() => handles(command.pid, 'SIGUSR2')).toBe(true)
    command.kill('SIGTERM')
    expect(await command.ended).toEqual({ ...clean('ready\n'), status: null, signal: 'SIGTERM' })
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('killed with kill -9, and its command too, it leaves no device', async ({ image }) => {
    const file = image('disk', 65_536)
    await using command = start(['run', file, '--', 'sh', '-c', 'echo $$; exec 3<"$LOOP_DEVICE"; exec sleep 60'])
    await eventually(command.said).toMatch(/^\d+\n$/)
    const pid = Number(command.said())
    try {
      expect(attachedTo(file)).toHaveLength(1)
      command.kill('SIGKILL')
    } finally {
      process.kill(pid, 'SIGKILL')
    }
    expect(await command.ended).toMatchObject({ status: null, signal: 'SIGKILL' })
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('the command inherits no descriptor of the device', async ({ image }) => {
    const script = 'for fd in /proc/$$/fd/*; do readlink "$fd"; done | grep -c "^$LOOP_DEVICE"'
    expect(await loopctl('run', image('disk'), '--', 'sh', '-c', script)).toEqual(clean('0\n', 1))
  })

  test('what the command left mounted keeps the device until it is unmounted, and is told', async ({
    folder,
    image,
  }) => {
    const file = image('disk', 8 * MiB)
    makeExt4(folder, file)
    const mountPoint = mkdir(folder, 'mnt')
    const script = 'mount -o ro "$LOOP_DEVICE" "$1"'
    const result = await loopctl('run', '-r', file, '--', 'sh', '-c', script, 'sh', mountPoint)
    try {
      const [number = -1] = attachedTo(file)
      expect(result).toMatchObject({ status: 0, stdout: '' })
      expect(result.stderr).toMatch(/^loopctl: [^\n]+\n$/)
      expect(result.stderr).toContain(`/dev/loop${number} is still in use`)
      expect(result.stderr).toContain(mountPoint)
      expect(sysfs(number, 'loop/autoclear')).toBe('1')
      expect(readFileSync(join(mountPoint, 'hello'), 'utf8')).toBe('from the image\n')
    } finally {
      execFileSync('umount', [mountPoint])
    }
    await eventually(() => attachedTo(file)).toEqual([])
  })
})

describe('detach', () => {
  test('takes every form of a device, several at once, and says of each that it is detached', async ({ image }) => {
    const files = [image('a'), image('b'), image('c')]
    await using a = await attached(files[0] ?? '')
    await using b = await attached(files[1] ?? '')
    await using c = await attached(files[2] ?? '')
    expect(await loopctl('detach', a.path, `loop${b.number}`, String(c.number))).toEqual(
      clean([a, b, c].map(({ path }) => `${path}: detached\n`).join('')),
    )
    expect(files.flatMap((file) => attachedTo(file))).toEqual([])
  })

  test('one that is free does not keep the others: exit 1, the others are detached', async ({ image }) => {
    const [first, last] = [image('first'), image('last')]
    await using a = await attached(first)
    await using b = await attached(last)
    await using free = await made()
    const { message } = failed(await loopctl('detach', a.path, free.path, b.path))
    expect(message).toBe(`ENXIO: LOOP_CLR_FD ${free.path}: the device has no backing file`)
    expect([...attachedTo(first), ...attachedTo(last)]).toEqual([])
  })

  test('one that is free does not keep the others, not even where nobody reads stderr', async ({ folder, image }) => {
    const file = image('disk')
    await using device = await attached(file)
    await using free = await made()
    using errors = pipe(folder)
    errors.closeReader()
    const { ended } = start(['detach', free.path, device.path], { stdio: ['ignore', 'pipe', errors.writer] })
    errors.closeWriter()
    await ended
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('--json: the results on stdout, each error as a line on stderr', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    await using free = await made()
    const missing = unusedNumber()
    const words = [free.path, device.path, String(missing)]
    const { status, stdout, stderr } = await loopctl('detach', '--json', ...words)
    expect(status).toBe(1)
    expect(JSON.parse(stdout)).toEqual([{ number: device.number, path: device.path, result: 'detached' }])
    expect(errorsOf(stderr)).toMatchObject([
      { code: 'ENXIO', reason: 'not-attached', ioctl: 'LOOP_CLR_FD', path: free.path },
      { code: 'ENOENT', reason: 'no-such-device', syscall: 'open', path: `/dev/loop${missing}` },
    ])
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('a device that is held: exit 1 with the holder and a hint, and it stays as it was', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    const held = openSync(device.path, 'r')
    try {
      const { message, hint } = failed(await loopctl('detach', '--timeout', '0', device.path))
      expect(message).toMatch(new RegExp(`^EBUSY: LOOP_CLR_FD ${device.path}: process ${process.pid} \\(.+\\) has`))
      expect(hint).toContain('detach with --lazy')
      const { status, stdout, stderr } = await loopctl('detach', '--json', '--timeout', '0', device.path)
      expect({ status, stdout }).toEqual({ status: 1, stdout: '[]\n' })
      expect(errorsOf(stderr)).toMatchObject([
        {
          code: 'EBUSY',
          reason: 'in-use',
          holders: expect.arrayContaining([
            expect.objectContaining({ device: device.path, kind: 'process', pid: process.pid }),
          ]),
        },
      ])
      expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
      expect(sysfs(device.number, 'loop/autoclear')).toBe('0')
    } finally {
      closeSync(held)
    }
    expect(attachedTo(file)).toEqual([device.number])
  })

  test('--timeout waits for a holder that goes', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    const held = openSync(device.path, 'r')
    try {
      await using command = start(['detach', '--timeout', '15000', device.path])
      lookFor(() => hasFoundHeld(device))
      closeSync(held)
      expect(await command.ended).toEqual(clean('detached\n'))
    } catch (error) {
      closeSync(held)
      throw error
    }
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('--lazy leaves a device that is held to the kernel, and tells so', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    const held = openSync(device.path, 'r')
    try {
      const result = json(await loopctl('detach', '--lazy', '--json', device.path))
      expect(result).toEqual([{ number: device.number, path: device.path, result: 'deferred' }])
      expect(sysfs(device.number, 'loop/autoclear')).toBe('1')
      expect(attachedTo(file)).toEqual([device.number])
    } finally {
      closeSync(held)
    }
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('--lazy detaches at once what nobody holds', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    const result = json(await loopctl('detach', '--lazy', '--json', device.path))
    expect(result).toEqual([{ number: device.number, path: device.path, result: 'detached' }])
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('--file detaches every device of that file, by whatever path, and no other', async ({ folder, image }) => {
    const [file, other] = [image('disk'), image('other')]
    const link = join(folder, 'link')
    execFileSync('ln', [file, link])
    await using first = await attached(file, '-r')
    await using second = await attached(file, '-r', '-o', '4K')
    await using third = await attached(other)
    expect(new Set(attachedTo(file))).toEqual(new Set([first.number, second.number]))
    const byNumber = [first, second].toSorted((a, b) => a.number - b.number)
    expect(await loopctl('detach', '--file', link)).toEqual(
      clean(byNumber.map(({ path }) => `${path}: detached\n`).join('')),
    )
    await eventually(() => attachedTo(file)).toEqual([])
    expect(attachedTo(other)).toEqual([third.number])
  })

  test('interrupted while it waits: exit 130, the device stays as it was, and so does the next', async ({ image }) => {
    const [first, next] = [image('first'), image('next')]
    await using device = await attached(first)
    await using other = await attached(next)
    const held = openSync(device.path, 'r')
    try {
      await using command = start(['detach', '--timeout', '60000', device.path, other.path])
      lookFor(() => hasFoundHeld(device))
      command.kill('SIGINT')
      expect(await command.ended).toEqual(clean('', 130))
    } finally {
      closeSync(held)
    }
    expect(attachedTo(first)).toEqual([device.number])
    expect(sysfs(device.number, 'loop/autoclear')).toBe('0')
    expect(attachedTo(next)).toEqual([other.number])
  })
})

describe('list', () => {
  test('a file without attachments: nothing, and [] with --json', async ({ image }) => {
    const file = image('disk')
    expect(await loopctl('list', file)).toEqual(clean())
    expect(await loopctl('list', '--json', file)).toEqual(clean('[]\n'))
  })

  test('a missing file is an error', async ({ folder }) => {
    expect(failed(await loopctl('list', join(folder, 'missing'))).message).toContain('ENOENT')
  })

  test('a table of what is attached to the file', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file, '-r', '-P', '-o', '4K', '-s', '64K')
    const { status, stdout, stderr } = await loopctl('list', file)
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    expect(stdout.split('\n').map((line) => line.split(/ {2,}/))).toEqual([
      ['NAME', 'SIZE', 'OFFSET', 'SIZELIMIT', 'LOG-SEC', 'FLAGS', 'BACK-FILE'],
      [
        device.path,
        '65536',
        '4096',
        '65536',
        sysfs(device.number, 'queue/logical_block_size'),
        'read-only,partscan',
        file,
      ],
      [''],
    ])
  })

  test('the table has it among all that are attached', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    const { stdout } = await loopctl('list')
    expect(stdout).toMatch(/^NAME +SIZE +OFFSET +SIZELIMIT +LOG-SEC +FLAGS +BACK-FILE\n/)
    expect(stdout).toMatch(new RegExp(`^${device.path} +${MiB} +0 +0 +\\d+ +- +${file}$`, 'm'))
  })

  test('--json: an array of LoopInfo, as sysfs has them', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file, '-r', '-o', '4K')
    const [all, ofFile] = [await loopctl('list', '--json'), await loopctl('list', '--json', file)]
    const info = {
      number: device.number,
      path: device.path,
      device: sysfs(device.number, 'dev'),
      diskSeq: Number(sysfs(device.number, 'diskseq')),
      attached: true,
      backingFile: file,
      backingDeleted: false,
      offset: 4096,
      sizeLimit: 0,
      size: MiB - 4096,
      blockSize: Number(sysfs(device.number, 'queue/logical_block_size')),
      readOnly: true,
      autoclear: false,
      partscan: false,
      directIO: false,
    } satisfies Omit<LoopInfo, 'device'> & { device: string | undefined }
    expect(json(ofFile)).toEqual([info])
    expect(json(all) as LoopInfo[]).toContainEqual(info)
  })

  test('--all has the free devices too', async () => {
    await using free = await made()
    const all = json(await loopctl('list', '--json', '--all')) as LoopInfo[]
    expect(all.find(({ number }) => number === free.number)).toMatchObject({
      attached: false,
      backingFile: null,
      size: 0,
    })
    const withoutFree = json(await loopctl('list', '--json')) as LoopInfo[]
    expect(withoutFree.find(({ number }) => number === free.number)).toBe(undefined)
    const { stdout } = await loopctl('list', '--all')
    expect(stdout).toMatch(new RegExp(`^${free.path} +0 +0 +0 +512 +- +-$`, 'm'))
  })

  test('a file name cannot write to the terminal what it likes', async ({ image }) => {
    const file = image('a\u001B[31m\nb\u0007')
    const { path, number } = json(await loopctl('attach', '--json', file)) as LoopStatus
    try {
      const { stdout } = await loopctl('list', file)
      expect(stdout.split('\n')).toHaveLength(3)
      expect(stdout).toContain(String.raw`a\x1b[31m\x0ab\x07`)
      expect((await loopctl('status', path)).stdout).toContain(String.raw`a\x1b[31m\x0ab\x07`)
      expect(json(await loopctl('list', '--json', file))).toMatchObject([{ number, backingFile: file }])
    } finally {
      await loopctl('detach', path)
    }
  })

  test('nor can a file name in an error', async ({ folder }) => {
    const { stderr } = await loopctl('list', join(folder, 'a\u001B[31m\nb'))
    expect(stderr).toMatch(/^loopctl: \P{Cc}+\n$/u)
  })

  test('a deleted file is marked', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    rmSync(file)
    const { stdout } = await loopctl('list')
    expect(stdout).toMatch(new RegExp(`^${device.path} .*${file} \\(deleted\\)$`, 'm'))
    expect(await loopctl('detach', device.path)).toEqual(clean('detached\n'))
  })
})

describe('status', () => {
  test('--json: a LoopStatus', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file, '-s', '64K', '--reference', 'a tag')
    const status = json(await loopctl('status', '--json', device.path)) as LoopStatus
    const [info] = json(await loopctl('list', '--json', file)) as LoopInfo[]
    const backingDevice = String(losetup(device.path)?.['back-maj:min']).trim()
    const backingInode = statSync(file, { bigint: true }).ino.toString()
    expect(status).toEqual({ ...info, reference: 'a tag', backingDevice, backingInode, swappable: false, warnings: [] })
    expect(status).toMatchObject({ number: device.number, sizeLimit: 65_536, size: 65_536, autoclear: false })
  })

  test('a line for each property, aligned, in words', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file, '-r')
    const status = json(await loopctl('status', '--json', device.path)) as LoopStatus
    const { status: exit, stdout, stderr } = await loopctl('status', String(device.number))
    expect({ exit, stderr }).toEqual({ exit: 0, stderr: '' })
    const words = stdout
      .trimEnd()
      .split('\n')
      .map((line) => /^(.{21})  (.+)$/.exec(line)?.slice(1) ?? [])
    expect(Object.fromEntries(words.map(([name = '', text]) => [name.trimEnd(), text]))).toEqual({
      'device:': `${device.path} (${status.device})`,
      'disk sequence number:': String(status.diskSeq),
      'backing file:': file,
      'file identity:': `inode ${status.backingInode} of filesystem ${status.backingDevice}`,
      'swappable:': 'no',
      'reference:': 'none',
      'size:': '1048576 bytes (1M)',
      'offset:': '0 bytes',
      'size limit:': 'none, the device ends with the file',
      'logical block size:': '512 bytes',
      'access:': 'read-only',
      'autoclear:': 'off, it stays attached',
      'partition scan:': 'off',
      'direct I/O:': 'off',
    })
    await loopctl('set', device.path, '--autoclear', 'off', '--partscan', '--reference', 'a tag', '--size-limit', '64K')
    const changed = (await loopctl('status', device.path)).stdout
    expect(changed).toContain('size limit:            65536 bytes (64K)\n')
    expect(changed).toContain('reference:             a tag\n')
    expect(changed).toContain('partition scan:        on, the kernel looks for partitions\n')
  })

  test('a free device and a missing one are errors', async () => {
    await using free = await made()
    expect(failed(await loopctl('status', free.path)).message).toContain(`${free.path}: the device has no backing file`)
    const { status, stderr } = await loopctl('status', '--json', `loop${unusedNumber()}`)
    expect(status).toBe(1)
    expect(errorsOf(stderr)).toMatchObject([{ code: 'ENOENT', reason: 'no-such-device' }])
  })
})

describe('change', () => {
  test('another file of the same content', async ({ image }) => {
    const [file, copy] = [image('disk', MiB, 0x41), image('copy', MiB, 0x41)]
    await using device = await attached(file, '-r')
    expect(await loopctl('change', device.path, copy)).toEqual(clean())
    expect(sysfs(device.number, 'loop/backing_file')).toBe(copy)
    expect(json(await loopctl('change', '--json', '--verify', device.path, file))).toMatchObject({
      number: device.number,
      backingFile: file,
    })
    expect(losetup(device.path)).toMatchObject({ 'back-file': file, 'ro': true })
  })

  test('--verify: another content is content-differs, with the place, and nothing is changed', async ({ image }) => {
    const [file, copy] = [image('disk', MiB, 0x41), image('copy', MiB, 0x41)]
    const fd = openSync(copy, 'r+')
    writeSync(fd, 'B', 70_001)
    closeSync(fd)
    await using device = await attached(file, '-r')
    const { message } = failed(await loopctl('change', '--verify', device.path, copy))
    expect(message).toBe(`EILSEQ: read ${copy}: differs from ${file} at byte 70001 of the device`)
    const { stderr } = await loopctl('change', '--json', '--verify', device.path, copy)
    expect(errorsOf(stderr)).toMatchObject([{ code: 'EILSEQ', reason: 'content-differs' }])
    expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
  })

  test('another size is an error with both sizes', async ({ image }) => {
    const file = image('disk', 6144)
    await using device = await attached(file, '-r')
    const { message } = failed(await loopctl('change', device.path, image('larger', 10_240)))
    expect(message).toBe(
      `EINVAL: LOOP_CHANGE_FD ${device.path}: new backing file is 4096 bytes larger (10240, must be 6144)`,
    )
    expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
  })

  test('a writable device is refused, with a hint', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    const { message, hint } = failed(await loopctl('change', device.path, image('copy')))
    expect(message).toContain('EINVAL: LOOP_CHANGE_FD')
    expect(hint).toContain('attach with --read-only')
    expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
  })

  test('refuses a mounted device, whose filesystem can be read as before', async ({ folder, image }) => {
    const file = image('disk', 8 * MiB)
    makeExt4(folder, file)
    const copy = join(folder, 'copy')
    cpSync(file, copy)
    const mountPoint = mkdir(folder, 'mnt')
    await using device = await attached(file, '-r')
    execFileSync('mount', ['-o', 'ro', device.path, mountPoint])
    try {
      const { message, hint } = failed(await loopctl('change', '--verify', device.path, copy))
      expect(message).toContain(`${device.path} is mounted at ${mountPoint} (ext4)`)
      expect(hint).toContain(`unmount ${mountPoint} first`)
      const { status, stderr } = await loopctl('change', '--json', device.path, copy)
      expect(status).toBe(1)
      expect(errorsOf(stderr)).toMatchObject([
        {
          code: 'EBUSY',
          reason: 'would-shut-down-filesystem',
          holders: expect.arrayContaining([expect.objectContaining({ kind: 'mount', mountPoint })]),
        },
      ])
      expect(readFileSync(join(mountPoint, 'hello'), 'utf8')).toBe('from the image\n')
      expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
    } finally {
      execFileSync('umount', [mountPoint])
    }
  })

  test('--force changes it although somebody holds it exclusively', async ({ image }) => {
    const [file, copy] = [image('disk', MiB, 0x41), image('copy', MiB, 0x41)]
    await using device = await attached(file, '-r')
    const held = openSync(device.path, constants.O_RDONLY | constants.O_EXCL)
    try {
      expect(failed(await loopctl('change', device.path, copy)).message).toContain(`process ${process.pid} `)
      expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
      expect(await loopctl('change', '--force', device.path, copy)).toEqual(clean())
      expect(sysfs(device.number, 'loop/backing_file')).toBe(copy)
    } finally {
      closeSync(held)
    }
  })
})

describe('resize', () => {
  test('takes over the new size of the file, and prints it', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    truncateSync(file, 3 * MiB)
    expect(sysfs(device.number, 'size')).toBe(String(MiB / 512))
    expect(await loopctl('resize', device.path)).toEqual(clean(`${3 * MiB}\n`))
    expect(sysfs(device.number, 'size')).toBe(String((3 * MiB) / 512))
    truncateSync(file, 2 * MiB)
    expect(json(await loopctl('resize', '--json', device.path))).toEqual({
      number: device.number,
      path: device.path,
      size: 2 * MiB,
    })
    expect(sysfs(device.number, 'size')).toBe(String((2 * MiB) / 512))
  })
})

describe('set', () => {
  test('--offset and --size-limit', async ({ image }) => {
    await using device = await attached(image('disk'), '--reference', 'kept')
    expect(await loopctl('set', device.path, '--offset', '4K', '--size-limit', '64K')).toEqual(clean())
    expect(sysfs(device.number, 'loop/offset')).toBe('4096')
    expect(sysfs(device.number, 'loop/sizelimit')).toBe('65536')
    expect(sysfs(device.number, 'size')).toBe('128')
    expect(await loopctl('set', device.path, '--size-limit', '0')).toEqual(clean())
    expect(sysfs(device.number, 'loop/offset')).toBe('4096')
    expect(sysfs(device.number, 'size')).toBe(String((MiB - 4096) / 512))
    expect(loopFileName(device.path)).toBe('kept')
  })

  test('--direct-io on and off', async ({ image }) => {
    await using device = await attached(image('disk'))
    expect(await loopctl('set', device.path, '--direct-io', 'on')).toEqual(clean())
    expect(sysfs(device.number, 'loop/dio')).toBe('1')
    expect(await loopctl('set', '--direct-io=off', device.path)).toEqual(clean())
    expect(sysfs(device.number, 'loop/dio')).toBe('0')
  })

  test('--block-size', async ({ image }) => {
    await using device = await attached(image('disk'), '-b', '512')
    expect(await loopctl('set', device.path, '--block-size', '4K')).toEqual(clean())
    expect(sysfs(device.number, 'queue/logical_block_size')).toBe('4096')
    expect(losetup(device.path)).toMatchObject({ 'log-sec': 4096 })
  })

  test('--block-size of a device that is held is an error, and it stays', async ({ image }) => {
    await using device = await attached(image('disk'), '-b', '512')
    const held = openSync(device.path, constants.O_RDONLY | constants.O_EXCL)
    try {
      const { status, stderr } = await loopctl('set', '--json', device.path, '--block-size', '4096')
      expect(status).toBe(1)
      expect(errorsOf(stderr)).toMatchObject([{ code: 'EBUSY', reason: 'in-use' }])
    } finally {
      closeSync(held)
    }
    expect(sysfs(device.number, 'queue/logical_block_size')).toBe('512')
  })

  test('--autoclear on: the device goes with its last user; off: it stays', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    const held = openSync(device.path, 'r')
    try {
      expect(await loopctl('set', device.path, '--autoclear', 'on')).toEqual(clean())
      expect(sysfs(device.number, 'loop/autoclear')).toBe('1')
      expect(await loopctl('set', device.path, '--autoclear', 'off')).toEqual(clean())
      expect(sysfs(device.number, 'loop/autoclear')).toBe('0')
      expect(await loopctl('set', device.path, '--autoclear', 'on')).toEqual(clean())
    } finally {
      closeSync(held)
    }
    await eventually(() => attachedTo(file)).toEqual([])
  })

  test('--partscan and --reference', async ({ image }) => {
    await using device = await attached(image('disk'))
    expect(await loopctl('set', device.path, '--partscan')).toEqual(clean())
    expect(sysfs(device.number, 'loop/partscan')).toBe('1')
    expect(await loopctl('set', device.path, '--reference', 'a tag')).toEqual(clean())
    expect(loopFileName(device.path)).toBe('a tag')
    expect(sysfs(device.number, 'loop/partscan')).toBe('1')
  })

  test('--json: the status after all of it', async ({ image }) => {
    await using device = await attached(image('disk'))
    const words = ['--offset', '8K', '--block-size', '4K', '--direct-io', 'on', '--reference', 'all']
    const status = json(await loopctl('set', '--json', device.path, ...words)) as LoopStatus
    expect(status).toMatchObject({ offset: 8192, blockSize: 4096, directIO: true, reference: 'all' })
    expect(json(await loopctl('status', '--json', device.path))).toEqual(status)
  })

  test('a free device is an error', async () => {
    await using free = await made()
    expect(failed(await loopctl('set', free.path, '--offset', '0')).message).toContain('the device has no backing file')
  })
})

describe('add, remove and free', () => {
  test('add makes the next unused device, and prints it', async () => {
    const { status, stdout, stderr } = await loopctl('add')
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    expect(stdout).toMatch(/^\/dev\/loop\d+\n$/)
    const number = numberOf(stdout.trimEnd())
    try {
      expect(sysfs(number, 'dev')).toMatch(/^7:\d+$/)
    } finally {
      // until then another may have attached something to it
      await eventually(async () => (await loopctl('remove', stdout.trimEnd())).status).toBe(0)
    }
  })

  test('add N makes that device, in every form; a second time it is an error', async () => {
    const number = unusedNumber()
    const path = `/dev/loop${number}`
    for (const form of [String(number), `loop${number}`, path]) {
      expect(await loopctl('add', form)).toEqual(clean(`${path}\n`))
      try {
        expect(sysfs(number, 'size')).toBe('0')
        expect(failed(await loopctl('add', form)).message).toContain(`EEXIST: LOOP_CTL_ADD ${path}: `)
      } finally {
        expect(await loopctl('remove', form)).toEqual(clean())
      }
      expect(sysfs(number, 'size')).toBe(undefined)
    }
  })

  test('--json of add and remove', async () => {
    const number = unusedNumber()
    const device = { number, path: `/dev/loop${number}` }
    expect(json(await loopctl('add', '--json', String(number)))).toEqual(device)
    expect(json(await loopctl('remove', '--json', device.path))).toEqual([device])
    const { status, stdout, stderr } = await loopctl('remove', '--json', device.path)
    expect({ status, stdout }).toEqual({ status: 1, stdout: '[]\n' })
    expect(errorsOf(stderr)).toMatchObject([{ code: 'ENODEV', reason: 'no-such-device', path: device.path }])
  })

  test('remove: one that is attached does not keep the others, and stays attached', async ({ image }) => {
    const file = image('disk')
    await using device = await attached(file)
    await using first = await made()
    await using second = await made()
    const { message, hint } = failed(await loopctl('remove', first.path, device.path, second.path))
    expect(message).toBe(`EBUSY: LOOP_CTL_REMOVE ${device.path}: the device is attached to ${file}`)
    expect(hint).toBe('detach it first')
    expect([first, second].map(({ number }) => sysfs(number, 'size'))).toEqual([undefined, undefined])
    expect(attachedTo(file)).toEqual([device.number])
  })

  test('remove interrupted while it waits: exit 130, and the device stays', async () => {
    await using device = await made()
    const held = openSync(device.path, 'r')
    try {
      await using command = start(['remove', device.path])
      lookFor(() => hasOpen(command.pid, '/dev/loop-control'))
      command.kill('SIGTERM')
      expect(await command.ended).toEqual(clean('', 130))
      expect(sysfs(device.number, 'size')).toBe('0')
    } finally {
      closeSync(held)
    }
  })

  test('free prints a device that is not one of the attached', async ({ image }) => {
    await using device = await attached(image('disk'))
    const { status, stdout, stderr } = await loopctl('free')
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    expect(stdout).toMatch(/^\/dev\/loop\d+\n$/)
    expect(stdout.trimEnd()).not.toBe(device.path)
    const { number, path } = json(await loopctl('free', '--json')) as { number: number; path: string }
    expect(path).toBe(`/dev/loop${number}`)
    expect(number).not.toBe(device.number)
  })
})

describe('without privileges', () => {
  test('list has what others attached', async ({ folder, image }) => {
    const root = copyForNobody(folder)
    const file = image('disk')
    await using device = await attached(file)
    const infos = json(await asNobody(root, 'list', '--json')) as LoopInfo[]
    expect(infos.find(({ number }) => number === device.number)).toMatchObject({ attached: true, backingFile: file })
  })

  test('list tells of a device that cannot be asked for its reference', async ({ folder, image }) => {
    const root = copyForNobody(folder)
    await using device = await attached(image('disk'), '--reference', 'tag')
    const { status, stdout, stderr } = await asNobody(root, 'list', '--output', 'NAME,REF')
    expect(status).toBe(0)
    expect(stdout).toMatch(new RegExp(`^${device.path} +\\?$`, 'm'))
    expect(stderr).toContain(`loopctl: ${device.path} could not be asked: the device may not be opened\n`)
    const asJson = await asNobody(root, 'list', '--json', '--output', 'NAME,REF')
    expect(JSON.parse(asJson.stdout)).toContainEqual({ path: device.path, reference: null })
    expect(asJson.stderr).toContain(`{"note":{"message":"${device.path} could not be asked`)
  })

  test('whatever needs the device is permission, and changes nothing', async ({ folder, image }) => {
    const root = copyForNobody(folder)
    const [file, other] = [image('disk'), image('other')]
    chmodSync(other, 0o666)
    await using device = await attached(file)
    for (const words of [
      ['attach', other],
      ['attach', '-r', other],
      ['run', other, '--', 'echo', 'ran'],
      ['detach', device.path],
      ['status', device.path],
      ['set', device.path, '--autoclear', 'on'],
      ['resize', device.path],
      ['add'],
      ['remove', device.path],
      ['free'],
    ]) {
      const result = await asNobody(root, ...words)
      const { message, hint } = failed(result)
      expect(message).toMatch(/^EACCES: open \/dev\/loop[^ ]*: the node's mode denies it: this process is user 65534/)
      expect(hint).toContain('run as root')
      expect(result.stdout).toBe('')
      const { status, stderr } = await asNobody(root, words[0] ?? '', '--json', ...words.slice(1))
      expect(status).toBe(1)
      expect(errorsOf(stderr)).toMatchObject([{ code: 'EACCES', errno: -13, syscall: 'open', reason: 'permission' }])
    }
    expect(attachedTo(file)).toEqual([device.number])
    expect(sysfs(device.number, 'loop/autoclear')).toBe('0')
    expect(attachedTo(other)).toEqual([])
  })

  test('a file that may be read only is backing-not-writable, before anything else', async ({ folder, image }) => {
    const root = copyForNobody(folder)
    const file = image('disk')
    chmodSync(file, 0o644)
    const { status, stderr } = await asNobody(root, 'attach', '--json', file)
    expect(status).toBe(1)
    expect(errorsOf(stderr)).toMatchObject([{ code: 'EACCES', reason: 'backing-not-writable', path: file }])
  })
})
