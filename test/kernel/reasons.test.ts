import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdirSync, openSync, truncateSync } from 'node:fs'
import { createInterface } from 'node:readline/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, onTestFinished } from 'vitest'
import { attach, LoopControl, type LoopDevice, type LoopError } from '../../lib/index.ts'
import { binding } from '../../lib/kernel/binding.ts'
import { encodeConfig } from '../../lib/kernel/uapi.ts'
import * as ioctl from '../../lib/ioctl.ts'
import { explain } from '../../lib/errors/explain.ts'
import { OWN_DEV, privately } from './environments.ts'
import { skipForKernel } from '../needs.ts'
import { failure, openFile, sysfs, test, unusedNumber } from './support.ts'

const MiB = 1 << 20
const EINVAL = -22
const O_PATH = 0o10000000
/** A regular file that the kernel can read only byte by byte into a buffer of user space. */
const ODD_FILE = '/proc/self/environ'

/** Runs with a descriptor of the file, and closes it. */
async function withFile<T>(path: string, use: (fd: number) => T, flags: string | number = 'r'): Promise<Awaited<T>> {
  const fd = openFile(path, flags)
  try {
    return await use(fd)
  } finally {
    closeSync(fd)
  }
}

/** A free device of a number that nobody else uses, which goes again. */
async function withFreeDevice(use: (fd: number, number: number) => Promise<void>): Promise<void> {
  await using control = await LoopControl.open()
  const number = await control.add(unusedNumber())
  try {
    await withFile(`/dev/loop${number}`, (fd) => use(fd, number), 'r+')
  } finally {
    await control.remove(number)
  }
}

/** Skips the test where the driver takes such a file without looking. */
async function needsLookAtFile(): Promise<void> {
  let isTaken = false
  await withFreeDevice((fd) =>
    withFile(ODD_FILE, async (backingFd) => {
      try {
        await ioctl.loopSetFd(fd, backingFd)
        isTaken = true
        await ioctl.loopClrFd(fd)
      } catch {
        // It is refused: what the test wants.
      }
    }),
  )
  if (isTaken) skipForKernel('look at the file')
}

/** Both twins fail with that reason, from EINVAL if not said otherwise, and with that message. */
async function bothFail(
  reason: LoopError['reason'],
  message: RegExp,
  asynchronous: () => Promise<unknown>,
  synchronous: () => unknown,
  code = 'EINVAL',
): Promise<void> {
  for (const error of [await failure(reason, asynchronous), await failure(reason, synchronous)]) {
    expect(error.message).toMatch(message)
    expect(error.code).toBe(code)
  }
}

/** LOOP_CHANGE_FD to that file fails so. */
const changing = async (
  device: LoopDevice,
  path: string,
  reason: LoopError['reason'],
  message: RegExp,
  code?: string,
  flags?: number,
) =>
  withFile(
    path,
    (fd) =>
      bothFail(
        reason,
        message,
        () => ioctl.loopChangeFd(device.fd, fd),
        () => ioctl.loopChangeFdSync(device.fd, fd),
        code,
      ),
    flags,
  )

/** LOOP_CONFIGURE with that file fails so. */
const configuring = (fd: number, path: string, reason: LoopError['reason'], message: RegExp, flags?: number) =>
  withFile(
    path,
    (backingFd) =>
      bothFail(
        reason,
        message,
        () => ioctl.loopConfigure(fd, { fd: backingFd }),
        () => ioctl.loopConfigureSync(fd, { fd: backingFd }),
      ),
    flags,
  )

describe('EINVAL from LOOP_CHANGE_FD', () => {
  test('the device is writable', async ({ image }) => {
    await using device = await attach(image('image'))
    await changing(device, image('other'), 'not-read-only', /writable device/)
  })

  test('the device was made read-only by BLKROSET, which does not count', async ({ image }) => {
    await using device = await attach(image('image'))
    await ioctl.blkRoSet(device.fd, true)
    try {
      await withFile(image('other'), async (fd) => {
        await failure('not-read-only', () => ioctl.loopChangeFd(device.fd, fd))
      })
    } finally {
      await ioctl.blkRoSet(device.fd, false)
    }
  })

  test('a directory, a character device, a FIFO', async ({ image, folder }) => {
    await using device = await attach(image('image'), { readOnly: true })
    const fifo = join(folder, 'fifo')
    execFileSync('mkfifo', [fifo])
    await changing(device, folder, 'not-a-file-or-block-device', /is a directory/)
    await changing(device, '/dev/null', 'not-a-file-or-block-device', /is a character device/)
    const O_RDWR = 2
    await changing(device, fifo, 'not-a-file-or-block-device', /is a FIFO/, 'EINVAL', O_RDWR)
  })

  test('a file that the driver cannot read: no read_iter', async ({ image }) => {
    await needsLookAtFile()
    await using device = await attach(image('image'), { readOnly: true, sizeLimit: 512 })
    await using empty = await attach(image('empty', 0), { readOnly: true })
    expect(sysfs(empty.number, 'size')).toBe('0')
    await changing(empty, ODD_FILE, 'not-a-file-or-block-device', /of that filesystem \(proc\)/)
    await changing(device, ODD_FILE, 'not-a-file-or-block-device', /of that filesystem \(proc\)/)
  })

  test('a loop device that is backed by nothing', async ({ image }) => {
    await using device = await attach(image('image'), { readOnly: true })
    await withFreeDevice(async (_, number) => {
      await changing(device, `/dev/loop${number}`, 'backing-loop-not-attached', new RegExp(`/dev/loop${number}`))
    })
  })

  test('larger, smaller, by what offset and size limit leave', async ({ image }) => {
    const [file, larger, smaller] = [image('image', 10_240), image('larger', 14_336), image('smaller', 6_144)]
    await using device = await attach(file, { readOnly: true, offset: 4096 })
    await changing(device, larger, 'size-mismatch', /4096 bytes larger \(10240, must be 6144\)/)
    await changing(device, smaller, 'size-mismatch', /4096 bytes smaller \(2048, must be 6144\)/)
  })

  test('the present file changed its size', async ({ image }) => {
    const [file, other] = [image('image', MiB), image('other', MiB)]
    await using device = await attach(file, { readOnly: true })
    truncateSync(file, 2 * MiB)
    await changing(device, other, 'size-mismatch', /present backing file has another size/)
  })

  test('EBADF: not open, O_PATH, and the device itself', async ({ image }) => {
    const file = image('image')
    await using device = await attach(file, { readOnly: true })
    await changing(device, device.path, 'backed-by-itself', /leads back to/, 'EBADF')
    await changing(device, file, 'closed', /O_PATH/, 'EBADF', O_PATH)
    const error = await failure('closed', () => ioctl.loopChangeFd(device.fd, 0x7fff_ffff))
    expect(error.message).toMatch(/descriptor of the backing file is not open/)
  })
})

describe('EINVAL from LOOP_CONFIGURE', () => {
  test('a directory, a character device, a FIFO', async ({ folder }) => {
    const fifo = join(folder, 'fifo')
    execFileSync('mkfifo', [fifo])
    await withFreeDevice(async (fd) => {
      await configuring(fd, folder, 'not-a-file-or-block-device', /is a directory/)
      await configuring(fd, '/dev/null', 'not-a-file-or-block-device', /is a character device/)
      const O_RDWR = 2
      await configuring(fd, fifo, 'not-a-file-or-block-device', /is a FIFO/, O_RDWR)
    })
  })

  test('a file that the driver cannot read', async () => {
    await needsLookAtFile()
    await withFreeDevice(async (fd) => {
      await configuring(fd, ODD_FILE, 'not-a-file-or-block-device', /of that filesystem \(proc\)/)
    })
  })

  test('a loop device that is backed by nothing', async () => {
    await withFreeDevice(async (fd) => {
      await withFreeDevice(async (_, number) => {
        await configuring(fd, `/dev/loop${number}`, 'backing-loop-not-attached', new RegExp(`/dev/loop${number}`))
      })
    })
  })

  test('flags that it does not have', async ({ image }) => {
    await withFile(image('image'), async (backingFd) => {
      await withFreeDevice(async (fd) => {
        const config = { fd: backingFd, info: { flags: 0x42 } }
        await bothFail(
          'unsupported-kernel',
          /LOOP_CONFIGURE does not accept flags 0x42, only 0x1d/,
          () => ioctl.loopConfigure(fd, config),
          () => ioctl.loopConfigureSync(fd, config),
        )
      })
    })
  })

  // What the public functions refuse before the kernel sees it, is given to the kernel here.
  test('a block size that cannot be, which leaves the device half configured (K1)', async ({ image }) => {
    await withFile(image('image'), async (backingFd) => {
      await withFreeDevice(async (fd, number) => {
        const blockSize = 4096 * 32
        expect(binding().loopConfigureSync(fd, backingFd, encodeConfig(blockSize, {}))).toBe(EINVAL)
        const asked = { blockSize }
        const error = explain({ call: 'LOOP_CONFIGURE', errno: EINVAL, fd, number, backingFd, asked })
        expect(error.reason).toBe('block-size')
        expect(error.message).toContain('a logical block size of 131072: powers of two from 512 to 4096')
      })
    })
  })

  for (const [name, offset, value] of [
    ['a key that is too long', 8 + 48, 33],
    ['an encryption type', 8 + 44, 1],
  ] as const) {
    test(name, async ({ image }) => {
      await withFile(image('image'), async (backingFd) => {
        await withFreeDevice(async (fd, number) => {
          const config = encodeConfig(0, {})
          new DataView(config.buffer).setUint32(offset, value, true)
          const errno = binding().loopConfigureSync(fd, backingFd, config)
          expect(errno).toBe(EINVAL)
          const asked = { encryption: true }
          const error = explain({ call: 'LOOP_CONFIGURE', errno, fd, number, backingFd, asked })
          expect(error.reason).toBe('unsupported-kernel')
          expect(error.message).toContain('encryption')
          expect(sysfs(number, 'loop/backing_file')).toBe(undefined)
        })
      })
    })
  }
})

describe('EBUSY', () => {
  test('from LOOP_CONFIGURE: attached already, and claimed by another', async ({ image }) => {
    const [file, other] = [image('image'), image('other')]
    await using device = await attach(file)
    await withFile(other, async (backingFd) => {
      await bothFail(
        'already-attached',
        new RegExp(`attached already, to ${file}`),
        () => ioctl.loopConfigure(device.fd, { fd: backingFd }),
        () => ioctl.loopConfigureSync(device.fd, { fd: backingFd }),
        'EBUSY',
      )
      await withFreeDevice(async (fd, number) => {
        const O_EXCL = 0o200
        const claimed = openSync(`/dev/loop${number}`, O_EXCL)
        try {
          await bothFail(
            'in-use',
            /(?:somebody else holds the device|has .* open)/,
            () => ioctl.loopConfigure(fd, { fd: backingFd }),
            () => ioctl.loopConfigureSync(fd, { fd: backingFd }),
            'EBUSY',
          )
        } finally {
          closeSync(claimed)
        }
      })
    })
  })

  test('from LOOP_CTL_REMOVE: who has it open', async () => {
    await withFreeDevice(async (_, number) => {
      await using control = await LoopControl.open()
      const error = await failure('in-use', () => control.remove(number, { timeout: 200 }))
      const holder = { kind: 'process', pid: process.pid, device: `/dev/loop${number}` }
      expect(error.holders).toEqual(expect.arrayContaining([expect.objectContaining(holder)]))
      expect(error.message).toMatch(new RegExp(`process ${process.pid} .* \\(after \\d+ attempts in \\d+ ms\\)`))
      expect(error.hint).toContain(`process ${process.pid}`)
    })
  })

  test('a mounted device: where, and what to do', async ({ image, folder }) => {
    const file = image('image', 4 * MiB)
    execFileSync('mke2fs', ['-q', file])
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    await using device = await attach(file)
    execFileSync('mount', [device.path, mountPoint])
    try {
      const error = await failure('in-use', () => device.detach())
      expect(error.hint).toContain(`still mounted there`)
      expect(error.hint).toContain(mountPoint)
      const resized = await failure('in-use', () => device.setBlockSize(4096))
      expect(resized.hint).toContain(`unmount ${mountPoint} first`)
    } finally {
      execFileSync('umount', [mountPoint])
    }
  })
})

describe('partitions', () => {
  test('BLKPG tells what is wrong with the partition, by the figures', async ({ image }) => {
    await using device = await attach(image('image', MiB), { blockSize: 4096 })
    const add = (number: number, start: bigint, length: bigint) =>
      ioctl.blkPgAddPartition(device.fd, { number, start, length })
    const { fd } = device
    expect((await failure('bad-partition-table', () => add(1, 512n, 4096n))).message).toMatch(/multiples of .* 4096/)
    expect((await failure('bad-partition-table', () => add(256, 0n, 4096n))).message).toMatch(/beyond the 255/)
    expect((await failure('bad-partition-table', () => add(1, 0n, 0n))).message).toMatch(/empty/)
    await failure('no-such-device', () => ioctl.blkPgDelPartition(fd, 1))
    await failure('no-such-device', () => ioctl.blkPgResizePartition(fd, { number: 1, start: 0n, length: 4096n }))
    await add(1, 0n, 8192n)
    try {
      expect((await failure('device-exists', () => add(1, 65_536n, 4096n))).message).toContain(`${device.path}p1`)
      await failure('overlap', () => add(2, 4096n, 8192n))
    } finally {
      await ioctl.blkPgDelPartition(fd, 1)
    }
    const beyond = await add(1, 0n, BigInt(2 * MiB)).catch((error: unknown) => error)
    if (beyond === undefined) {
      await ioctl.blkPgDelPartition(fd, 1)
      skipForKernel('bounds of BLKPG')
    }
    expect((await failure('bad-partition-table', () => add(1, 0n, BigInt(2 * MiB)))).message).toMatch(
      /ends at 2097152, the device at 1048576/,
    )
  })

  test('BLKRRPART without partition scan', async ({ image }) => {
    await using device = await attach(image('image'))
    const error = await failure('partscan-off', () => ioctl.blkRrPart(device.fd))
    expect(error).toMatchObject({ code: 'EINVAL', ioctl: 'BLKRRPART' })
    expect(error.hint).toContain('partscan: true')
  })
})

describe('a filesystem that hangs', () => {
  test('does not keep the diagnosis from ending', async ({ folder, image }) => {
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    const script = fileURLToPath(new URL('fixtures/hanging_fs.py', import.meta.url))
    const server = spawn('python3', [script, mountPoint, String(MiB)], { stdio: ['pipe', 'pipe', 'inherit'] })
    onTestFinished(() => void server.kill('SIGKILL'))
    const words = createInterface(server.stdout)[Symbol.asyncIterator]()
    try {
      expect(await words.next()).toMatchObject({ value: 'ready' })
      const device = await attach(join(mountPoint, 'image'), { readOnly: true, overlap: 'allow' })
      try {
        server.stdin.write('\n')
        expect(await words.next()).toMatchObject({ value: 'hanging' })
        const other = image('other')
        // LOOP_GET_STATUS64 would ask the server: sysfs has to do.
        const error = await failure('already-attached', () => attach(other, { number: device.number, readOnly: true }))
        expect(error.message).toContain(`to ${mountPoint}/image`)
        // More often than there are threads for such calls: none is lost by it.
        for (let i = 0; i < 4; i++) {
          await withFile(other, async (fd) => {
            await failure('already-attached', () => ioctl.loopConfigure(device.fd, { fd }))
            await failure('already-attached', () => ioctl.loopConfigureSync(device.fd, { fd }))
          })
        }
        await using another = await attach(other)
        expect((await another.status()).backingFile).toBe(other)
        await using control = await LoopControl.open()
        await failure('device-exists', () => control.add(device.number))
      } finally {
        server.kill('SIGKILL')
        await once(server, 'exit')
        await device.close()
      }
    } finally {
      server.kill('SIGKILL')
      spawnSync('umount', ['--quiet', mountPoint])
    }
  })
})

describe('no loop driver', () => {
  for (const [name, script, code] of [
    ['no node, and none in sysfs', 'mount -t tmpfs none /sys/class/misc; mount -t tmpfs none /sys/block', 'ENOENT'],
    [
      'a node that nothing stands behind',
      'mknod "$dev"/loop-control c 10 254; mount -t tmpfs none /sys/block',
      'ENODEV',
    ],
  ] as const) {
    test(name, ({ folder, image }) => {
      const dev = join(folder, 'dev')
      mkdirSync(dev)
      const enter = privately(`${OWN_DEV}; rm "$dev"/loop-control; ${script}; mount --move "$dev" /dev`)
      const [program, ...words] = [...enter(dev), process.execPath, 'dist/cli/main.js', 'attach', '--json']
      const { status, stdout, stderr } = spawnSync(program, [...words, image('image')], { encoding: 'utf8' })
      expect({ status, stdout }).toEqual({ status: 1, stdout: '' })
      const { error } = JSON.parse(stderr) as { error: LoopError }
      expect(error).toMatchObject({ reason: 'no-loop-driver', code, path: '/dev/loop-control' })
      expect(error.hint).toContain('modprobe loop')
    })
  }
})
