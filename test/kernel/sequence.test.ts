import { createHook } from 'node:async_hooks'
import { execFileSync } from 'node:child_process'
import {
  closeSync,
  existsSync,
  fstatSync,
  fsyncSync,
  mkdirSync,
  openSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { constants } from 'node:os'
import { join } from 'node:path'
import { afterEach, describe, expect } from 'vitest'
import { attach, LoopError } from '../../lib/index.ts'
import { blkRoSet, loopGetStatus64 } from '../../lib/ioctl.ts'
import { binding } from '../../lib/kernel/binding.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import { Sequence } from '../../lib/kernel/sequence.ts'
import {
  decodeInfo,
  decodeStat,
  decodeU64,
  encodePath,
  INFO_SIZE,
  newInfo,
  newStat,
  newU64,
  STATX_SIZE,
  U64_SIZE,
} from '../../lib/kernel/uapi.ts'
import { countDescriptors, sysfs, test } from './support.ts'

const MiB = 1 << 20
const { EBADF, EINVAL, ENOENT, ENOTTY } = constants.errno
const [O_RDONLY, O_RDWR] = [0, 2]

afterEach(() => observe(undefined))

const modes = [
  ['in one hop', () => {}],
  ['call by call', () => observe(() => {})],
] as const

describe.for(modes)('a sequence, %s,', ([, prepare]) => {
  test('answers for each call, and fills its data', async ({ image }) => {
    await using device = await attach(image('disk', 3 * MiB), { offset: 4096 })
    prepare()
    const [info, size] = [newInfo(), newU64()]
    const sequence = new Sequence()
    const fd = sequence.call('openLoop', device.number, O_RDONLY)
    const status = sequence.call('loopGetStatus64', fd, info)
    const sized = sequence.call('blkGetSize64', fd, size)
    const blockSize = sequence.call('blkSszGet', fd)
    const closed = sequence.call('close', fd)
    await sequence.run()
    expect([status, sized, blockSize, closed].map(({ answer }) => answer)).toEqual([0, 0, 512, 0])
    expect(fd.fd).toBeGreaterThan(2)
    expect(() => fstatSync(fd.fd)).toThrow('EBADF')
    expect(decodeU64(size)).toBe(BigInt(3 * MiB - 4096))
    expect(decodeInfo(info)).toEqual(await loopGetStatus64(device.fd))
  })

  test('ends at the first call that fails', async ({ image }) => {
    await using device = await attach(image('disk'))
    prepare()
    const info = newInfo()
    const sequence = new Sequence()
    const first = sequence.call('blkSszGet', device.fd)
    const second = sequence.call('openLoop', 999_999, O_RDONLY)
    const third = sequence.call('loopGetStatus64', device.fd, info)
    await sequence.run()
    expect([first.answer, second.answer, third.answer]).toEqual([512, -ENOENT, undefined])
    expect(second.fd).toBe(-1)
    expect(third.fd).toBe(-1)
    expect(info).toEqual(newInfo())
  })

  test('ends where an answer is not the expected one, which may be an error', async ({ image }) => {
    await using device = await attach(image('disk'))
    prepare()
    const sequence = new Sequence()
    const expected = sequence.expect(512, 'blkSszGet', device.fd)
    const missing = sequence.expect(-ENOENT, 'openLoop', 999_999, O_RDONLY)
    const other = sequence.expect(4096, 'blkSszGet', device.fd)
    const after = sequence.call('blkSszGet', device.fd)
    await sequence.run()
    expect([expected, missing, other, after].map(({ answer }) => answer)).toEqual([512, -ENOENT, 512, undefined])
  })

  test('goes on after a call that may fail, and in its next part', async ({ image }) => {
    await using device = await attach(image('disk'))
    prepare()
    const sequence = new Sequence()
    const tried = sequence.try('openLoop', 999_999, O_RDONLY)
    const onNothing = sequence.call('blkSszGet', tried)
    const skipped = sequence.call('blkSszGet', device.fd)
    sequence.part()
    const next = sequence.call('blkSszGet', device.fd)
    const onSkipped = sequence.call('blkSszGet', skipped)
    await sequence.run()
    const answers = [tried, onNothing, skipped, next, onSkipped].map(({ answer }) => answer)
    expect(answers).toEqual([-ENOENT, -EBADF, undefined, 512, -EBADF])
  })

  test('looks at files, and opens only regular ones', async ({ image, folder }) => {
    const file = image('ünïcode disk', 12_345)
    mkdirSync(`${folder}/directory`)
    prepare()
    const [byPath, byFd] = [newStat(), newStat()]
    const sequence = new Sequence()
    sequence.call('statxPath', encodePath(file), byPath)
    const fd = sequence.call('openRegular', encodePath(Buffer.from(file)), O_RDWR)
    sequence.call('statx', fd, byFd)
    const closed = sequence.call('close', fd)
    const refused = ['directory', 'not there'].map((name) =>
      sequence.try('openRegular', encodePath(`${folder}/${name}`), O_RDONLY),
    )
    refused.push(sequence.try('openRegular', encodePath('/dev/null'), O_RDONLY))
    await sequence.run()
    const stat = statSync(file, { bigint: true })
    expect(closed.answer).toBe(0)
    for (const bytes of [byPath, byFd]) {
      const { mode, device, inode, size } = decodeStat(bytes)
      expect({ mode: BigInt(mode), device, inode, size }).toEqual({
        mode: stat.mode,
        device: stat.dev,
        inode: stat.ino,
        size: 12_345n,
      })
    }
    expect(refused.map(({ answer }) => answer)).toEqual([-EINVAL, -ENOENT, -EINVAL])
  })

  test('has room for as many steps and as much data as there are', async ({ image, folder }) => {
    await using device = await attach(image('disk', 3 * MiB))
    prepare()
    const sequence = new Sequence()
    const first = sequence.room(INFO_SIZE)
    sequence.call('loopGetStatus64', device.fd, first)
    const looks = Array.from({ length: 40 }, (_, i) => {
      const path = `${folder}/${'ü'.repeat(100)} ${i}`
      writeFileSync(path, 'x'.repeat(i))
      const [bytes, room] = [newStat(), sequence.room(STATX_SIZE)]
      const fd = sequence.call('openRegular', sequence.path(path), O_RDONLY)
      sequence.call('statx', fd, bytes)
      sequence.call('statxPath', sequence.path(Buffer.from(path)), room)
      const closed = sequence.call('close', fd)
      return { bytes, room, fd, closed }
    })
    const last = sequence.call('blkSszGet', device.fd)
    await sequence.run()
    expect(last.answer).toBe(512)
    expect(decodeInfo(first)).toEqual(await loopGetStatus64(device.fd))
    for (const [i, { bytes, room, fd, closed }] of looks.entries()) {
      expect([decodeStat(bytes).size, decodeStat(room).size, closed.answer]).toEqual([BigInt(i), BigInt(i), 0])
      expect(fd.fd).toBeGreaterThan(2)
    }
    sequence.giveBack()
  })

  test('side by side with others, each has what is its own', async ({ image }) => {
    const devices = await Promise.all([1, 2, 3, 4, 5, 6].map((n) => attach(image(`disk${n}`, n * MiB))))
    prepare()
    for (let round = 0; round < 3; round++) {
      const sizes = devices.map(async ({ fd }) => {
        const sequence = new Sequence()
        const size = sequence.room(U64_SIZE)
        sequence.call('blkGetSize64', fd, size)
        await sequence.run()
        const bytes = decodeU64(size)
        sequence.giveBack()
        // Twice is as once: else two sequences would get the same tape.
        sequence.giveBack()
        return bytes
      })
      expect(await Promise.all(sizes)).toEqual([1, 2, 3, 4, 5, 6].map((n) => BigInt(n * MiB)))
    }
    for (const device of devices) await device.detach()
  })

  test('exchanges what a descriptor is of, and vacates it, without giving its number away', async ({ image }) => {
    await using one = await attach(image('one', MiB))
    await using two = await attach(image('two', 2 * MiB))
    const fd = openSync(one.path, 'r')
    const before = countDescriptors()
    prepare()
    const size = newU64()
    const sequence = new Sequence()
    const other = sequence.call('openLoop', two.number, O_RDONLY)
    sequence.call('dup3', other, fd)
    sequence.call('close', other)
    sequence.call('blkGetSize64', fd, size)
    const vacated = sequence.call('vacate', fd)
    const nothing = sequence.try('blkSszGet', fd)
    await sequence.run()
    expect(decodeU64(size)).toBe(BigInt(2 * MiB))
    expect([vacated.answer, nothing.answer]).toEqual([fd, -ENOTTY])
    expect(countDescriptors()).toBe(before)
    closeSync(fd)
  })
})

test('a tape that is not sound is a TypeError, and nothing is called', async ({ image }) => {
  await using device = await attach(image('disk'))
  const { sequenceRun } = createRequire(import.meta.url)('../../build/Release/loopctl.node') as {
    sequenceRun: (...values: unknown[]) => Promise<void>
  }
  const rows = binding().sequenceRows
  /** Two steps: LOOP_CLR_FD, which must not happen, and one that is changed. */
  const tape = (name: string, change: (ints: Int32Array) => void): Uint8Array => {
    const bytes = new Uint8Array(2 * 48 + 16)
    const ints = new Int32Array(bytes.buffer)
    ints.set([rows.indexOf('loopClrFd'), 0, 0, 0, device.fd])
    ints.set([rows.findIndex((row) => row === name), 0, 0, 0, device.fd], 12)
    change(ints)
    return bytes
  }
  const wrong: [string, ...unknown[]][] = [
    ['no arguments'],
    ['no tape', 1, undefined],
    ['no number', '1', new Uint8Array(48)],
    ['another array', 1, new Uint16Array(48)],
    ['more steps than there is room for', 3, tape('blkSszGet', () => {})],
    ['a call that does not exist', 2, tape('blkSszGet', (ints) => (ints[12] = rows.length))],
    ['a call of a negative number', 2, tape('blkSszGet', (ints) => (ints[12] = -1))],
    ['the answer of itself', 2, tape('blkSszGet', (ints) => ints.set([1, 0, 1], 14))],
    ['the answer of a negative step', 2, tape('blkSszGet', (ints) => ints.set([1, 0, -1], 14))],
    ['data beyond the end', 2, tape('blkGetSize64', (ints) => (ints[17] = 2 * 48 + 9))],
    ['data far beyond the end', 2, tape('blkGetSize64', (ints) => (ints[17] = 2 ** 31 - 1))],
    ['data before the beginning', 2, tape('blkGetSize64', (ints) => (ints[17] = -8))],
    ['a path without an end', 2, tape('open', (ints) => ints.set([2 * 48], 16) ?? ints.fill(-1, 24))],
    ['a bigint', 2, tape('ftruncate', () => {})],
  ]
  for (const [name, ...values] of wrong) expect(() => sequenceRun(...values, false), name).toThrow(TypeError)
  expect(() =>
    sequenceRun(
      1,
      tape('blkSszGet', () => {}),
    ),
  ).toThrow(TypeError)
  expect(() =>
    sequenceRun(
      1,
      tape('blkSszGet', () => {}),
      1,
    ),
  ).toThrow(TypeError)
  expect(sysfs(device.number, 'loop/autoclear')).toBe('1')
  expect((await device.status()).attached).toBe(true)
})

/** How often a thread is asked for something: one of the addon's, or of libuv's pool. */
async function countHops(operation: () => Promise<unknown>): Promise<{ addon: number; libuv: number }> {
  let libuv = 0
  const hook = createHook({
    init: (_id, type) => {
      if (['FSREQCALLBACK', 'FSREQPROMISE'].includes(type)) libuv++
    },
  }).enable()
  const { made } = binding().workersSync()
  try {
    await operation()
  } finally {
    hook.disable()
  }
  return { addon: binding().workersSync().made - made, libuv }
}

const ONE_HOP = { addon: 1, libuv: 0 }

describe('one hop to a thread is enough', () => {
  test('for attach, for status and for detach, once the kernel is known', async ({ image }) => {
    const file = image('disk')
    // the first one finds out what the kernel can do
    await (await attach(file)).detach()
    let device = await attach(file)
    await device.detach()
    expect(await countHops(async () => (device = await attach(file)))).toEqual(ONE_HOP)
    expect(await countHops(async () => device.status())).toEqual(ONE_HOP)
    expect(await countHops(async () => device.detach())).toEqual(ONE_HOP)
    expect(existsSync(`/sys/block/loop${device.number}/loop`)).toBe(false)
  })

  test('for a disposal', async ({ image }) => {
    const file = image('disk')
    await (await attach(file)).detach()
    const device = await attach(file)
    expect(await countHops(async () => device[Symbol.asyncDispose]())).toEqual(ONE_HOP)
    expect(existsSync(`/sys/block/loop${device.number}/loop`)).toBe(false)
  })
})

/** The next attach of this process is made at once. */
async function learn(file: string): Promise<void> {
  for (let i = 0; i < 2; i++) await (await attach(file)).detach()
}

describe('where the usual way comes to a surprise', () => {
  test('a failed write, which the kernel tells once, is told, and the device stays', async ({ folder, image }) => {
    await learn(image('disk'))
    const small = join(folder, 'small')
    mkdirSync(small)
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', small])
    try {
      const file = join(small, 'disk')
      writeFileSync(file, '')
      for (const lazy of [false, true]) {
        truncateSync(file, 0)
        truncateSync(file, MiB)
        const device = await attach(file)
        const fd = openSync(device.path, 'r+')
        // There is room for the first only. Part of one write would count as all of it.
        for (const at of [0, MiB / 2]) {
          writeSync(fd, Buffer.alloc(65_536, 1), 0, 65_536, at)
          if (at === 0) fsyncSync(fd)
        }
        closeSync(fd)
        if (!lazy) {
          const error = await device.detach().catch((reason: unknown) => reason)
          expect(error).toSatisfy((reason) => LoopError.is(reason, 'io') || LoopError.is(reason, 'no-space'))
          expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
        }
        expect(await device.detach({ lazy })).toBe('detached')
        expect(device.warnings.map(({ code }) => code)).toEqual(lazy ? ['data-lost'] : [])
      }
    } finally {
      execFileSync('umount', [small])
    }
  })

  test('a device left read-only (K5) is made writable, and is not attached a second time', async ({ image }) => {
    const file = image('disk')
    await learn(file)
    const before = await attach(file)
    await blkRoSet(before.fd, true)
    await before.detach()
    let configured = 0
    observe((call) => void (configured += call === 'loopConfigure' ? 1 : 0), { inSequences: true })
    const device = await attach(file, { number: before.number }).finally(() => observe(undefined))
    expect(configured).toBe(1)
    expect(await device.status()).toMatchObject({ readOnly: false, attached: true })
    await device.detach()
  })
})

test('detachSync() at any moment of a detach in one hop neither misses nor hits another device', async ({ image }) => {
  await using bystander = await attach(image('bystander'))
  const file = image('disk')
  const before = countDescriptors()
  for (let round = 0; round < 200; round++) {
    const device = await attach(file, { autoclear: false })
    const detaching = device.detach().catch((error: unknown) => error)
    const until = performance.now() + (round % 40) / 100
    while (performance.now() < until);
    expect(['detached', 'deferred']).toContain(device.detachSync())
    const outcome = await detaching
    expect(outcome === 'detached' || (outcome as { reason?: string }).reason === 'closed', String(outcome)).toBe(true)
    expect(existsSync(`/sys/block/loop${device.number}/loop`), `round ${round}`).toBe(false)
    expect(sysfs(bystander.number, 'loop/backing_file')).toMatch(/bystander$/)
  }
  expect(countDescriptors()).toBe(before)
})
