import { execFileSync } from 'node:child_process'
import {
  closeSync,
  constants,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  statSync,
  truncateSync,
  writeSync,
} from 'node:fs'
import { setImmediate } from 'node:timers/promises'
import { describe, expect, inject } from 'vitest'
import { attach, doctor, LoopControl, LoopError } from '../../lib/index.ts'
import * as ioctl from '../../lib/ioctl.ts'
import { skipForKernel } from '../needs.ts'
import { contents, failure, losetup, loopFileName, openFile, sysfs, test, unusedNumber } from './support.ts'

const { LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO, LO_FLAGS_PARTSCAN, LO_FLAGS_READ_ONLY } = ioctl

const { O_EXCL, O_RDWR } = constants
const MiB = 1 << 20
const CONTROL = '/dev/loop-control'
const HIGHEST = 1_048_575

const features = inject('noKernel') === '' ? (await doctor()).features : {}

// A function and its ...Sync twin are called alike, and awaited alike: each test runs with both.

type Module = typeof ioctl
type FunctionName = { [K in keyof Module]: Module[K] extends (...values: never[]) => unknown ? K : never }[keyof Module]
type Name = Exclude<FunctionName, `${string}Sync`>
type Form = {
  readonly [N in Name]: (...values: Parameters<Module[N]>) => ReturnType<Module[N]> | Awaited<ReturnType<Module[N]>>
}
type AnyFunction = (...values: unknown[]) => unknown

const functions = Object.fromEntries(
  Object.entries(ioctl).filter(([, member]) => typeof member === 'function'),
) as unknown as Record<string, AnyFunction>

const atOnce = Object.fromEntries(
  Object.entries(functions)
    .filter(([name]) => name.endsWith('Sync'))
    .map(([name, operation]) => [name.slice(0, -'Sync'.length), operation]),
) as unknown as Form

const forms: readonly { form: string; call: Form }[] = [
  { form: 'as promises', call: ioctl },
  { form: 'at once', call: atOnce },
]

/** A descriptor that is closed with the block. */
function opened(path: string, flags: string | number = 'r+'): Disposable & { readonly fd: number } {
  const fd = openFile(path, flags)
  return { fd, [Symbol.dispose]: () => closeSync(fd) }
}

interface Device {
  readonly number: number
  readonly path: string
  /** Open with the test's flags. */
  readonly fd: number
}

/**
 * A free device on which `configure` attaches a file of the test's, and nothing else; detached with the block. Again
 * with another device where another program took this one first.
 */
async function attached(
  configure: (fd: number) => unknown,
  flags: string = 'r+',
): Promise<Device & AsyncDisposable & { cleared: boolean }> {
  using control = opened(CONTROL)
  for (let tries = 1; ; tries++) {
    const number = ioctl.loopCtlGetFreeSync(control.fd)
    const path = `/dev/loop${number}`
    let fd = -1
    try {
      fd = openSync(path, flags)
      await configure(fd)
    } catch (error) {
      if (fd >= 0) closeSync(fd)
      if (tries === 100 || !['EBUSY', 'ENXIO', 'ENOENT'].includes((error as LoopError).code)) throw error
      continue
    }
    const file = sysfs(number, 'loop/backing_file')
    const device = {
      number,
      path,
      fd,
      cleared: false, // by the test itself
      [Symbol.asyncDispose]: async () => {
        try {
          // K3: they would outlive the attachment.
          for (const partition of device.cleared ? [] : partitionNumbers(number)) {
            await patiently(() => ioctl.blkPgDelPartitionSync(fd, partition))
          }
        } finally {
          if (!device.cleared) ioctl.loopClrFdSync(fd)
          closeSync(fd)
        }
        if (file !== undefined) await gone(number, file)
      },
    }
    return device
  }
}

/** When the device is detached: somebody who only looks, as `losetup` does, can hold it for a moment longer. */
async function gone(number: number, file: string): Promise<void> {
  while (sysfs(number, 'loop/backing_file') === file) await setImmediate()
}

/** Makes a device of a high number, which nobody else uses; removed with the block. */
async function made(call: Form): Promise<Pick<Device, 'number' | 'path'> & AsyncDisposable & { removed: boolean }> {
  using control = opened(CONTROL)
  for (;;) {
    const number = unusedNumber()
    try {
      expect(await call.loopCtlAdd(control.fd, number)).toBe(number)
    } catch (error) {
      if (LoopError.is(error, 'device-exists')) continue // another program's, since
      throw error
    }
    const device = {
      number,
      path: `/dev/loop${number}`,
      removed: false,
      [Symbol.asyncDispose]: async () => {
        if (!device.removed) await remove(number)
      },
    }
    return device
  }
}

async function remove(number: number): Promise<void> {
  await using control = await LoopControl.open()
  await control.remove(number)
}

/** Again for as long as somebody else has it open: udev looks at whatever is new. */
async function patiently<T>(operation: () => T): Promise<Awaited<T>> {
  for (;;) {
    try {
      return await operation()
    } catch (error) {
      if (!LoopError.is(error) || error.code !== 'EBUSY') throw error
    }
    await setImmediate()
  }
}

function partitionNumbers(number: number): number[] {
  return readdirSync(`/sys/block/loop${number}`)
    .map((name) => /^loop\d+p(\d+)$/.exec(name)?.[1])
    .filter((digits) => digits !== undefined)
    .map(Number)
}

/** The line of /proc/partitions, in KiB; undefined where there is none. */
function procPartitions(name: string): number | undefined {
  const blocks = new RegExp(`^ *\\d+ +\\d+ +(\\d+) ${name}$`, 'm').exec(readFileSync('/proc/partitions', 'utf8'))?.[1]
  return blocks === undefined ? undefined : Number(blocks)
}

/** What util-linux says: the witness that issues the same request. */
function blockdev(option: string, path: string): string {
  return execFileSync('blockdev', [option, path], { encoding: 'utf8' }).trim()
}

function read(fd: number, length: number, position = 0): string {
  const bytes = Buffer.alloc(length)
  readSync(fd, bytes, 0, length, position)
  return bytes.toString()
}

function write(path: string, text: string, position = 0): void {
  using file = opened(path)
  writeSync(file.fd, text, position)
}

/**
 * The first open after an attach looks for partitions on some kernels (6.1), and so does one through a partition: what
 * was added by then would be gone.
 */
function scanNow(device: Device): void {
  closeSync(openFile(device.path, 'r'))
}

/** Undefined where it is EEXIST. */
async function unlessTaken(add: () => number | Promise<number>): Promise<number | undefined> {
  try {
    return await add()
  } catch (error) {
    if (LoopError.is(error, 'device-exists')) return undefined
    throw error
  }
}

async function refusal(code: string, operation: () => unknown): Promise<LoopError> {
  const error: unknown = await (async () => operation())().then(
    () => undefined,
    (reason: unknown) => reason,
  )
  if (!LoopError.is(error)) expect.fail(`wanted a LoopError of code ${code}, got ${String(error)}`)
  expect(error.code, error.message).toBe(code)
  expect(error.syscall).toBe('ioctl')
  return error
}

for (const { form, call } of forms) {
  describe(`the ioctls ${form}`, () => {
    test('do what the patch that brought loop-control shows: add, remove, get a free one, attach to it', async ({
      image,
    }) => {
      const file = image('disk', MiB, 0x41)
      await using added = await made(call)
      expect(sysfs(added.number, 'size')).toBe('0')
      using control = opened(CONTROL)
      await patiently(() => call.loopCtlRemove(control.fd, added.number))
      added.removed = true
      expect(sysfs(added.number, 'size')).toBe(undefined)

      {
        using backing = opened(file)
        // gets the free one, and the next where another program was faster
        await using device = await attached(async (fd) => call.loopSetFd(fd, backing.fd))
        expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
        expect(losetup(device.path)).toMatchObject({ 'back-file': file, 'ro': false, 'offset': 0, 'sizelimit': 0 })
        expect(contents(device.path).equals(contents(file))).toBe(true)
        await call.loopClrFd(device.fd)
        device.cleared = true
      }
      expect(execFileSync('losetup', ['--associated', file], { encoding: 'utf8' })).toBe('')
    })

    test('LOOP_CTL_ADD makes the device of that number, and only once', async () => {
      using control = opened(CONTROL)
      await using device = await made(call)
      expect(sysfs(device.number, 'dev')).toMatch(/^7:\d+$/)
      const error = await failure('device-exists', () => call.loopCtlAdd(control.fd, device.number))
      expect(error).toMatchObject({
        code: 'EEXIST',
        errno: -17,
        syscall: 'ioctl',
        ioctl: 'LOOP_CTL_ADD',
        path: CONTROL,
      })
    })

    test('LOOP_CTL_ADD of -1 makes one of a number that was not there', async () => {
      using control = opened(CONTROL)
      const before = readdirSync('/sys/block')
      const number = (await unlessTaken(() => call.loopCtlAdd(control.fd, -1))) ?? skipForKernel('LOOP_CTL_ADD of -1')
      try {
        expect(before).not.toContain(`loop${number}`)
        expect(readdirSync('/sys/block')).toContain(`loop${number}`)
      } finally {
        await remove(number)
      }
    })

    test('LOOP_CTL_REMOVE refuses what is attached, what is open, and what is not there', async ({ image }) => {
      using control = opened(CONTROL)
      const file = image('disk')
      await using device = await attach(file)
      expect(await failure('in-use', () => call.loopCtlRemove(control.fd, device.number))).toMatchObject({
        code: 'EBUSY',
        ioctl: 'LOOP_CTL_REMOVE',
      })
      expect(sysfs(device.number, 'loop/backing_file')).toBe(file)

      await using free = await made(call)
      {
        using user = opened(free.path, 'r')
        await failure('in-use', () => call.loopCtlRemove(control.fd, free.number))
        expect(await call.blkGetSize64(user.fd)).toBe(0n)
        expect(sysfs(free.number, 'size')).toBe('0')
      }
      // the number up to kernel 5.11, then 0
      expect([0, free.number]).toContain(await patiently(() => call.loopCtlRemove(control.fd, free.number)))
      free.removed = true
      expect(sysfs(free.number, 'size')).toBe(undefined)

      expect(await failure('no-such-device', () => call.loopCtlRemove(control.fd, HIGHEST))).toMatchObject({
        code: 'ENODEV',
      })
    })

    test('LOOP_CTL_GET_FREE names a device that is there, and never one that is attached', async ({ image }) => {
      using control = opened(CONTROL, 'r')
      await using device = await attach(image('disk'))
      const number = await call.loopCtlGetFree(control.fd)
      expect(number).not.toBe(device.number)
      expect(sysfs(number, 'dev')).toMatch(/^7:\d+$/)
    })

    test('LOOP_SET_FD is read-only where either descriptor is', async ({ image }) => {
      const file = image('disk')
      for (const [flags, backingFlags, readOnly] of [
        ['r+', 'r+', '0'],
        ['r+', 'r', '1'],
        ['r', 'r+', '1'],
      ] as const) {
        using backing = opened(file, backingFlags)
        await using device = await attached((fd) => call.loopSetFd(fd, backing.fd), flags)
        expect(sysfs(device.number, 'ro'), `${flags} on ${backingFlags}`).toBe(readOnly)
        expect((await call.loopGetStatus64(device.fd)).flags & LO_FLAGS_READ_ONLY).toBe(Number(readOnly))
      }
    })

    test('LOOP_SET_FD and LOOP_CONFIGURE tell what is wrong with the backing file', async ({ image }) => {
      await using lower = await made(call)
      await using device = await made(call)
      using own = opened(device.path)
      using free = opened(lower.path)
      using character = opened('/dev/null')
      using file = opened(image('disk'))
      for (const configure of [
        (backing: number) => call.loopSetFd(own.fd, backing),
        (backing: number) => call.loopConfigure(own.fd, { fd: backing }),
      ]) {
        expect(await failure('closed', () => configure(0x7fff_ffff))).toMatchObject({
          code: 'EBADF',
          path: device.path,
        })
        expect(await failure('not-a-file-or-block-device', () => configure(character.fd))).toMatchObject({
          code: 'EINVAL',
          backingFile: '/dev/null',
        })
        await failure('backing-loop-not-attached', () => configure(free.fd))
        await failure('backed-by-itself', () => configure(own.fd))
        expect(sysfs(device.number, 'loop/backing_file')).toBe(undefined)
      }
      await call.loopSetFd(own.fd, file.fd)
      try {
        expect(await failure('already-attached', () => call.loopSetFd(own.fd, file.fd))).toMatchObject({
          code: 'EBUSY',
        })
      } finally {
        ioctl.loopClrFdSync(own.fd)
      }
    })

    test('LOOP_CONFIGURE sets everything in one step', async ({ image }) => {
      const file = image('disk')
      write(file, 'window', 4096)
      using backing = opened(file)
      const flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN | LO_FLAGS_DIRECT_IO
      const fileName = `${'é'.repeat(31)}!` // 63 bytes
      await using device = await attached((fd) =>
        call.loopConfigure(fd, {
          fd: backing.fd,
          blockSize: 4096,
          info: { offset: 4096n, sizeLimit: 65_536n, flags, fileName },
        }),
      )
      const { number, path } = device
      expect(sysfs(number, 'loop/backing_file')).toBe(file)
      expect(sysfs(number, 'loop/offset')).toBe('4096')
      expect(sysfs(number, 'loop/sizelimit')).toBe('65536')
      expect(sysfs(number, 'size')).toBe('128')
      expect(sysfs(number, 'queue/logical_block_size')).toBe('4096')
      expect(sysfs(number, 'ro')).toBe('1')
      expect(sysfs(number, 'loop/autoclear')).toBe('1')
      expect(sysfs(number, 'loop/partscan')).toBe('1')
      expect(sysfs(number, 'loop/dio')).toBe('1')
      expect(losetup(path)).toMatchObject({ offset: 4096, sizelimit: 65_536, autoclear: true, ro: true })
      expect(loopFileName(path)).toBe(fileName)
      expect(read(device.fd, 6)).toBe('window')
      const { dev, ino } = statSync(file, { bigint: true })
      expect(await call.loopGetStatus64(device.fd)).toEqual({
        device: dev,
        inode: ino,
        rdevice: 0n,
        offset: 4096n,
        sizeLimit: 65_536n,
        number,
        flags,
        fileName,
      })
    })

    test('LOOP_CONFIGURE with nothing but a file shows all of it; undefined is absent', async ({ image }) => {
      const file = image('disk', MiB, 0x42)
      using backing = opened(file)
      await using device = await attached((fd) =>
        call.loopConfigure(fd, { fd: backing.fd, blockSize: undefined, info: undefined }),
      )
      expect(await call.loopGetStatus64(device.fd)).toMatchObject({ offset: 0n, sizeLimit: 0n, flags: 0, fileName: '' })
      expect(sysfs(device.number, 'ro')).toBe('0')
      expect(contents(device.path).equals(contents(file))).toBe(true)
    })

    test('LOOP_GET_STATUS64 names the device below where that is the backing file', async ({ image }) => {
      await using lower = await attach(image('disk'))
      using backing = opened(lower.path)
      await using upper = await attached((fd) => call.loopSetFd(fd, backing.fd))
      const { dev, ino, rdev } = statSync(lower.path, { bigint: true })
      expect(await call.loopGetStatus64(upper.fd)).toMatchObject({ device: dev, inode: ino, rdevice: rdev })
      expect(sysfs(upper.number, 'loop/backing_file')).toBe(lower.path)
    })

    test('offsets and size limits beyond 40 bits survive exactly', async ({ image }) => {
      const far = 2n ** 40n + 512n
      const file = image('sparse', 2 ** 40 + 2 ** 30)
      write(file, 'far', Number(far))
      using backing = opened(file)
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd))
      expect(await call.blkGetSize64(device.fd)).toBe(2n ** 40n + 2n ** 30n)
      expect(blockdev('--getsize64', device.path)).toBe(String(2n ** 40n + 2n ** 30n))

      await call.loopSetStatus64(device.fd, { offset: far, sizeLimit: far })
      expect(await call.loopGetStatus64(device.fd)).toMatchObject({ offset: far, sizeLimit: far })
      expect(sysfs(device.number, 'loop/offset')).toBe('1099511628288')
      expect(sysfs(device.number, 'loop/sizelimit')).toBe('1099511628288')
      expect(losetup(device.path)).toMatchObject({ offset: Number(far), sizelimit: Number(far) })
      expect(await call.blkGetSize64(device.fd)).toBe(2n ** 30n - 512n) // what is left behind the offset
      expect(read(device.fd, 3)).toBe('far')

      // as a whole: the offset that is not named is 0
      await call.loopSetStatus64(device.fd, { sizeLimit: far })
      expect(sysfs(device.number, 'loop/offset')).toBe('0')
      expect(await call.blkGetSize64(device.fd)).toBe(far)
      expect(sysfs(device.number, 'size')).toBe(String(far / 512n))
    })

    test('LOOP_SET_STATUS64 sets autoclear and the file name, and clears them', async ({ image }) => {
      using backing = opened(image('disk'))
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd))
      await call.loopSetStatus64(device.fd, { flags: LO_FLAGS_AUTOCLEAR, fileName: 'a tag' })
      expect(sysfs(device.number, 'loop/autoclear')).toBe('1')
      expect(loopFileName(device.path)).toBe('a tag')
      expect(await call.loopGetStatus64(device.fd)).toMatchObject({ flags: LO_FLAGS_AUTOCLEAR, fileName: 'a tag' })
      await call.loopSetStatus64(device.fd, { flags: 0, fileName: '' })
      expect(sysfs(device.number, 'loop/autoclear')).toBe('0')
      expect(loopFileName(device.path)).toBe('')
    })

    test('LOOP_CHANGE_FD changes the bytes of a read-only device, and nothing else', async ({ image }) => {
      const first = image('first', MiB, 0x41)
      const second = image('second', MiB, 0x42)
      using backing = opened(first, 'r')
      using other = opened(second, 'r')
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd))
      expect(contents(device.path).equals(contents(first))).toBe(true)
      await call.loopChangeFd(device.fd, other.fd)
      expect(sysfs(device.number, 'loop/backing_file')).toBe(second)
      expect(losetup(device.path)).toMatchObject({ 'back-file': second, 'ro': true })
      // 5.10 leaves in the page cache what was read before
      await call.blkFlsBuf(device.fd)
      expect(contents(device.path).equals(contents(second))).toBe(true)
    })

    test('LOOP_CHANGE_FD refuses a writable device, another size, and what is no file', async ({ image }) => {
      const file = image('disk')
      using backing = opened(file)
      using same = opened(image('same'))
      using larger = opened(image('larger', 2 * MiB))
      using character = opened('/dev/null')
      {
        await using writable = await attached((fd) => call.loopSetFd(fd, backing.fd))
        const error = await failure('not-read-only', () => call.loopChangeFd(writable.fd, same.fd))
        expect(error).toMatchObject({ code: 'EINVAL', ioctl: 'LOOP_CHANGE_FD', path: writable.path })
        expect(sysfs(writable.number, 'loop/backing_file')).toBe(file)
      }
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd), 'r')
      const otherSize = await refusal('EINVAL', () => call.loopChangeFd(device.fd, larger.fd))
      expect(otherSize.ioctl).toBe('LOOP_CHANGE_FD')
      expect(['size-mismatch', 'unknown']).toContain(otherSize.reason)
      await failure('not-a-file-or-block-device', () => call.loopChangeFd(device.fd, character.fd))
      await failure('closed', () => call.loopChangeFd(device.fd, 0x7fff_ffff))
      expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
    })

    test('a free device answers not-attached to what needs a backing file', async ({ image }) => {
      await using free = await made(call)
      // exclusively: so nobody else can attach to it, and be detached by what follows
      using device = opened(free.path, O_RDWR | O_EXCL)
      expect(sysfs(free.number, 'loop/backing_file')).toBe(undefined)
      using backing = opened(image('disk'))
      for (const operation of [
        () => call.loopClrFd(device.fd),
        () => call.loopChangeFd(device.fd, backing.fd),
        () => call.loopGetStatus64(device.fd),
        () => call.loopSetStatus64(device.fd, { offset: 512n }),
        () => call.loopSetCapacity(device.fd),
        () => call.loopSetDirectIo(device.fd, true),
        () => call.loopSetBlockSize(device.fd, 1024),
      ]) {
        const error = await failure('not-attached', operation)
        expect(error, error.ioctl).toMatchObject({ code: 'ENXIO', errno: -6, syscall: 'ioctl', path: free.path })
      }
      expect(await call.blkGetSize64(device.fd)).toBe(0n)
      expect(await call.blkSszGet(device.fd)).toBe(512)
    })

    test('LOOP_SET_CAPACITY takes over the size of the file, larger and smaller', async ({ image }) => {
      const file = image('disk')
      using backing = opened(file)
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd))
      for (const bytes of [3 * MiB, MiB / 2]) {
        const before = sysfs(device.number, 'size')
        truncateSync(file, bytes)
        expect(sysfs(device.number, 'size'), 'not by itself').toBe(before)
        await call.loopSetCapacity(device.fd)
        expect(sysfs(device.number, 'size')).toBe(String(bytes / 512))
        expect(await call.blkGetSize64(device.fd)).toBe(BigInt(bytes))
        expect(blockdev('--getsize64', device.path)).toBe(String(bytes))
      }
    })

    test('LOOP_SET_DIRECT_IO turns it on and off, or says that it cannot', async ({ image }) => {
      using backing = opened(image('disk'))
      await using device = await attached((fd) => call.loopConfigure(fd, { fd: backing.fd, blockSize: 4096 }))
      for (const enabled of [true, false]) {
        await call.loopSetDirectIo(device.fd, enabled)
        expect(sysfs(device.number, 'loop/dio')).toBe(enabled ? '1' : '0')
        expect(losetup(device.path)).toMatchObject({ dio: enabled })
        expect((await call.loopGetStatus64(device.fd)).flags).toBe(enabled ? LO_FLAGS_DIRECT_IO : 0)
      }
      await call.loopSetStatus64(device.fd, { offset: 100n }) // of no block size a multiple
      expect(await failure('direct-io-unavailable', () => call.loopSetDirectIo(device.fd, true))).toMatchObject({
        code: 'EINVAL',
        ioctl: 'LOOP_SET_DIRECT_IO',
      })
      expect(sysfs(device.number, 'loop/dio')).toBe('0')
    })

    test('LOOP_SET_BLOCK_SIZE, and BLKSSZGET sees it', async ({ image }) => {
      using backing = opened(image('disk'))
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd))
      for (const bytes of [4096, 1024, 2048, 512]) {
        await patiently(() => call.loopSetBlockSize(device.fd, bytes))
        expect(sysfs(device.number, 'queue/logical_block_size')).toBe(String(bytes))
        expect(await call.blkSszGet(device.fd)).toBe(bytes)
        expect(blockdev('--getss', device.path)).toBe(String(bytes))
      }
    })

    test('BLKGETDISKSEQ is the number in sysfs, and another one for every attachment', async ({ image }) => {
      if (!features['diskSeq']) skipForKernel('disk sequence numbers')
      using backing = opened(image('disk'))
      let free = 0n
      await using device = await attached(async (fd) => {
        free = await call.blkGetDiskSeq(fd)
        await call.loopSetFd(fd, backing.fd)
      })
      const diskSeq = await call.blkGetDiskSeq(device.fd)
      expect(sysfs(device.number, 'diskseq')).toBe(String(diskSeq))
      // K14, 5.15 to 6.4: attaching does not move it
      if (features['diskSeqPerAttachment']) expect(diskSeq).toBeGreaterThan(free)
      else expect(diskSeq).toBeGreaterThanOrEqual(free)
    })

    test('BLKROSET makes the device read-only and writable again, and BLKROGET sees it', async ({ image }) => {
      using backing = opened(image('disk'))
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd))
      try {
        expect(await call.blkRoGet(device.fd)).toBe(false)
        await call.blkRoSet(device.fd, true)
        expect(await call.blkRoGet(device.fd)).toBe(true)
        expect(sysfs(device.number, 'ro')).toBe('1')
        expect(blockdev('--getro', device.path)).toBe('1')
        expect(() => writeSync(device.fd, 'x', 0)).toThrow('EPERM')
      } finally {
        await call.blkRoSet(device.fd, false) // K5: the next attachment would be read-only too
      }
      expect(sysfs(device.number, 'ro')).toBe('0')
      expect(writeSync(device.fd, 'x', 0)).toBe(1)
    })

    test('BLKFLSBUF writes out what is in the page cache, and drops it', async ({ image }) => {
      const file = image('disk')
      using backing = opened(file)
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd))
      writeSync(device.fd, 'written through the device', 4096)
      await call.blkFlsBuf(device.fd)
      expect(contents(file).subarray(4096, 4122).toString()).toBe('written through the device')

      write(file, 'changed behind the device ', 4096)
      await call.blkFlsBuf(device.fd)
      expect(read(device.fd, 26, 4096)).toBe('changed behind the device ')
    })

    test('BLKPG adds, resizes and deletes a partition', async ({ image }) => {
      const file = image('disk', 4 * MiB)
      write(file, 'second MiB', MiB)
      using backing = opened(file)
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd))
      const name = `loop${device.number}p3`
      const start = BigInt(MiB)

      scanNow(device)
      await call.blkPgAddPartition(device.fd, { number: 3, start, length: start })
      expect(partitionNumbers(device.number)).toEqual([3])
      expect(sysfs(device.number, `${name}/start`)).toBe('2048')
      expect(sysfs(device.number, `${name}/size`)).toBe('2048')
      expect(procPartitions(name)).toBe(1024)
      {
        using partition = opened(`/dev/${name}`, 'r')
        expect(read(partition.fd, 10)).toBe('second MiB')
        // in use
        expect(await refusal('EBUSY', () => call.blkPgDelPartition(device.fd, 3))).toMatchObject({ ioctl: 'BLKPG' })
      }

      await call.blkPgResizePartition(device.fd, { number: 3, start, length: start * 2n + 512n })
      expect(sysfs(device.number, `${name}/size`)).toBe('4097')
      expect(procPartitions(name)).toBe(2048)

      await refusal('EBUSY', () => call.blkPgAddPartition(device.fd, { number: 3, start: 0n, length: 512n }))
      await refusal('EBUSY', () => call.blkPgAddPartition(device.fd, { number: 4, start: start + 512n, length: 512n }))
      await refusal('EINVAL', () => call.blkPgAddPartition(device.fd, { number: 4, start: 1n, length: 512n }))
      await refusal('EINVAL', () => call.blkPgResizePartition(device.fd, { number: 3, start: 0n, length: 512n }))
      await refusal('ENXIO', () => call.blkPgResizePartition(device.fd, { number: 4, start, length: start }))
      await refusal('ENXIO', () => call.blkPgDelPartition(device.fd, 4))
      expect(partitionNumbers(device.number)).toEqual([3])
      expect(sysfs(device.number, `${name}/start`)).toBe('2048')
      expect(sysfs(device.number, `${name}/size`)).toBe('4097')

      await patiently(() => call.blkPgDelPartition(device.fd, 3))
      expect(partitionNumbers(device.number)).toEqual([])
      expect(procPartitions(name)).toBe(undefined)
      expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
    })

    test('BLKRRPART reads the table again where partscan is on, else it is EINVAL', async ({ image }) => {
      using backing = opened(image('disk', 4 * MiB))
      await using device = await attached((fd) => call.loopSetFd(fd, backing.fd))
      expect(await refusal('EINVAL', () => call.blkRrPart(device.fd))).toMatchObject({ ioctl: 'BLKRRPART' })

      await call.loopSetStatus64(device.fd, { flags: LO_FLAGS_PARTSCAN })
      expect(sysfs(device.number, 'loop/partscan')).toBe('1')
      await call.blkPgAddPartition(device.fd, { number: 1, start: BigInt(MiB), length: BigInt(MiB) })
      expect(partitionNumbers(device.number)).toEqual([1])
      await patiently(() => call.blkRrPart(device.fd))
      // the image has no table, so by the kernel's reading no partition
      expect(partitionNumbers(device.number)).toEqual([])
    })

    test('a device that is open for reading only is enough for what only looks', async ({ image }) => {
      await using device = await attach(image('disk'), { blockSize: 1024 })
      using plain = opened(device.path, 'r')
      expect(await call.blkGetSize64(plain.fd)).toBe(BigInt(MiB))
      expect(await call.blkSszGet(plain.fd)).toBe(1024)
      expect(await call.blkRoGet(plain.fd)).toBe(false)
      expect((await call.loopGetStatus64(plain.fd)).number).toBe(device.number)
    })
  })
}

type Rest<N extends Name> = Parameters<Module[N]> extends [number, ...infer Others] ? Others : never

/** What each function takes behind its descriptor, all of it good: in the tests below only the descriptor is not. */
function goodArguments(backingFd: number): { readonly [N in Name]: Rest<N> } {
  const range = { number: 1, start: 0n, length: 512n }
  return {
    loopCtlAdd: [HIGHEST],
    loopCtlRemove: [HIGHEST],
    loopCtlGetFree: [],
    loopSetFd: [backingFd],
    loopChangeFd: [backingFd],
    loopClrFd: [],
    loopConfigure: [{ fd: backingFd, blockSize: 512, info: { offset: 512n, sizeLimit: 512n, fileName: 'a tag' } }],
    loopGetStatus64: [],
    loopSetStatus64: [{ offset: 512n }],
    loopSetCapacity: [],
    loopSetDirectIo: [true],
    loopSetBlockSize: [1024],
    blkGetSize64: [],
    blkGetDiskSeq: [],
    blkSszGet: [],
    blkRoGet: [],
    blkRoSet: [true],
    blkFlsBuf: [],
    blkRrPart: [],
    blkPgAddPartition: [range],
    blkPgResizePartition: [range],
    blkPgDelPartition: [1],
  }
}

const names = Object.keys(goodArguments(0)) as Name[]
const ofControl = names.filter((name) => name.startsWith('loopCtl'))
const ofDevices = names.filter((name) => !name.startsWith('loopCtl'))

/** How a function fails: the ...Sync one throws; the other one rejects, and throws never. */
async function ending(name: string, values: readonly unknown[]): Promise<Error & { code?: unknown }> {
  const operation = functions[name]
  let error: unknown
  if (name.endsWith('Sync')) {
    try {
      operation?.(...values)
    } catch (caught) {
      error = caught
    }
  } else {
    const promise = operation?.(...values)
    expect(promise, name).toBeInstanceOf(Promise)
    error = await (promise as Promise<unknown>).then(
      () => undefined,
      (reason: unknown) => reason,
    )
  }
  if (!(error instanceof Error)) expect.fail(`${name}: wanted an error, got ${String(error)}`)
  return error
}

function show(value: unknown): string {
  return typeof value === 'bigint' ? `${value}n` : (JSON.stringify(value) ?? 'undefined')
}

/** That all of these functions, in both forms, refuse that descriptor. */
async function expectRefused(
  refused: readonly Name[],
  fd: number,
  backingFd: number,
  reason: 'not-a-loop-device' | 'closed',
): Promise<void> {
  const good = goodArguments(backingFd)
  for (const name of refused.flatMap((each) => [each, `${each}Sync` as const])) {
    const error = await ending(name, [fd, ...good[name.replace(/Sync$/, '') as Name]])
    expect(error, name).toBeInstanceOf(LoopError)
    expect(error, name).toMatchObject({
      reason,
      code: reason === 'closed' ? 'EBADF' : 'ENOTTY',
      errno: reason === 'closed' ? -9 : -25,
      syscall: 'ioctl',
      ioctl: expect.stringMatching(name.startsWith('loop') ? /^LOOP_/ : /^BLK/),
    })
  }
}

describe('every function of loopctl/ioctl', () => {
  test('is in the table of these tests, and exists in both forms', () => {
    expect(Object.keys(functions).toSorted()).toEqual(names.flatMap((name) => [name, `${name}Sync`]).toSorted())
  })

  test('refuses a plain file', async ({ folder, image }) => {
    using backing = opened(image('disk'))
    using file = opened(`${folder}/disk`)
    await expectRefused(names, file.fd, backing.fd, 'not-a-loop-device')
  })

  test('refuses another character device', async ({ image }) => {
    using backing = opened(image('disk'))
    using other = opened('/dev/null')
    await expectRefused(names, other.fd, backing.fd, 'not-a-loop-device')
  })

  const withBackingFile = new Set<Name>(['loopSetFd', 'loopChangeFd', 'loopConfigure'])

  test('refuses a number that is no open descriptor', async ({ image }) => {
    using backing = opened(image('disk'))
    await expectRefused(
      names.filter((name) => !withBackingFile.has(name)),
      0x7fff_ffff,
      backing.fd,
      'closed',
    )
  })

  test('refuses a number that is no open descriptor, with a backing file too', async ({ image }) => {
    using backing = opened(image('disk'))
    await expectRefused([...withBackingFile], 0x7fff_ffff, backing.fd, 'closed')
  })

  test('refuses a partition, and does not touch the device around it', async ({ image }) => {
    const file = image('disk')
    using backing = opened(file)
    using other = opened(image('other'))
    await using device = await attached((fd) =>
      ioctl.loopConfigureSync(fd, { fd: backing.fd, info: { fileName: 'before' } }),
    )
    scanNow(device)
    ioctl.blkPgAddPartitionSync(device.fd, { number: 1, start: 4096n, length: 8192n })
    const before = ioctl.loopGetStatus64Sync(device.fd)
    {
      using partition = opened(`/dev/loop${device.number}p1`)
      await expectRefused(names, partition.fd, other.fd, 'not-a-loop-device')
    }
    expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
    expect(sysfs(device.number, 'loop/autoclear'), 'LOOP_CLR_FD would have set it').toBe('0')
    expect(sysfs(device.number, 'queue/logical_block_size')).toBe('512')
    expect(sysfs(device.number, 'ro')).toBe('0')
    expect(partitionNumbers(device.number)).toEqual([1])
    expect(ioctl.loopGetStatus64Sync(device.fd)).toEqual(before)
    await patiently(() => ioctl.blkPgDelPartitionSync(device.fd, 1))
  })

  test('of /dev/loop-control refuses a loop device', async ({ image }) => {
    using backing = opened(image('disk'))
    await using device = await attached((fd) => ioctl.loopSetFdSync(fd, backing.fd))
    await expectRefused(ofControl, device.fd, backing.fd, 'not-a-loop-device')
  })

  test('of a loop device refuses /dev/loop-control', async ({ image }) => {
    using backing = opened(image('disk'))
    using control = opened(CONTROL)
    await expectRefused(ofDevices, control.fd, backing.fd, 'not-a-loop-device')
  })

  test('throws a TypeError or RangeError with the code of Node for what is no descriptor', async ({ image }) => {
    using backing = opened(image('disk'))
    const good = goodArguments(backing.fd)
    for (const name of names.flatMap((each) => [each, `${each}Sync` as const])) {
      const rest = good[name.replace(/Sync$/, '') as Name]
      for (const fd of ['x', '0', undefined, null, 1n, true, { fd: 0 }]) {
        const error = await ending(name, [fd, ...rest])
        expect(error, `${name} of ${show(fd)}`).toBeInstanceOf(TypeError)
        expect(error.code, `${name} of ${show(fd)}`).toBe('ERR_INVALID_ARG_TYPE')
      }
      for (const fd of [1.5, -1, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 31, 2 ** 32]) {
        const error = await ending(name, [fd, ...rest])
        expect(error, `${name} of ${fd}`).toBeInstanceOf(RangeError)
        expect(error.code, `${name} of ${fd}`).toBe('ERR_OUT_OF_RANGE')
      }
    }
  })
})

describe('arguments that are refused before any system call', () => {
  const TYPE = { name: 'TypeError', code: 'ERR_INVALID_ARG_TYPE' }
  const VALUE = { name: 'TypeError', code: 'ERR_INVALID_ARG_VALUE' }
  const RANGE = { name: 'RangeError', code: 'ERR_OUT_OF_RANGE' }
  type Row = readonly [name: Name, rest: readonly unknown[], error: typeof TYPE]

  async function expectAll(rows: readonly Row[], fd: number): Promise<void> {
    for (const [name, rest, expected] of rows) {
      for (const form of [name, `${name}Sync`]) {
        const error = await ending(form, [fd, ...rest])
        const { name: type, code } = error
        expect({ name: type, code }, `${form}: ${error.message}`).toEqual(expected)
      }
    }
  }

  test('numbers of devices', async () => {
    using control = opened(CONTROL)
    await expectAll(
      [
        ['loopCtlAdd', [HIGHEST + 1], RANGE],
        ['loopCtlAdd', [2 ** 32 + HIGHEST], RANGE], // the kernel would look at 32 bits
        ['loopCtlAdd', [-2], RANGE],
        ['loopCtlAdd', [0.5], RANGE],
        ['loopCtlAdd', [Number.NaN], RANGE],
        ['loopCtlAdd', ['7'], TYPE],
        ['loopCtlAdd', [7n], TYPE],
        ['loopCtlAdd', [], TYPE],
        ['loopCtlRemove', [-1], RANGE], // up to 5.13 this removes the first free device
        ['loopCtlRemove', [HIGHEST + 1], RANGE],
        ['loopCtlRemove', [2 ** 32 + HIGHEST], RANGE],
        ['loopCtlRemove', [], TYPE],
      ],
      control.fd,
    )
    expect(sysfs(HIGHEST + 1, 'size')).toBe(undefined)
    expect(sysfs(HIGHEST, 'size')).toBe(undefined)
  })

  test('what would be set on a device', async ({ image }) => {
    await using device = await attach(image('disk'), { offset: 4096, sizeLimit: 8192, reference: 'before' })
    using target = opened(device.path)
    using backing = opened(image('other'))
    const before = ioctl.loopGetStatus64Sync(target.fd)
    const { fd } = backing
    const infos: [unknown, typeof TYPE][] = [
      [{ offset: -1n }, RANGE],
      [{ offset: 2n ** 63n }, RANGE],
      [{ offset: 4096 }, TYPE],
      [{ offset: '4096' }, TYPE],
      [{ sizeLimit: -1n }, RANGE],
      [{ sizeLimit: 2n ** 63n }, RANGE],
      [{ sizeLimit: 4096 }, TYPE],
      [{ fileName: 'x'.repeat(64) }, RANGE],
      [{ fileName: 'é'.repeat(32) }, RANGE],
      [{ fileName: 'x\0y' }, VALUE],
      [{ fileName: 7 }, TYPE],
      [{ flags: -1 }, RANGE],
      [{ flags: 2 ** 32 }, RANGE],
      [{ flags: 1n }, TYPE],
      [{ number: -1 }, RANGE],
      [{ device: -1n }, RANGE],
      [{ inode: 2n ** 64n }, RANGE],
      [{ rdevice: 0 }, TYPE],
      [{ offsett: 0n }, VALUE],
      [null, TYPE],
      ['info', TYPE],
      [[], TYPE],
    ]
    const blockSizes: [unknown, typeof TYPE][] = [
      [1000, RANGE],
      [256, RANGE],
      [0, RANGE],
      [-512, RANGE],
      [512.5, RANGE],
      [131_072, RANGE],
      [2 ** 32 + 512, RANGE], // the kernel would look at 32 bits
      [Number.NaN, RANGE],
      ['512', TYPE],
      [512n, TYPE],
    ]
    await expectAll(
      [
        ...infos.flatMap(([info, error]): Row[] => [
          ['loopSetStatus64', [info], error],
          ['loopConfigure', [{ fd, info }], error],
        ]),
        ...blockSizes.flatMap(([blockSize, error]): Row[] => [
          ['loopSetBlockSize', [blockSize], error],
          ['loopConfigure', [{ fd, blockSize }], error],
        ]),
        ['loopConfigure', [{ fd, offset: 0n }], VALUE], // belongs in info
        ['loopConfigure', [{}], TYPE],
        ['loopConfigure', [undefined], TYPE],
        ['loopConfigure', [null], TYPE],
        ['loopConfigure', [fd], TYPE],
        ['loopConfigure', [{ fd: -1 }], RANGE],
        ['loopSetFd', [], TYPE],
        ['loopSetFd', ['x'], TYPE],
        ['loopSetFd', [-1], RANGE],
        ['loopChangeFd', [], TYPE],
        ['loopChangeFd', [1.5], RANGE],
        ['loopSetBlockSize', [], TYPE],
        ['loopSetDirectIo', [1], TYPE],
        ['loopSetDirectIo', [], TYPE],
        ['blkRoSet', [1], TYPE],
        ['blkRoSet', ['false'], TYPE],
        ['blkPgAddPartition', [{ number: 0, start: 0n, length: 512n }], RANGE],
        ['blkPgAddPartition', [{ number: 1, start: -1n, length: 512n }], RANGE],
        ['blkPgAddPartition', [{ number: 1, start: 0n, length: 2n ** 63n }], RANGE],
        ['blkPgAddPartition', [{ number: 1, start: 0, length: 512n }], TYPE],
        ['blkPgAddPartition', [{ number: 1, start: 0n }], TYPE],
        ['blkPgResizePartition', [{ number: 2 ** 31, start: 0n, length: 512n }], RANGE],
        ['blkPgDelPartition', [0], RANGE],
        ['blkPgDelPartition', ['1'], TYPE],
      ],
      target.fd,
    )
    expect(ioctl.loopGetStatus64Sync(target.fd)).toEqual(before)
    expect(sysfs(device.number, 'queue/logical_block_size')).toBe('512')
    expect(sysfs(device.number, 'ro')).toBe('0')
    expect(partitionNumbers(device.number)).toEqual([])
  })

  test('block sizes a hair beside a power of two', async ({ image }) => {
    await using device = await attach(image('disk'))
    using target = opened(device.path)
    using backing = opened(image('other'))
    const blockSize = 512.000_000_000_000_1
    await expectAll(
      [
        ['loopSetBlockSize', [blockSize], RANGE],
        ['loopConfigure', [{ fd: backing.fd, blockSize }], RANGE],
      ],
      target.fd,
    )
  })

  test('no range of a partition at all', async ({ image }) => {
    await using device = await attach(image('disk'))
    using target = opened(device.path)
    await expectAll(
      [
        ['blkPgAddPartition', [], TYPE],
        ['blkPgResizePartition', [null], TYPE],
      ],
      target.fd,
    )
  })

  test('a range of a partition with an unknown member', async ({ image }) => {
    await using device = await attach(image('disk'))
    using target = opened(device.path)
    const range = { number: 300, start: 0n, length: 512n } // of a number that the kernel has no room for
    await expectAll([['blkPgAddPartition', [{ ...range, lenght: 1024n }], VALUE]], target.fd)
  })
})
