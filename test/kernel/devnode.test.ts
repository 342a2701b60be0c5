/** The nodes of devices and partitions in a /dev that the kernel does not look after, as a container has it. */

import { execFileSync } from 'node:child_process'
import {
  closeSync,
  existsSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { beforeEach, expect, onTestFinished } from 'vitest'
import { attach, LoopControl } from '../../lib/index.ts'
import { isDevKernels } from '../../lib/kernel/devnode.ts'
import { MOUNT_NAMESPACE } from './environments.ts'
import {
  expectNoPartitions,
  knownPartitions,
  mark,
  MiB,
  nodeOf,
  opener,
  partitionNodes,
  pattern,
  readBytes,
  Remote,
  sfdisk,
  TWO,
} from './partitioned.ts'
import { needs } from '../needs.ts'
import { limit } from '../scale.ts'
import { failure, removeDevice, sysfs, test, unusedNumber } from './support.ts'

beforeEach(() => needs('sfdisk'))

const SECOND = 4096 * 512

/** A process whose /dev is a tmpfs with what an empty container has, and loop-control. `then`: done there at the end. */
async function contained(folder: string, then = ':', ...behind: string[]): Promise<Remote> {
  const dev = join(folder, 'dev')
  mkdirSync(dev, { recursive: true })
  const script = `dev=$1; shift
mount -t tmpfs none "$dev"
cp -a /dev/null /dev/zero /dev/urandom /dev/loop-control "$dev"/
mount --move "$dev" /dev
${then}
exec "$@"`
  const enter = [...MOUNT_NAMESPACE, 'sh', '-euc', script, 'sh', dev, ...behind]
  return begun(new Remote(enter))
}

/** Another process in the same /dev. */
function beside(other: Remote): Promise<Remote> {
  return begun(new Remote(['nsenter', `--mount=/proc/${other.pid}/ns/mnt`]))
}

/** Before it has entered its namespace its /dev is everybody's. */
async function begun(remote: Remote): Promise<Remote> {
  await remote.ask('ready')
  return remote
}

function diskImage(image: (name: string, bytes: number) => string, name = 'disk'): string {
  const file = image(name, 8 * MiB)
  sfdisk(file, TWO)
  mark(file, [MiB, SECOND])
  return file
}

/** The nodes that its /dev has, without those that it began with. */
function nodesOf(remote: Remote): string[] {
  const first = new Set(['null', 'zero', 'urandom', 'loop-control'])
  return readdirSync(remote.path('/dev'))
    .filter((name) => !first.has(name))
    .toSorted()
}

function isPartition(name: string): boolean {
  return /^loop\d+p\d+$/.test(name)
}

function mknod(path: string, device: string): void {
  execFileSync('mknod', [path, 'b', ...device.split(':')])
}

function ownNumber(): number {
  const number = unusedNumber()
  onTestFinished(() => removeDevice(number))
  return number
}

/** A free device of that number, whose node the private /dev does not have. */
async function freeDevice(): Promise<number> {
  await using control = await LoopControl.open()
  const number = await control.add(ownNumber())
  return number
}

test('the node of the device is made, those of its partitions too; the latter go with detach, it with remove', async ({
  folder,
  image,
}) => {
  const file = diskImage(image)
  const number = ownNumber()
  const remote = await contained(folder)
  const { partitions } = await remote.attach(file, { number, partscan: 'user' })
  const name = `loop${number}`
  expect(nodesOf(remote)).toEqual([name, `${name}p1`, `${name}p2`])
  expect(sysfs(number, 'dev')).toBe(nodeOf(remote.path(`/dev/${name}`)))
  expect(lstatSync(remote.path(`/dev/${name}`)).mode & 0o777).toBe(0o600)
  expect(partitions.map(({ path }) => path)).toEqual([`/dev/${name}p1`, `/dev/${name}p2`])
  for (const [index, { path, device }] of partitions.entries()) {
    expect(nodeOf(remote.path(path))).toBe(device)
    expect(sysfs(number, `${path.slice('/dev/'.length)}/dev`)).toBe(device)
    expect(readBytes(remote.path(path), 0, 512).equals(pattern(index))).toBe(true)
  }
  expect(await remote.ask('detach')).toBe('detached')
  expect(nodesOf(remote)).toEqual([name])
  expectNoPartitions(number)

  // By any way
  for (const way of [['detach', { lazy: true }], ['detachSync']]) {
    await remote.attach(file, { number, partscan: 'user' })
    expect(nodesOf(remote)).toEqual([name, `${name}p1`, `${name}p2`])
    expect(await remote.ask(...way)).toBe('detached')
    expect(nodesOf(remote), way[0] as string).toEqual([name])
    expectNoPartitions(number)
  }

  expect(await remote.ask('remove', number)).toBe(number)
  expect(nodesOf(remote)).toEqual([])
  expect(existsSync(`/sys/block/${name}`)).toBe(false)
  await remote.end()
})

test('any free device, without a number', async ({ folder, image }) => {
  const remote = await contained(folder)
  const { number } = await remote.attach(diskImage(image), { partscan: 'user' })
  // Of a device that somebody else took first there can be a node too.
  const nodes = nodesOf(remote)
  expect(nodes).toContain(`loop${number}`)
  expect(nodes.filter(isPartition)).toEqual([`loop${number}p1`, `loop${number}p2`])
  expect(await remote.ask('detach')).toBe('detached')
  expect(nodesOf(remote)).toEqual(nodes.filter((name) => !isPartition(name)))
})

test('an attach that fails leaves no node', async ({ folder, image }) => {
  const damaged = diskImage(image)
  writeFileSync(damaged, Buffer.alloc(8), { flag: 'r+' })
  const fd = openSync(damaged, 'r+')
  for (const header of [1, 16_383]) writeSync(fd, Buffer.alloc(512), 0, 512, header * 512)
  closeSync(fd)
  const number = await freeDevice()
  const remote = await contained(folder)
  await remote.refused('bad-partition-table', 'attach', damaged, { number, partscan: 'user' })
  expect(nodesOf(remote)).toEqual([])
  expectNoPartitions(number)
  // A node that was there before stays.
  mknod(remote.path(`/dev/loop${number}`), `7:${number}`)
  await remote.refused('bad-partition-table', 'attach', damaged, { number, partscan: 'user' })
  expect(nodesOf(remote)).toEqual([`loop${number}`])
})

test('createNode: false makes none', async ({ folder, image }) => {
  const file = diskImage(image)
  const number = await freeDevice()
  const remote = await contained(folder)
  const error = await remote.refused('node-missing', 'attach', file, { number, createNode: false, timeout: 0 })
  expect(error).toMatchObject({
    code: 'ENOENT',
    hint: expect.stringContaining(`mknod /dev/loop${number} b 7 ${number}`),
  })
  expect(nodesOf(remote)).toEqual([])
  // Nor of partitions
  mknod(remote.path(`/dev/loop${number}`), `7:${number}`)
  const given = { number, createNode: false, partscan: 'user', timeout: limit(50) }
  expect((await remote.refused('node-missing', 'attach', file, given)).message).toContain(`/dev/loop${number}p1`)
  expect(nodesOf(remote)).toEqual([`loop${number}`])
  expect(sysfs(number, 'loop/backing_file')).toBeUndefined()
  expectNoPartitions(number)
  await remote.attach(file, { number, createNode: false })
  expect(await remote.ask('detach')).toBe('detached')
})

test('something else in place of the node is refused, named, and left alone', async ({ folder, image }) => {
  const file = diskImage(image)
  const number = await freeDevice()
  const remote = await contained(folder)
  const path = remote.path(`/dev/loop${number}`)
  const things: [() => void, string][] = [
    [() => mknod(path, '7:5'), 'a node of block device 7:5'],
    [() => mknod(path, '259:77777'), 'a node of block device 259:77777'],
    [() => execFileSync('mknod', [path, 'c', '7', `${number}`]), `a node of character device 7:${number}`],
    [() => writeFileSync(path, 'x'), 'a plain file'],
    [() => symlinkSync('/dev/null', path), 'a symbolic link to /dev/null'],
    [() => symlinkSync('/nowhere', path), 'a symbolic link to /nowhere'],
    [() => mkdirSync(path), 'a directory'],
    [() => execFileSync('mkfifo', [path]), 'no device node'],
  ]
  for (const [make, name] of things) {
    make()
    const before = lstatSync(path).ino
    const error = await remote.refused('not-a-loop-device', 'attach', file, { number })
    expect(error.code).toBe('ENOTTY')
    expect(error.message).toContain(name)
    expect(error.hint).toContain(`b 7 ${number}`)
    expect(lstatSync(path).ino).toBe(before)
    expect(sysfs(number, 'loop/backing_file')).toBeUndefined()
    rmSync(path, { recursive: true })
  }
})

test('two processes at once make the same node, and both attach', async ({ folder, image }) => {
  const files = ['one', 'two'].map((name) => diskImage(image, name))
  const first = await contained(folder)
  const both = [first, await beside(first)]
  for (let turn = 0; turn < 10; turn++) {
    for (const name of nodesOf(first)) rmSync(first.path(`/dev/${name}`))
    const attached = await Promise.all(
      both.map((remote, index) => remote.attach(files[index] ?? '', { partscan: 'user' })),
    )
    const [one = -1, two = -1] = attached.map(({ number }) => number)
    expect(one).not.toBe(two)
    for (const number of [one, two]) {
      expect(nodeOf(first.path(`/dev/loop${number}`))).toBe(sysfs(number, 'dev'))
      expect(partitionNodes(number, first.path('/dev'))).toEqual([`loop${number}p1`, `loop${number}p2`])
    }
    expect(await Promise.all(both.map((remote) => remote.ask('detach')))).toEqual(['detached', 'detached'])
    expect(nodesOf(first).filter((name) => /\dp\d/.test(name))).toEqual([])
  }
})

test('two processes at once want the same number: one has it, the node is there', async ({ folder, image }) => {
  const files = ['one', 'two'].map((name) => diskImage(image, name))
  const number = await freeDevice()
  const first = await contained(folder)
  const both = [first, await beside(first)]
  for (let turn = 0; turn < 10; turn++) {
    for (const name of nodesOf(first)) rmSync(first.path(`/dev/${name}`))
    const results = await Promise.allSettled(
      both.map((remote, index) => remote.attach(files[index] ?? '', { number, partscan: 'user', timeout: 0 })),
    )
    const winner = results.findIndex(({ status }) => status === 'fulfilled')
    const reasons = results.map((result) => (result.status === 'rejected' ? String(result.reason) : 'fulfilled'))
    expect(reasons).toContain('fulfilled')
    expect(reasons[1 - winner]).toContain('is attached already')
    expect(nodesOf(first)).toEqual([`loop${number}`, `loop${number}p1`, `loop${number}p2`])
    expect(await both[winner]?.ask('detach')).toBe('detached')
    expect(nodesOf(first)).toEqual([`loop${number}`])
  }
})

test('a node of a partition that is gone is replaced; a plain file in its place is refused and named', async ({
  folder,
  image,
}) => {
  const file = diskImage(image)
  const number = await freeDevice()
  const remote = await contained(folder)
  const path = remote.path(`/dev/loop${number}p1`)
  mknod(path, '259:77777')
  const { partitions } = await remote.attach(file, { number, partscan: 'user' })
  expect(nodeOf(path)).toBe(partitions[0]?.device)
  expect(readBytes(path, 0, 512).equals(pattern(0))).toBe(true)
  expect(await remote.ask('detach')).toBe('detached')
  expect(nodesOf(remote)).toEqual([`loop${number}`])

  const things: [() => void, string][] = [
    [() => writeFileSync(path, 'x'), 'a plain file'],
    [() => symlinkSync('/dev/null', path), 'a symbolic link to /dev/null'],
    [() => mknod(path, '7:5'), 'a node of block device 7:5'],
    [() => mkdirSync(path), 'a directory'],
  ]
  for (const [make, name] of things) {
    make()
    const error = await remote.refused('not-a-loop-device', 'attach', file, { number, partscan: 'user' })
    expect(error.message).toContain(`/dev/loop${number}p1`)
    expect(error.message).toContain(name)
    expect(sysfs(number, 'loop/backing_file')).toBeUndefined()
    expectNoPartitions(number)
    expect(nodesOf(remote)).toEqual([`loop${number}`, `loop${number}p1`])
    rmSync(path, { recursive: true })
  }
})

test('a partition that is in use stays with its node; the others get theirs again', async ({ folder, image }) => {
  const file = diskImage(image)
  const number = await freeDevice()
  const remote = await contained(folder)
  await remote.attach(file, { number, partscan: 'user' })
  const other = await opener(remote.path(`/dev/loop${number}p2`))
  const error = await remote.refused('in-use', 'detach', { timeout: 50 })
  expect(error.holders?.map(({ pid }) => pid)).toContain(other.pid)
  const partitions = Object.entries(knownPartitions(number))
  expect(partitions).toHaveLength(2)
  for (const [index, [name, { device }]] of partitions.entries()) {
    expect(nodeOf(remote.path(`/dev/${name}`))).toBe(device)
    expect(readBytes(remote.path(`/dev/${name}`), 0, 512).equals(pattern(index))).toBe(true)
  }
  await other.end()
  expect(await remote.ask('detach')).toBe('detached')
  expect(nodesOf(remote)).toEqual([`loop${number}`])
  expectNoPartitions(number)
})

test('rescan makes and removes nodes', async ({ folder, image }) => {
  const file = diskImage(image)
  const number = await freeDevice()
  const remote = await contained(folder)
  await remote.attach(file, { number, partscan: 'user' })
  sfdisk(file, 'label: gpt\n2 : start=4096, size=4096\n3 : start=10240, size=2048\n')
  expect(await remote.ask('rescan')).toMatchObject([{ number: 2 }, { number: 3 }])
  expect(partitionNodes(number, remote.path('/dev'))).toEqual([`loop${number}p2`, `loop${number}p3`])
  expect(readBytes(remote.path(`/dev/loop${number}p2`), 0, 512).equals(pattern(1))).toBe(true)
  expect(await remote.ask('detach')).toBe('detached')
})

test('swappable: both nodes, and those of the partitions of the upper one', async ({ folder, image }) => {
  const remote = await contained(folder)
  const number = await freeDevice()
  const given = { number, readOnly: true, swappable: true, partscan: 'user' } as const
  await remote.attach(diskImage(image), given)
  const upper = `loop${number}`
  // And the lower one's, and those of devices that somebody else took first
  const nodes = nodesOf(remote)
  expect(nodes.filter((name) => name.startsWith(upper))).toEqual([upper, `${upper}p1`, `${upper}p2`])
  const lower = sysfs(number, 'loop/backing_file')?.slice('/dev/'.length)
  expect(nodes).toContain(lower)
  expect(nodes.filter(isPartition)).toEqual([`${upper}p1`, `${upper}p2`])
  expect(readBytes(remote.path(`/dev/${upper}p2`), 0, 512).equals(pattern(1))).toBe(true)
  expect(await remote.ask('detach')).toBe('detached')
  expect(nodesOf(remote).filter(isPartition)).toEqual([])
})

test('/dev is read-only: node-missing says so', async ({ folder, image }) => {
  const file = diskImage(image)
  const number = await freeDevice()
  const remote = await contained(folder, 'mount -o remount,ro /dev')
  const error = await remote.refused('node-missing', 'attach', file, { number })
  expect(error.code).toBe('EROFS')
  expect(error.message).toMatch(/\/dev\/loop\d+.*read-only/)
  expect(error.hint).toContain(`mknod /dev/loop${number} b 7 ${number}`)

  const other = await contained(folder, `mknod /dev/loop${number} b 7 ${number}; mount -o remount,ro /dev`)
  const ofPartition = await other.refused('node-missing', 'attach', file, { number, partscan: 'user' })
  expect(ofPartition.message).toMatch(/\/dev\/loop\d+p1.*read-only/)
  expect(ofPartition.hint).toMatch(/mknod \/dev\/loop\d+p1 b 259 \d+/)
  expect(sysfs(number, 'loop/backing_file')).toBeUndefined()
  expectNoPartitions(number)
  await other.attach(file, { number })
  expect(await other.ask('detach')).toBe('detached')
})

test('without CAP_MKNOD: node-missing, and what lets a container make nodes', async ({ folder, image }) => {
  const file = diskImage(image)
  const number = await freeDevice()
  const without = ['setpriv', '--inh-caps', '-mknod', '--bounding-set', '-mknod']
  const remote = await contained(folder, ':', ...without)
  for (const given of [{ number }, {}]) {
    const error = await remote.refused('node-missing', 'attach', file, given)
    expect(error.code).toBe('EPERM')
    expect(error.message).toContain('CAP_MKNOD')
    expect(error.hint).toContain('--cap-add MKNOD')
    expect(nodesOf(remote)).toEqual([])
  }
  expect(sysfs(number, 'loop/backing_file')).toBeUndefined()

  // What needs no node works, and the devices of the machine are none the wiser.
  const other = await contained(folder, `mknod /dev/loop${number} b 7 ${number}`, ...without)
  const error = await other.refused('node-missing', 'attach', file, { number, partscan: 'user' })
  expect(error.message).toContain(`/dev/loop${number}p1`)
  expectNoPartitions(number)
  await other.attach(file, { number })
  expect(await other.ask('detach')).toBe('detached')
  await using device = await attach(file, { number })
  expect(device.number).toBe(number)
})

test('killed: what it left in /dev is no hindrance for the next', async ({ folder, image }) => {
  const file = diskImage(image)
  const number = await freeDevice()
  const first = await contained(folder)
  await first.attach(file, { number, partscan: 'user' })
  const second = await beside(first)
  await first.end('SIGKILL')
  await expect.poll(() => sysfs(number, 'loop/backing_file')).toBeUndefined()
  // From 7.2 on the kernel has removed the partitions itself (K3). It does not know of their nodes, which are replaced.
  const isLeft = Object.keys(knownPartitions(number)).length > 0
  await second.attach(file, { number })
  expect(knownPartitions(number)).toEqual({})
  expect(partitionNodes(number, second.path('/dev'))).toHaveLength(isLeft ? 0 : 2)
  expect(await second.ask('detach')).toBe('detached')
  await second.attach(file, { number, partscan: 'user' })
  expect(partitionNodes(number, second.path('/dev'))).toHaveLength(2)
  expect(await second.ask('detach')).toBe('detached')
  expect(nodesOf(second)).toEqual([`loop${number}`])

  const third = await beside(second)
  await third.attach(file, { number, partscan: 'user' })
  await third.end('SIGKILL')
  await expect.poll(() => sysfs(number, 'loop/backing_file')).toBeUndefined()
  expect(nodesOf(second)).toHaveLength(3)
  const isLeftAgain = Object.keys(knownPartitions(number)).length > 0
  expect(await second.ask('remove', number)).toBe(number)
  expect(nodesOf(second)).toEqual(isLeftAgain ? [] : [`loop${number}p1`, `loop${number}p2`])
})

test("a node that somebody has removed from the kernel's own /dev is made again, and goes with its device", async ({
  image,
  skip,
}) => {
  skip(!isDevKernels(), 'this /dev is no devtmpfs')
  const file = diskImage(image)
  const number = await freeDevice()
  const path = `/dev/loop${number}`
  rmSync(path)
  await using device = await attach(file, { number, partscan: 'user' })
  expect(nodeOf(path)).toBe(sysfs(number, 'dev'))
  expect(partitionNodes(number)).toHaveLength(2)
  rmSync(`${path}p1`)
  await device.rescanPartitions()
  expect(nodeOf(`${path}p1`)).toBe(sysfs(number, `loop${number}p1/dev`))
  expect(await device.detach()).toBe('detached')
  expectNoPartitions(number)
  await removeDevice(number)
  expect(existsSync(path)).toBe(false)
  // Where it is not to be made, the error says what is the matter.
  await using control = await LoopControl.open()
  await control.add(number)
  rmSync(path)
  await failure('node-missing', () => attach(file, { number, createNode: false }))
  expect(existsSync(path)).toBe(false)
})

test('without loop-control a free device that is there is used', async ({ folder, image }) => {
  const file = diskImage(image)
  const number = await freeDevice()
  const remote = await contained(folder, `rm /dev/loop-control; mknod /dev/loop${number} b 7 ${number}`)
  const attached = await remote.attach(file, { partscan: 'user' })
  // Nothing else has a node there.
  expect(attached.number).toBe(number)
  expect(sysfs(number, 'loop/backing_file')).toBe(file)
  await remote.end()
})
