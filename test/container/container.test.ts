/** In a container with a /dev of its own and the privileges that the example names, and no others. */

import { execFileSync } from 'node:child_process'
import {
  chmodSync,
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  statSync,
  truncateSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { beforeEach, describe, expect, vi } from 'vitest'
import { type DoctorReport, find, open } from '../../lib/index.ts'
import { OWN_LENGTH, partitionsOfLength } from '../kernel/partitioned.ts'
import { test } from '../kernel/support.ts'
import { needs } from '../needs.ts'
import {
  type ContainerOptions,
  type Ended,
  LEAST,
  type Privileges,
  ROOT,
  runContainer,
  runInside,
  SECCOMP_PROFILE,
} from './runc.ts'

const LIMIT = 90_000
const MIB = 1 << 20
const PARTITIONS = [
  { number: 1, start: MIB, size: MIB, label: 'first' },
  { number: 2, start: 2 * MIB, size: OWN_LENGTH * 512, label: 'second' },
]
const COMMAND = `${process.execPath} ${ROOT}/dist/cli/main.js`

beforeEach(() => needs('runc', 'sfdisk', 'mkfs.ext4', SECCOMP_PROFILE))

interface Images {
  folder: string
  whole: string
  /** Two partitions, the first of which begins with words of the test. */
  disk: string
}

function makeImages(parent: string, name: string): Images {
  const folder = join(parent, name)
  mkdirSync(folder)
  const [whole, disk] = [join(folder, 'whole.img'), join(folder, 'disk.img')]
  const sizes = { [whole]: 4 * MIB, [disk]: 16 * MIB }
  for (const [path, size] of Object.entries(sizes)) {
    closeSync(openSync(path, 'w'))
    truncateSync(path, size)
  }
  const lines = PARTITIONS.map(({ start, size, label }) => `start=${start / 512}, size=${size / 512}, name=${label}`)
  execFileSync('sfdisk', ['--quiet', disk], { input: ['label: gpt', ...lines, ''].join('\n') })
  const fd = openSync(disk, 'r+')
  writeSync(fd, `the words of ${name}`.padEnd(64), MIB)
  closeSync(fd)
  return { folder, whole, disk }
}

interface Work {
  numbers: number[]
  nodes: Nodes['nodes'] & { during: string[] }
  wholeNumbers: string[]
  ended: string[]
  partitions: Record<string, unknown>[]
  partitionNumbers: string[][]
  found: string
}

async function expectWork(name: string, { folder, whole, disk }: Images): Promise<void> {
  const seen = await inside<Work>(['work', whole, disk], { folder })
  const [first = -1, second = -1] = seen.numbers

  expect(seen.ended).toEqual(['detached', 'detached'])
  expect(seen.wholeNumbers[0], 'the node is that of the device').toBe(seen.wholeNumbers[1])
  expect(seen.partitions).toEqual(
    PARTITIONS.map((partition) => ({ ...partition, path: `/dev/loop${second}p${partition.number}` })),
  )
  for (const [node, kernel] of seen.partitionNumbers) expect(node, 'the node is that of the partition').toBe(kernel)
  expect(seen.found).toBe(`the words of ${name}`.padEnd(64).slice(0, seen.found.length))

  // Of devices that others took first there can be nodes too.
  const { before, during, after } = seen.nodes
  expect(before).toEqual([])
  expect(during).toEqual(expect.arrayContaining([`loop${first}`, `loop${second}`]))
  expect(during.filter(isPartition)).toEqual([`loop${second}p1`, `loop${second}p2`])
  expect(after).toEqual(during.filter((node) => !isPartition(node)))
  expect(readFileSync(whole).includes('written to the whole device'), 'the image has it').toBe(true)
  const image = readFileSync(disk)
  expect(image.subarray(MIB, MIB + 18).toString()).toBe('from the container')
  expect(image.subarray(2 * MIB, 14 * MIB).includes('written to the partition'), 'the image has it').toBe(true)
}

function isPartition(name: string): boolean {
  return /^loop\d+p\d+$/.test(name)
}

/** Afterwards no device is attached to a file of the folder, and no partition of these tests is on a device that is free. */
async function leavingNothing<T>(folder: string, operation: () => Promise<T>): Promise<T> {
  const result = await operation()
  const nothingLeft = () => {
    expect(attachedTo(folder), 'devices left attached').toEqual([])
    expect(forgottenPartitions(), 'partitions left').toEqual([])
  }
  await vi.waitFor(nothingLeft, { timeout: 5_000 })
  return result
}

/** By inode: of a file that a container had mounted, sysfs tells a wrong path once that is gone. */
function attachedTo(folder: string): string[] {
  const inodes = new Set(readdirSync(folder).map((name) => `${statSync(join(folder, name)).ino}`))
  const words = ['--json', '--list', '--output', 'NAME,BACK-INO,BACK-MAJ:MIN']
  const output = execFileSync('losetup', words, { encoding: 'utf8' })
  const { loopdevices } = JSON.parse(output || '{"loopdevices":[]}') as { loopdevices: Record<string, unknown>[] }
  const { dev } = statSync(folder)
  const device = `${(dev >> 8) & 0xfff}:${dev & 0xff}`
  return loopdevices
    .filter((line) => inodes.has(String(line['back-ino'])) && String(line['back-maj:min']).trim() === device)
    .map((line) => String(line['name']))
}

/** Partitions of these tests that the kernel has of devices which are not attached. */
function forgottenPartitions(): string[] {
  return partitionsOfLength(OWN_LENGTH).filter((name) => !existsSync(`/sys/block/${name.replace(/p\d+$/, '')}/loop`))
}

describe('with the privileges that the example names', { timeout: LIMIT }, () => {
  test('attach, mkfs, mount, the partitions of a GPT, detach', async ({ folder }) => {
    await expectWork('one', makeImages(folder, 'one'))
  })

  test('20 containers at once', async ({ folder }) => {
    const names = Array.from({ length: 20 }, (_, index) => `number ${index}`)
    const images = names.map((name) => [name, makeImages(folder, name)] as const)
    await Promise.all(images.map(([name, its]) => expectWork(name, its)))
  })

  test('the command', async ({ folder }) => {
    const { folder: own, whole, disk } = makeImages(folder, 'command')
    const script = `
      device=$(${COMMAND} attach ${whole})
      mkfs.ext4 -q $device
      ${COMMAND} detach $device
      ${COMMAND} run --partscan=user ${disk} -- sh -euc '
        head -c 20 "$LOOP_DEVICE"p1; echo
        mkfs.ext4 -q "$LOOP_DEVICE"p2; mkdir /tmp/mounted; mount "$LOOP_DEVICE"p2 /tmp/mounted; umount /tmp/mounted'
      ls /dev | grep -E "^loop[0-9]+p" || echo no partition`
    const ended = await leavingNothing(own, () => runContainer(['sh', '-euc', script], { folder: own }))
    expect(ended).toEqual({ status: 0, stdout: 'detached\nthe words of command\nno partition\n', stderr: '' })
    // The magic number of ext4
    expect(readFileSync(whole).readUInt16LE(1024 + 0x38)).toBe(0xef53)
    expect(readFileSync(disk).readUInt16LE(2 * MIB + 1024 + 0x38)).toBe(0xef53)
  })

  test('what a container leaves attached outlives it, and is seen', async ({ folder }) => {
    const { folder: own, whole } = makeImages(folder, 'released')
    const ended = await runContainer(['sh', '-euc', `${COMMAND} attach ${whole}`], { folder: own })
    const device = ended.stdout.trimEnd()
    try {
      expect(ended).toEqual({ status: 0, stdout: expect.stringMatching(/^\/dev\/loop\d+\n$/), stderr: '' })
      expect(attachedTo(own)).toEqual([device])
    } finally {
      for (const info of await find(whole)) await (await open(info)).detach()
    }
    expect(attachedTo(own)).toEqual([])
  })

  test('doctor finds nothing that fails, and changes nothing', async ({ folder }) => {
    const { status, report, nodes } = await askDoctor({ folder })
    expect(report.checks.filter((check) => check.status === 'failure')).toEqual([])
    expect({ status, canAttach: report.canAttach }).toEqual({ status: 0, canAttach: true })
    expect(nodes.after).toEqual(nodes.before)
  })
})

interface Case {
  name: string
  privileges?: Partial<Privileges>
  container?: Omit<ContainerOptions, 'folder' | 'privileges'>
  attachOptions?: Record<string, unknown>
  reason: string | RegExp
  /** What the hint of attach has to speak of. */
  hint: RegExp
  /** What the remedy of a check that fails has to speak of; undefined: whole files can be attached all the same. */
  remedy?: RegExp
}

const CASES: Case[] = [
  {
    name: 'a device cgroup that denies everything',
    privileges: { devices: [], deviceRules: [] },
    container: { forbidden: LEAST.devices },
    reason: 'permission',
    hint: /EPERM.*c 10:237 rwm/,
    remedy: /c 10:237 rwm/,
  },
  {
    name: 'without the rule for loop devices',
    privileges: { deviceRules: LEAST.deviceRules.filter((rule) => !rule.startsWith('b 7:')) },
    reason: 'permission',
    hint: /EPERM.*b 7:\* rmw/,
    remedy: /b 7:\* rmw/,
  },
  {
    name: 'without the rule for partitions',
    privileges: { deviceRules: LEAST.deviceRules.filter((rule) => !rule.startsWith('b 259:')) },
    attachOptions: { partscan: 'user' },
    reason: 'permission',
    hint: /EPERM.*b 259:\* rmw/,
  },
  {
    name: 'without CAP_MKNOD',
    privileges: { capabilities: LEAST.capabilities.filter((name) => name !== 'MKNOD') },
    reason: 'node-missing',
    hint: /--cap-add MKNOD|CAP_MKNOD/,
    remedy: /MKNOD/,
  },
  {
    name: 'without CAP_SYS_ADMIN',
    privileges: { capabilities: LEAST.capabilities.filter((name) => name !== 'SYS_ADMIN') },
    attachOptions: { partscan: 'user' },
    reason: 'permission',
    hint: /CAP_SYS_ADMIN/,
  },
  {
    name: 'without loop-control',
    privileges: { devices: [] },
    // One that is there and free can be attached to all the same; this one has to be made.
    attachOptions: { number: 900_001 },
    reason: 'node-missing',
    hint: /--device \/dev\/loop-control/,
  },
  {
    name: 'in a user namespace',
    container: { userNamespace: true },
    // Of loop-control, where other devices are attached that cannot be asked; else of the node that cannot be made
    reason: /^(?:permission|node-missing)$/,
    hint: /user namespace/,
    remedy: /user namespace/,
  },
]

describe('where something is missing', { timeout: LIMIT }, () => {
  test.for(CASES)('$name: attach tells', async ({ privileges, container, attachOptions, reason, hint }, { folder }) => {
    const options = { folder, privileges: { ...LEAST, ...privileges }, ...container }
    const { nodes, ...ended } = await tryToAttach(options, attachOptions)
    expect(ended.reason, ended.words).toMatch(reason)
    expect(ended.words).toMatch(hint)
    expect(nodes.after, 'what fails makes no node').toEqual(nodes.before)
  })

  test.for(CASES)('$name: doctor tells', async ({ privileges, container, remedy }, { folder }) => {
    const options = { folder, privileges: { ...LEAST, ...privileges }, ...container }
    const { status, report, nodes } = await askDoctor(options)
    const failures = report.checks.filter((check) => check.status === 'failure')
    if (remedy) expect(failures.map((check) => check.remedy).join('\n')).toMatch(remedy)
    else expect(failures).toEqual([])
    expect({ status, canAttach: report.canAttach }).toEqual({ status: remedy ? 1 : 0, canAttach: !remedy })
    expect(nodes.after).toEqual(nodes.before)
  })

  test.for(CASES.filter(({ remedy }) => remedy === undefined))(
    '$name: a whole file can be attached all the same',
    async ({ privileges }, { folder }) => {
      const ended = await tryToAttach({ folder, privileges: { ...LEAST, ...privileges } })
      expect(ended.reason, ended.words).toBe('ok')
    },
  )
})

interface Nodes {
  nodes: { before: string[]; after: string[] }
}

interface Tried extends Nodes {
  reason: string
  code: string
  words: string
}

/** Tries to attach the image with two partitions. */
async function tryToAttach(options: ContainerOptions, attachOptions: Record<string, unknown> = {}): Promise<Tried> {
  const { folder, disk } = makeImages(options.folder, 'tried')
  // Root of a user namespace is one of the others to them.
  for (const path of [options.folder, folder]) chmodSync(path, 0o755)
  chmodSync(disk, 0o666)
  return inside<Tried>(['attach', disk, JSON.stringify(attachOptions)], { ...options, folder })
}

interface Asked extends Nodes {
  status: number
  report: DoctorReport
}

async function askDoctor(options: ContainerOptions): Promise<Asked> {
  chmodSync(options.folder, 0o755)
  const { stdout, stderr, ...others } = await inside<Nodes & Ended & { status: number }>(['doctor'], options)
  expect(stderr).toBe('')
  return { ...others, report: JSON.parse(stdout) as DoctorReport }
}

/** What fixtures/inside.mjs saw. */
async function inside<Seen>(words: readonly string[], options: ContainerOptions): Promise<Seen> {
  const { status, stdout, stderr } = await leavingNothing(options.folder, () => runInside(words, options))
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
  return JSON.parse(stdout) as Seen
}
