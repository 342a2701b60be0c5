import { execFileSync } from 'node:child_process'
import {
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  linkSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach, find, list, LoopControl, open } from '../../lib/index.ts'
import { needs, needsKernel } from '../needs.ts'
import { failure, losetup, removeDevice, sysfs, test, unusedNumber } from './support.ts'

const MiB = 1 << 20

async function numbers(what: Parameters<typeof find>[0]): Promise<number[]> {
  return (await find(what)).map(({ number }) => number)
}

describe('status and setStatus', () => {
  test('what is not named keeps every bit', async ({ image }) => {
    await using device = await attach(image('disk'), { offset: 512, sizeLimit: 8192, reference: 'tag' })
    const before = await device.status()
    await device.setStatus({ offset: 1024 })
    expect(await device.status()).toEqual({ ...before, offset: 1024 })
    await device.setStatus({ sizeLimit: 0 })
    expect(await device.status()).toEqual({ ...before, offset: 1024, sizeLimit: 0, size: MiB - 1024 })
    await device.setStatus({ reference: 'other' })
    await device.setStatus({ autoclear: false })
    await device.setStatus({})
    expect(await device.status()).toMatchObject({ reference: 'other', autoclear: false, offset: 1024 })
    expect(sysfs(device.number, 'loop/offset')).toBe('1024')
    expect(sysfs(device.number, 'loop/autoclear')).toBe('0')
  })

  test('64 bits: 2^40 + 512 survives in offset and size limit', async ({ image }) => {
    const beyond = 2 ** 40 + 512
    await using device = await attach(image('sparse', 2 ** 41 + MiB))
    await device.setStatus({ offset: BigInt(beyond), sizeLimit: beyond })
    expect(await device.status()).toMatchObject({ offset: beyond, sizeLimit: beyond, size: beyond })
    expect(sysfs(device.number, 'loop/offset')).toBe('1099511628288')
    expect(sysfs(device.number, 'loop/sizelimit')).toBe('1099511628288')
    expect(losetup(device.path)).toMatchObject({ offset: beyond, sizelimit: beyond })
  })

  test('partscan goes on, and not off again', async ({ image }) => {
    await using device = await attach(image('disk'))
    await device.setStatus({ partscan: true })
    expect(sysfs(device.number, 'loop/partscan')).toBe('1')
    await expect(device.setStatus({ partscan: false as true })).rejects.toMatchObject({ code: 'ERR_INVALID_ARG_VALUE' })
  })

  test('agrees with sysfs and the file', async ({ image }) => {
    const file = image('disk')
    await using device = await attach(file, { blockSize: 4096, readOnly: true, directIO: true })
    const { ino } = statSync(file)
    const diskSeq = sysfs(device.number, 'diskseq')
    expect(await device.status()).toEqual({
      number: device.number,
      path: device.path,
      device: sysfs(device.number, 'dev'),
      // None before 5.15
      ...(diskSeq !== undefined && { diskSeq: Number(diskSeq) }),
      attached: true,
      backingFile: file,
      backingDeleted: false,
      offset: 0,
      sizeLimit: 0,
      size: MiB,
      blockSize: 4096,
      readOnly: true,
      autoclear: true,
      partscan: false,
      directIO: true,
      reference: '',
      backingDevice: String(losetup(device.path)?.['back-maj:min']).trim(),
      backingInode: String(ino),
      swappable: false,
      warnings: [],
    })
  })

  test('plain data: it survives JSON and structuredClone', async ({ image }) => {
    await using device = await attach(image('disk'))
    const status = await device.status()
    expect(JSON.parse(JSON.stringify(status))).toEqual(status)
    expect(structuredClone(status)).toEqual(status)
    expect(JSON.parse(JSON.stringify(device.ref))).toEqual(device.ref)
  })

  test('a free device opens, and its operations are not-attached', async () => {
    const number = unusedNumber()
    await using control = await LoopControl.open()
    await control.add(number)
    try {
      await using device = await open(number)
      expect(device.owned).toBe(false)
      await failure('not-attached', () => device.status())
      await failure('not-attached', () => device.setStatus({ offset: 512 }))
      await failure('not-attached', () => device.refreshCapacity())
      await failure('not-attached', () => device.setDirectIO(false))
      await failure('not-attached', () => device.setBlockSize(512))
      await failure('not-attached', () => device.changeBackingFile('/etc/hostname'))
      await failure('not-attached', () => device.detach())
      await failure('not-attached', () => device.release())
    } finally {
      await control.remove(number)
    }
  })
})

describe('refreshCapacity, setDirectIO, setBlockSize', () => {
  test('refreshCapacity takes over a size that grew or shrank', async ({ image }) => {
    const file = image('disk')
    await using device = await attach(file)
    truncateSync(file, 3 * MiB)
    expect((await device.status()).size).toBe(MiB)
    expect(await device.refreshCapacity()).toBe(3 * MiB)
    expect(sysfs(device.number, 'size')).toBe('6144')
    truncateSync(file, 4096)
    expect(await device.refreshCapacity()).toBe(4096)
    expect(sysfs(device.number, 'size')).toBe('8')
  })

  test('setDirectIO', async ({ image }) => {
    await using device = await attach(image('disk'), { blockSize: 4096 })
    for (const enabled of [true, false]) {
      await device.setDirectIO(enabled)
      expect(sysfs(device.number, 'loop/dio')).toBe(enabled ? '1' : '0')
      expect((await device.status()).directIO).toBe(enabled)
    }
    await device.setStatus({ offset: 100 })
    const error = await failure('direct-io-unavailable', () => device.setDirectIO(true))
    expect(error).toMatchObject({ code: 'EINVAL', ioctl: 'LOOP_SET_DIRECT_IO' })
  })

  test('setBlockSize', async ({ image }) => {
    await using device = await attach(image('disk'))
    for (const bytes of [4096, 1024, 512]) {
      await device.setBlockSize(bytes)
      expect(sysfs(device.number, 'queue/logical_block_size')).toBe(String(bytes))
    }
    await expect(device.setBlockSize(1000)).rejects.toThrow(RangeError)
    await expect(device.setBlockSize(256)).rejects.toThrow(RangeError)
  })

  test('K11: setBlockSize of a mounted device is in-use, and names the mount', async ({ folder, image }) => {
    needsKernel('xfs')
    needs('mkfs.xfs')
    // xfs, because under ext4 the kernel with this bug refuses it itself; xfs wants this much.
    await using device = await attach(image('disk', 320 * MiB))
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    execFileSync('mkfs.xfs', ['-q', '-K', device.path])
    execFileSync('mount', [device.path, mountPoint])
    try {
      const error = await failure('in-use', () => device.setBlockSize(4096))
      expect(error.holders).toContainEqual({ device: device.path, kind: 'mount', mountPoint, fsType: 'xfs' })
      expect(sysfs(device.number, 'queue/logical_block_size')).toBe('512')
    } finally {
      execFileSync('umount', [mountPoint])
    }
  })
})

describe('list and find', () => {
  test('list has the attached devices, all: the free ones too', async ({ image }) => {
    const file = image('disk')
    const number = unusedNumber()
    await using control = await LoopControl.open()
    await control.add(number)
    try {
      await using device = await attach(file, { readOnly: true, offset: 512 })
      const attached = await list()
      expect(attached.every((info) => info.attached)).toBe(true)
      const {
        reference: _,
        backingDevice: __,
        backingInode: ___,
        swappable: ____,
        warnings: _____,
        ...info
      } = await device.status()
      expect(attached.find((entry) => entry.number === device.number)).toEqual(info)
      expect(attached.some((entry) => entry.number === number)).toBe(false)
      const free = (await list({ all: true })).find((entry) => entry.number === number)
      expect(free).toMatchObject({ attached: false, backingFile: null, backingDeleted: false, size: 0 })
    } finally {
      await control.remove(number)
    }
  })

  test('list opens no device', async ({ folder, image }) => {
    needs('strace')
    await using device = await attach(image('disk'))
    const trace = join(folder, 'trace')
    execFileSync('strace', ['-f', '-e', 'trace=openat,open', '-o', trace, process.execPath, 'dist/cli/main.js', 'list'])
    const seen = readFileSync(trace, 'utf8')
    expect(seen).toContain(`"/sys/block/loop${device.number}/loop"`)
    // One of another program is asked where its file's name ends in ` (deleted)`.
    expect(seen).not.toContain(`"${device.path}"`)
    // once each: a directory of every device, and the file of those that are attached
    const count = (path: RegExp) => seen.split('\n').filter((line) => path.test(line)).length
    expect(count(new RegExp(`"/sys/block/loop${device.number}/loop"`))).toBe(1)
    expect(count(/"backing_file"/)).toBeLessThanOrEqual(count(/"\/sys\/block\/loop\d+\/loop"/))
  })

  test('a deleted file is told from one whose name says so', async ({ folder, image }) => {
    const deleted = image('gone')
    const tricky = image('kept (deleted)')
    await using first = await attach(deleted)
    await using second = await attach(tricky)
    rmSync(deleted)
    expect(sysfs(first.number, 'loop/backing_file')).toBe(`${deleted} (deleted)`)
    expect(await first.status()).toMatchObject({ backingFile: deleted, backingDeleted: true })
    expect(await second.status()).toMatchObject({ backingFile: tricky, backingDeleted: false })
    expect(folder).not.toBe('')
  })

  test('find goes by device and inode: links, another path, a renamed and a deleted file', async ({
    folder,
    image,
  }) => {
    const file = image('disk')
    const other = image('other')
    await using device = await attach(file)
    await using second = await attach(file, { offset: 4096, readOnly: true, overlap: 'allow' })
    const both = [device.number, second.number].toSorted((a, b) => a - b)

    const symbolic = join(folder, 'symbolic')
    symlinkSync(file, symbolic)
    const hard = join(folder, 'hard')
    linkSync(file, hard)
    expect(await numbers(file)).toEqual(both)
    expect(await numbers(symbolic)).toEqual(both)
    expect(await numbers(hard)).toEqual(both)
    expect(await numbers(other)).toEqual([])
    const moved = join(folder, 'moved')
    renameSync(file, moved)
    expect(await numbers(moved)).toEqual(both)
    rmSync(moved)
    expect(await numbers(hard)).toEqual(both)
    // a new file at the old path is another file
    writeFileSync(moved, readFileSync(hard))
    expect(await numbers(moved)).toEqual([])
    await failure('no-such-file', () => find(file))
  })

  test('find by tag', async ({ image }) => {
    const reference = `tag-${process.pid}`
    await using device = await attach(image('disk'), { reference })
    expect((await find({ reference })).map(({ number }) => number)).toEqual([device.number])
    expect(await find({ reference: `${reference}-other` })).toEqual([])
  })

  test('a device on top of another says so', async ({ image }) => {
    await using lower = await attach(image('disk'))
    await using upper = await attach(lower.path, { readOnly: true })
    expect(await upper.status()).toMatchObject({ backingFile: lower.path, lower: lower.number })
    expect((await find(lower.path)).map(({ number }) => number)).toEqual([upper.number])
  })
})

describe('LoopControl', () => {
  test('add, remove and getFree', async () => {
    await using control = await LoopControl.open()
    const number = unusedNumber()
    expect(await control.add(number)).toBe(number)
    expect(sysfs(number, 'size')).toBe('0')
    expect(await failure('device-exists', () => control.add(number))).toMatchObject({
      code: 'EEXIST',
      ioctl: 'LOOP_CTL_ADD',
      path: `/dev/loop${number}`,
    })
    expect(await control.remove(number)).toBe(number)
    expect(sysfs(number, 'size')).toBe(undefined)
    await failure('no-such-device', () => control.remove(number))

    const next = await control.add()
    expect(sysfs(next, 'size')).toMatch(/^\d+$/)
    // It is of the lowest numbers, which the kernel offers to others too.
    await removeDevice(next)
    expect(sysfs(next, 'size')).toBe(undefined)
    const free = await control.getFree()
    expect(sysfs(free, 'loop/backing_file')).toBe(undefined)
  })

  test('remove of an attached device is in-use at once; of an open one after waiting', async ({ image }) => {
    await using control = await LoopControl.open()
    const number = unusedNumber()
    const device = await attach(image('disk'), { number })
    // longer than the test may take
    const error = await failure('in-use', () => control.remove(number, { timeout: 600_000 }))
    expect(error.hint).toContain('detach')
    await device.detach()
    const opened = await open(number)
    await failure('in-use', () => control.remove(number, { timeout: 20 }))
    const [removed] = await Promise.all([control.remove(number), opened.close()])
    expect(removed).toBe(number)
  })

  test('close waits, is idempotent, and everything after it is closed', async () => {
    const control = await LoopControl.open()
    const free = control.getFree()
    await Promise.all([control.close(), control.close()])
    expect(await free).toBeGreaterThanOrEqual(0)
    await failure('closed', () => control.getFree())
    await failure('closed', () => control.add())
    await failure('closed', () => control.remove(0))
  })
})
