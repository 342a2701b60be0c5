/**
 * Every public function and every command where something is missing: privileges, nodes, /sys. What cannot work says
 * why, as a LoopError, and changes nothing; what the kernel allows works.
 */

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { chmodSync, closeSync, mkdirSync, openSync, readdirSync, rmSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { text } from 'node:stream/consumers'
import { afterAll, beforeAll, describe, expect, inject, onTestFinished } from 'vitest'
import { attach, LoopControl, type LoopDevice, type LoopRef, open } from '../../lib/index.ts'
import {
  AS_NOBODY,
  copyForNobody,
  isForbidden,
  MOUNT_NAMESPACE,
  OWN_DEV,
  privately,
  USER_NAMESPACE,
} from './environments.ts'
import { skipForKernel } from '../needs.ts'
import {
  attachedNumbers,
  contents,
  isIn,
  loopFileName,
  losetup,
  removeDevice,
  sysfs,
  test,
  unusedNumber,
} from './support.ts'
import { limit } from '../scale.ts'

const noKernel = inject('noKernel')
const FIXTURE = 'test/kernel/fixtures/operations.mjs'
const CAP_SYS_ADMIN = 21n

/** The functions as operations.mjs names them, each with what it ends with where nothing is missing. */
const OPERATIONS = {
  'attach': 'ok',
  'attach readOnly': 'ok',
  'attach directIO': 'ok',
  'attach number': 'ok',
  'attach swappable': 'ok',
  'attach allow': 'ok',
  'attach reuse': 'ok',
  'attach taken': 'overlap EBUSY',
  'open': 'ok',
  'open ref': 'ok',
  'open unused': 'ok',
  'list': 'ok',
  'list all': 'ok',
  'find': 'ok',
  'find tag': 'ok',
  'find unconfirmed': 'ok',
  'watch': 'ok',
  'LoopControl.open': 'ok',
  'LoopControl.add': 'ok',
  'LoopControl.remove': 'ok',
  'LoopControl.remove attached': 'in-use EBUSY',
  'LoopControl.getFree': 'ok',
  'status': 'ok',
  'setStatus': 'ok',
  'changeBackingFile': 'ok',
  'migrate': 'ok',
  'refreshCapacity': 'ok',
  'setDirectIO': 'ok',
  'setBlockSize': 'ok',
  'holders': 'ok',
  'flush': 'ok',
  'detach': 'ok',
  'detach lazy': 'ok',
  'detachSync': 'ok',
  'release': 'ok',
  'close': 'ok',
  'detach held': 'in-use EBUSY',
  'detach lazy held': 'ok',
} as const

type Operation = keyof typeof OPERATIONS

/** The commands, and the functions that each stands on: it ends as the first of them that does not succeed. */
const COMMANDS: Record<string, { words: (given: Given) => string[]; does: Operation[] }> = {
  'attach': { words: ({ other }) => ['attach', other], does: ['attach'] },
  'attach -n': { words: ({ other, unused }) => ['attach', '-n', `${unused}`, other], does: ['attach number'] },
  'run': { words: ({ other }) => ['run', other, '--', 'true'], does: ['attach'] },
  'detach': { words: ({ number }) => ['detach', `${number}`], does: ['detach'] },
  'detach --lazy': { words: ({ number }) => ['detach', '--lazy', `${number}`], does: ['detach lazy'] },
  'detach --file': { words: ({ file }) => ['detach', '--file', file], does: ['find', 'detach'] },
  'list': { words: () => ['list'], does: ['list'] },
  'list --all': { words: () => ['list', '--all'], does: ['list all'] },
  'list FILE': { words: ({ file }) => ['list', file], does: ['find unconfirmed'] },
  'status': { words: ({ number }) => ['status', `${number}`], does: ['status'] },
  'change': { words: ({ number, other }) => ['change', `${number}`, other], does: ['changeBackingFile'] },
  'migrate': { words: ({ number, destination }) => ['migrate', `${number}`, destination], does: ['migrate'] },
  'resize': { words: ({ number }) => ['resize', `${number}`], does: ['refreshCapacity'] },
  'set --reference': { words: ({ number }) => ['set', `${number}`, '--reference', 'changed'], does: ['setStatus'] },
  'set --direct-io': { words: ({ number }) => ['set', `${number}`, '--direct-io', 'off'], does: ['setDirectIO'] },
  'set --block-size': { words: ({ number }) => ['set', `${number}`, '--block-size', '4096'], does: ['setBlockSize'] },
  'add': { words: ({ unused }) => ['add', `${unused}`], does: ['LoopControl.add'] },
  'remove': { words: ({ unused }) => ['remove', `${unused}`], does: ['LoopControl.remove'] },
  'free': { words: () => ['free'], does: ['LoopControl.getFree'] },
}

/** Those that only look at a free device. */
const MUST_STAY = new Set(['open unused', 'list all'])
/** Those that are given a number which no device has. */
const MAKES = new Set(['LoopControl.add', 'add'])
/** And those that are given a free device. */
const TAKES_FREE = new Set(['attach number', 'open unused', 'list all', 'LoopControl.remove', 'attach -n', 'remove'])

const CONTROL: Operation[] = [
  'LoopControl.open',
  'LoopControl.add',
  'LoopControl.remove',
  'LoopControl.remove attached',
  'LoopControl.getFree',
]
const WITHOUT_NODES: Operation[] = ['list', 'list all', 'watch', 'find unconfirmed']

interface Environment {
  name: string
  /** What a command is to be put behind. */
  enter: (dev: string) => string[]
  uid: number
  /** Whether CAP_SYS_ADMIN is in effect, if only in a user namespace. */
  admin: boolean
  /** What ends otherwise than where nothing is missing. */
  fails: Partial<Record<Operation, string>>
  /** What is answered otherwise. */
  answers?: Partial<Record<Operation, unknown>>
  /** What the message and the hint of each failure of that reason have to speak of. */
  says?: Record<string, RegExp>
}

function all(outcome: string, ...but: Operation[]): Environment['fails'] {
  const names = Object.keys(OPERATIONS) as Operation[]
  return Object.fromEntries(names.filter((name) => !but.includes(name)).map((name) => [name, outcome]))
}

function each(outcome: string, names: readonly Operation[]): Environment['fails'] {
  return Object.fromEntries(names.map((name) => [name, outcome]))
}

/**
 * Who may read a device may detach it and change its backing file: the kernel asks for no more. But detach() refuses
 * where it could not be taken back. And he may attach read-only to a device that is free: that needs no loop-control.
 */
const READS_NODES: Environment['fails'] = {
  ...each('permission EACCES', ['attach', 'attach directIO', 'attach number', ...CONTROL, 'detach', 'detach held']),
  // With the code of the second try, which is to open it for writing
  setBlockSize: 'permission EACCES',
  ...each('permission EPERM', ['setStatus', 'refreshCapacity', 'setDirectIO', 'release']),
}

const NO_SYSFS = 'unsupported-platform ENOENT'

const ENVIRONMENTS: Environment[] = [
  {
    name: 'nobody',
    enter: () => AS_NOBODY,
    uid: 65_534,
    admin: false,
    fails: all('permission EACCES', ...WITHOUT_NODES),
    says: { permission: /run as root/ },
  },
  {
    name: 'nobody who may read the nodes of devices',
    enter: privately(`${OWN_DEV}; chmod a+r "$dev"/loop[0-9]*; mount --move "$dev" /dev`, ...AS_NOBODY),
    uid: 65_534,
    admin: false,
    fails: READS_NODES,
    says: { permission: /run as root/ },
  },
  {
    name: 'root in a user namespace of root',
    enter: () => USER_NAMESPACE,
    uid: 0,
    admin: true,
    fails: {},
  },
  {
    name: 'root in a user namespace of nobody',
    enter: () => [...AS_NOBODY, ...USER_NAMESPACE],
    uid: 0,
    admin: true,
    fails: all('permission EACCES', ...WITHOUT_NODES),
    says: { permission: /user namespace/ },
  },
  {
    name: 'root in a user namespace of nobody who may read the nodes of devices',
    enter: privately(
      `${OWN_DEV}; chmod a+r "$dev"/loop[0-9]*; mount --move "$dev" /dev`,
      ...AS_NOBODY,
      ...USER_NAMESPACE,
    ),
    uid: 0,
    admin: true,
    // Its CAP_SYS_ADMIN is none for the loop driver
    fails: READS_NODES,
    says: { permission: /user namespace/ },
  },
  {
    name: 'root in a user and a mount namespace of nobody',
    enter: () => [...MOUNT_NAMESPACE, ...AS_NOBODY, ...USER_NAMESPACE, '--mount'],
    uid: 0,
    admin: true,
    fails: all('permission EACCES', ...WITHOUT_NODES),
    says: { permission: /user namespace/ },
  },
  {
    name: 'root without CAP_SYS_ADMIN',
    enter: () => ['setpriv', '--bounding-set', '-sys_admin', '--inh-caps', '-sys_admin'],
    uid: 0,
    admin: false,
    fails: {},
  },
  {
    name: '/dev/loop-control missing',
    enter: privately(`${OWN_DEV}; rm "$dev"/loop-control; mount --move "$dev" /dev`),
    uid: 0,
    admin: true,
    // An attach takes a device that is there.
    fails: each('node-missing ENOENT', CONTROL),
    says: { 'node-missing': /loop-control/ },
  },
  {
    name: '/dev read-only',
    enter: privately('mount --bind /dev /dev; mount -o remount,bind,ro /dev'),
    uid: 0,
    admin: true,
    fails: {},
  },
  {
    name: '/dev read-only and without the nodes of devices',
    enter: privately(`${OWN_DEV}; rm -f "$dev"/loop[0-9]*; mount -o remount,ro "$dev"; mount --move "$dev" /dev`),
    uid: 0,
    admin: true,
    fails: {
      ...all('node-missing ENOENT', ...WITHOUT_NODES, 'find', 'find tag', ...CONTROL),
      // They try to make the node.
      ...each('node-missing EROFS', [
        'attach',
        'attach readOnly',
        'attach directIO',
        'attach number',
        'attach swappable',
        'attach allow',
        'attach reuse',
      ]),
      'attach taken': 'overlap EBUSY',
      'LoopControl.remove attached': 'in-use EBUSY',
    },
    says: { 'node-missing': /mknod/ },
  },
  {
    name: '/sys not mounted',
    enter: privately('umount -l /sys'),
    uid: 0,
    admin: true,
    fails: {
      ...each(NO_SYSFS, [
        'attach reuse',
        'attach taken',
        'list',
        'list all',
        'find',
        'find tag',
        'find unconfirmed',
        'watch',
        'migrate',
      ]),
    },
    // The path of the file is in sysfs alone.
    answers: { status: null },
    says: { 'unsupported-platform': /sysfs is not mounted at \/sys/ },
  },
  {
    name: '/dev mounted nodev',
    enter: privately('mount --bind /dev /dev; mount -o remount,bind,nodev /dev'),
    uid: 0,
    admin: true,
    fails: all('permission EACCES', ...WITHOUT_NODES),
    says: { permission: /nodev/ },
  },
]

/** What an operation is given: a device and files that no other operation has. */
interface Given {
  number: number
  ref: LoopRef
  /** The device is attached read-only to it. */
  file: string
  /** Of the same content. */
  other: string
  destination: string
  /** The number of a free device, or of none. */
  unused: number
}

interface Outcome {
  outcome: string
  value?: unknown
  message?: string
  hint?: string
}

/** Attached devices, free ones, files: one set for each name. Taken away when the test is over. */
class Stage implements AsyncDisposable {
  readonly given: Record<string, Given> = {}
  readonly #folder: string
  readonly #image: (name: string, bytes?: number, fill?: number) => string
  readonly #free: number[] = []
  readonly #kept: LoopDevice[] = []
  readonly #descriptors: number[] = []

  constructor(folder: string, image: (name: string, bytes?: number, fill?: number) => string) {
    chmodSync(folder, 0o755)
    mkdirSync(join(folder, 'dev'))
    this.#folder = folder
    this.#image = image
  }

  /** `fails`: whether it is going to. */
  async build(names: string[], fails: (name: string) => boolean): Promise<void> {
    await using control = await LoopControl.open()
    for (const [i, name] of names.entries()) {
      const place = `place ${i}`
      mkdirSync(join(this.#folder, place))
      const [file = '', other = ''] = ['disk.img', 'other.img'].map((base) =>
        this.#image(join(place, base), 1 << 16, i + 1),
      )
      // Whatever is refused is refused for the device's sake.
      for (const path of [file, other]) chmodSync(path, 0o666)
      chmodSync(dirname(file), 0o777)
      const autoclear = name === 'release'
      const device = await attach(file, { readOnly: true, autoclear, reference: `tag ${name}` })
      const { number, ref } = device
      this.given[name] = { number, ref, file, other, destination: join(dirname(file), 'copy.img'), unused: -1 }
      // It would go
      if (autoclear) this.#kept.push(device)
      else await device.close()
    }
    for (const [name, given] of Object.entries(this.given)) {
      if (MAKES.has(name)) {
        // Above those that are made for the other operations
        given.unused = unusedNumber() + 100
      } else if (TAKES_FREE.has(name)) {
        given.unused = await control.add(unusedNumber())
        // So that nobody removes it meanwhile; what works has to have it for itself.
        if (fails(name) || MUST_STAY.has(name)) this.#descriptors.push(openSync(`/dev/loop${given.unused}`, 'r'))
      }
      if (given.unused >= 0) this.#free.push(given.unused)
    }
  }

  /** Everything about each set that an operation must not change. */
  look(): Record<string, object> {
    const output = execFileSync('losetup', ['--json', '--list', '--output-all'], { encoding: 'utf8' })
    const { loopdevices } = JSON.parse(output) as { loopdevices: { name: string }[] }
    return Object.fromEntries(
      Object.entries(this.given).map(([name, { number, unused, file }]) => {
        const folder = dirname(file)
        const files = readdirSync(folder).map((base) => [base, digest(join(folder, base))] as const)
        return [
          name,
          {
            device: loopdevices.find((device) => device.name === `/dev/loop${number}`),
            files: Object.fromEntries(files),
            attached: attachedTo(folder),
            unused: [sysfs(unused, 'dev'), sysfs(unused, 'loop/backing_file')],
          },
        ]
      }),
    )
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const descriptor of this.#descriptors) closeSync(descriptor)
    await Promise.all(this.#kept.map((device) => device.close()))
    await Promise.all(
      attachedTo(this.#folder).map(async (number) => {
        await using device = await open(number)
        await device.detach({ lazy: true })
      }),
    )
    await Promise.all(this.#free.map(removeDevice))
  }
}

function digest(path: string): string {
  return createHash('sha256').update(contents(path)).digest('hex')
}

/** The devices that are attached to what is in the folder; sysfs is the witness. */
function attachedTo(folder: string): number[] {
  return attachedNumbers().filter((number) => isIn(folder, sysfs(number, 'loop/backing_file')))
}

/** The kernel names a file that was opened in another mount namespace from the root of its filesystem: its inode tells. */
function backingInode(number: number): number {
  return Number(losetup(`/dev/loop${number}`)?.['back-ino'])
}

interface Ended {
  status: number | null
  stdout: string
  stderr: string
}

/** Runs Node in the environment. */
async function run(environment: Environment, folder: string, words: string[], input = ''): Promise<Ended> {
  const [program = '', ...rest] = environment.enter(join(folder, 'dev'))
  const child = spawn(program, [...rest, process.execPath, ...words], { cwd: folder })
  onTestFinished(() => void child.kill('SIGKILL'))
  child.stdin.end(input)
  const [status, stdout, stderr] = await Promise.all([exit(child), text(child.stdout), text(child.stderr)])
  return { status, stdout, stderr }
}

function exit(child: ChildProcess): Promise<number | null> {
  return new Promise((resolve, reject) => {
    child.once('error', reject)
    child.once('close', resolve)
  })
}

function expected(environment: Environment, operation: Operation): string {
  return environment.fails[operation] ?? OPERATIONS[operation]
}

/** Of a command: `ok` or the code. */
function expectedOf(environment: Environment, command: string): string | undefined {
  const ends = COMMANDS[command]?.does.map((operation) => expected(environment, operation)) ?? []
  return (ends.find((outcome) => outcome !== 'ok') ?? 'ok').split(' ').at(-1)
}

/** What the operations that worked have to have done, seen from outside. */
const DONE: Partial<Record<Operation, (given: Given) => unknown>> = {
  'setStatus': ({ number }) => expect(loopFileName(`/dev/loop${number}`)).toBe('changed'),
  'changeBackingFile': ({ number, other }) => expect(backingInode(number)).toBe(statSync(other).ino),
  'migrate': ({ number, destination }) => expect(backingInode(number)).toBe(statSync(destination).ino),
  'setBlockSize': ({ number }) => expect(sysfs(number, 'queue/logical_block_size')).toBe('4096'),
  'detach': isGone,
  'detach lazy': isGone,
  'detachSync': isGone,
  'release': ({ number }) => expect(sysfs(number, 'loop/autoclear')).toBe('0'),
  'close': ({ number, file }) => expect(sysfs(number, 'loop/backing_file')).toBe(file),
  'LoopControl.remove': ({ unused }) => expect(sysfs(unused, 'dev')).toBeUndefined(),
}

/** Another program that looks at the device keeps it for a moment. */
async function isGone({ file }: Given): Promise<void> {
  await expect.poll(() => attachedTo(dirname(file)), { timeout: limit(10_000) }).toEqual([])
}

/** And what they answer. */
const VALUES: Partial<Record<Operation, (given: Given) => unknown>> = {
  'open': ({ number }) => `/dev/loop${number}`,
  'open ref': ({ number }) => `/dev/loop${number}`,
  'list': ({ file }) => file,
  'find': ({ number }) => [number],
  // And those of other programs that cannot be asked
  'find unconfirmed': ({ number }) => expect.arrayContaining([number]),
  'list all': () => false,
  'LoopControl.add': ({ unused }) => unused,
  'LoopControl.remove': ({ unused }) => unused,
  'LoopControl.getFree': () => 'number',
  'attach number': ({ unused }) => expect.objectContaining({ number: unused, owned: true }),
  'attach reuse': ({ number, file }) => ({ number, owned: false, backingFile: file }),
  'status': ({ file }) => file,
  'migrate': () => true,
  'refreshCapacity': () => 1 << 16,
  // Others look at devices too
  'holders': () => expect.any(Array),
  'detach': () => 'detached',
  'detach lazy': () => expect.stringMatching(/^(?:detached|deferred)$/),
  'detachSync': () => expect.stringMatching(/^(?:detached|deferred)$/),
  'detach lazy held': () => 'deferred',
  'release': ({ number }) => `/dev/loop${number}`,
}

let root = ''

beforeAll(() => {
  if (noKernel === '') root = copyForNobody(FIXTURE)
})

afterAll(() => {
  if (root !== '') rmSync(root, { recursive: true })
})

describe.for(ENVIRONMENTS)('$name', (environment) => {
  test('functions', { timeout: limit(60_000) }, async ({ folder, image }) => {
    if (isForbidden(environment.enter)) skipForKernel('user namespaces')
    await using stage = new Stage(folder, image)
    const names = Object.keys(OPERATIONS) as Operation[]
    await stage.build(names, (name) => expected(environment, name as Operation) !== 'ok')
    const before = stage.look()

    const words = [join(root, FIXTURE), root]
    const { status, stdout, stderr } = await run(environment, folder, words, JSON.stringify(stage.given))
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    const { results, capabilities, uid } = JSON.parse(stdout) as {
      results: Record<Operation, Outcome>
      capabilities: string
      uid: number
    }
    expect(uid).toBe(environment.uid)
    expect(((BigInt(`0x${capabilities}`) >> CAP_SYS_ADMIN) & 1n) === 1n).toBe(environment.admin)

    const wanted = Object.fromEntries(names.map((name) => [name, expected(environment, name)]))
    expect.soft(outcomes(results)).toEqual(wanted)
    const after = stage.look()
    const failed = names.filter((name) => results[name].outcome !== 'ok')
    for (const name of failed) expect.soft(after[name], `what ${name} has changed`).toEqual(before[name])
    expect.soft(unclear(environment, results), 'messages that do not say why').toEqual([])
    for (const name of names.filter((other) => !failed.includes(other))) {
      const given = stage.given[name]
      if (!given) continue
      await DONE[name]?.(given)
      const value = VALUES[name]
      const { answers = {} } = environment
      if (value) expect.soft(results[name].value, name).toEqual(name in answers ? answers[name] : value(given))
    }
  })

  test('commands', { timeout: limit(60_000) }, async ({ folder, image }) => {
    if (isForbidden(environment.enter)) skipForKernel('user namespaces')
    await using stage = new Stage(folder, image)
    await stage.build(Object.keys(COMMANDS), (name) => expectedOf(environment, name) !== 'ok')
    const before = stage.look()

    const waiting = Object.entries(COMMANDS)
    const got: Record<string, string> = {}
    const runSome = async () => {
      for (let next = waiting.shift(); next; next = waiting.shift()) {
        const [name, { words }] = next
        const given = stage.given[name]
        if (given) got[name] = said(await run(environment, folder, [join(root, 'dist/cli/main.js'), ...words(given)]))
      }
    }
    await Promise.all([runSome(), runSome(), runSome()])
    const wanted = Object.keys(COMMANDS).map((name) => [name, expectedOf(environment, name)])
    expect.soft(got).toEqual(Object.fromEntries(wanted))
    const after = stage.look()
    for (const [name, { does }] of Object.entries(COMMANDS)) {
      const [given, last] = [stage.given[name], does.at(-1)]
      if (got[name] !== 'ok') expect.soft(after[name], `what ${name} has changed`).toEqual(before[name])
      else if (given && last) await DONE[last]?.(given)
    }
  })
})

function outcomes(results: Record<string, Outcome>): Record<string, string> {
  return Object.fromEntries(Object.entries(results).map(([name, { outcome }]) => [name, outcome]))
}

/** The failures whose message and hint do not speak of what is missing here. */
function unclear({ says }: Environment, results: Record<string, Outcome>): string[] {
  return Object.entries(results).flatMap(([name, { outcome, message, hint }]) => {
    const wanted = says?.[outcome.split(' ')[0] ?? '']
    const words = `${message}; ${hint}`
    return wanted === undefined || wanted.test(words) ? [] : [`${name}: ${words}`]
  })
}

/** `ok`, or the code; where it is neither one nor the other as it should be, all of it. */
function said({ status, stdout, stderr }: Ended): string {
  // What a device has that may not be opened is shown, and said to be unconfirmed; those of other programs too.
  const isUnconfirmed =
    /^(?:loopctl: it is not known whether \S+ is attached to that file: the device may not be opened\n)+$/
  if (status === 0 && (stderr === '' || isUnconfirmed.test(stderr))) return 'ok'
  const code = /^loopctl: ([A-Z]+): [^\n]+\n(?:hint: [^\n]+\n)?$/.exec(stderr)?.[1]
  return status === 1 && stdout === '' && code !== undefined ? code : JSON.stringify({ status, stdout, stderr })
}
