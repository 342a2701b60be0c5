/** What is allowed and odd about an attachment: each code, with its figures, and none where all is well. */

import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdirSync, openSync, readSync, renameSync, truncateSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, onTestFinished } from 'vitest'
import { attach, type AttachOptions, type LoopDevice, readPartitionTable, type WarningCode } from '../../lib/index.ts'
import { knownPartitions, MiB, sfdisk } from '../kernel/partitioned.ts'
import { failure, losetup, sysfs, test } from '../kernel/support.ts'
import { skipForKernel } from '../needs.ts'

const TABLE = 'label: gpt\nstart=2048, size=2048, name=first\nstart=4096, size=4096, name=second\n'

/** The warnings of an attachment, which is detached again. */
async function warningsOf(
  file: string,
  options: AttachOptions,
  use?: (device: LoopDevice) => unknown,
): Promise<string[]> {
  await using device = await attach(file, options)
  await use?.(device)
  const said = device.warnings.map(({ code, message }) => `${code}: ${message}`)
  expect((await device.status()).warnings).toEqual(device.warnings)
  await device.detach()
  return said
}

const expectCode = (said: string[], code: WarningCode, message: RegExp): void => {
  expect(said).toEqual([expect.stringMatching(message)])
  expect(said[0]?.startsWith(`${code}: `)).toBe(true)
}

const empty = ({ number }: LoopDevice): void => expect(sysfs(number, 'size')).toBe('0')

describe('the end of the file', () => {
  test('whole sectors: nothing to say, whatever the block size', async ({ image }) => {
    const file = image('whole', MiB)
    for (const options of [{}, { readOnly: true }, { blockSize: 4096 }, { overlap: 'allow' }] as const) {
      for (let turn = 0; turn < 3; turn++) expect(await warningsOf(file, options)).toEqual([])
    }
  })

  test('a file that is no multiple of 512: what is cut off', async ({ image }) => {
    const file = image('odd', 1000)
    for (let turn = 0; turn < 3; turn++) {
      const said = await warningsOf(file, { readOnly: true }, ({ number }) => expect(sysfs(number, 'size')).toBe('1'))
      expectCode(said, 'tail-cut', /the last 488 bytes of the file are cut off/)
    }
    const window = image('window', MiB)
    expectCode(await warningsOf(window, { sizeLimit: 1000 }), 'tail-cut', /the last 488 bytes of the window/)
  })

  test('a last block that is not whole cannot be read', async ({ image }) => {
    const file = image('block', 4096 + 1536)
    let isRead = false
    const said = await warningsOf(file, { blockSize: 4096 }, ({ path }) => {
      const words = [`if=${path}`, 'of=/dev/null', 'bs=512', 'skip=8', 'count=3', 'status=none']
      isRead = spawnSync('dd', words).status === 0
    })
    expectCode(said, 'tail-cut', /the last 1536 bytes of the device cannot be read: .* a block of 4096 bytes/)
    if (isRead) skipForKernel('reads beyond the end')
  })

  test('nothing to see: an offset beyond the end, a file of less than a sector', async ({ image }) => {
    const whole = image('whole', MiB)
    expectCode(
      await warningsOf(whole, { offset: 2 * MiB, sizeLimit: 512 }, empty),
      'nothing-to-see',
      /the offset, 2097152, is beyond the end of the file, which has 1048576 bytes/,
    )
    expectCode(
      await warningsOf(whole, { offset: MiB - 100, sizeLimit: 512 }, empty),
      'nothing-to-see',
      /what is left after the offset has 100 bytes/,
    )
    expectCode(
      await warningsOf(image('small', 511), {}, empty),
      'nothing-to-see',
      /the file has 511 bytes, less than a sector/,
    )
    expectCode(await warningsOf(whole, { sizeLimit: 100 }, empty), 'nothing-to-see', /the size limit has 100 bytes/)
  })
})

describe('a window without a limit', () => {
  test('on an image with a table goes on over the partitions behind', async ({ image }) => {
    const file = image('disk', 8 * MiB)
    sfdisk(file, TABLE)
    expectCode(
      await warningsOf(file, { offset: MiB }),
      'window-unbounded',
      /goes on to the end of the file, 7 MiB from offset 1048576 on; partition 1 ends 1 MiB after it/,
    )
    expectCode(await warningsOf(file, { offset: 512 }), 'window-unbounded', /no partition begins there/)
    expect(await warningsOf(file, { offset: MiB, sizeLimit: MiB })).toEqual([])
    expect(await warningsOf(image('plain', 8 * MiB), { offset: MiB })).toEqual([])
  })
})

describe('the file elsewhere', () => {
  test('open for writing in a process, which is named', async ({ image }) => {
    const file = image('disk', MiB)
    const child = spawn('sh', ['-c', 'exec 3<>"$0"; echo open; read line', file], {
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    onTestFinished(() => void child.kill('SIGKILL'))
    await once(child.stdout, 'data')
    for (const options of [{ readOnly: true }, { overlap: 'allow' }, {}] as const) {
      expectCode(
        await warningsOf(file, options),
        'open-for-writing',
        new RegExp(`process ${child.pid} \\(sh\\) has it open`),
      )
    }
    child.stdin.end('\n')
    await once(child, 'exit')
    expect(await warningsOf(file, { readOnly: true })).toEqual([])
  })

  test('open for reading is nothing odd, nor is a read-only device on it', async ({ image }) => {
    const file = image('disk', MiB)
    const fd = openSync(file, 'r')
    try {
      expect(await warningsOf(file, { readOnly: true })).toEqual([])
      await using other = await attach(file, { readOnly: true })
      expect(await warningsOf(file, { readOnly: true })).toEqual([])
      await other.detach()
    } finally {
      closeSync(fd)
    }
  })

  test('another device that can write, where that was allowed', async ({ image }) => {
    const file = image('disk', MiB)
    await using other = await attach(file)
    const said = await warningsOf(file, { overlap: 'allow' })
    expectCode(said, 'open-for-writing', new RegExp(`${other.path} is attached to it`))
    await other.detach()
  })

  test('a block device that is mounted, the whole of it or a part', async ({ folder, image }) => {
    const file = image('disk', 16 * MiB)
    sfdisk(file, 'label: gpt\nstart=2048, size=16384\n')
    await using disk = await attach(file, { partscan: 'user' })
    const [part] = await disk.partitions()
    const path = part?.path ?? ''
    execFileSync('mkfs.ext4', ['-q', path])
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    execFileSync('mount', [path, mountPoint])
    try {
      for (const [backing, message] of [
        [path, new RegExp(`the backing block device is mounted at ${mountPoint} \\(ext4\\)`)],
        [disk.path, new RegExp(`${path}, which shares bytes with the backing block device, is mounted`)],
      ] as const) {
        expectCode(await warningsOf(backing, { readOnly: true }), 'backing-mounted', message)
      }
    } finally {
      execFileSync('umount', [mountPoint])
    }
    expect(await warningsOf(disk.path, { readOnly: true })).toEqual([])
    await disk.detach()
  })
})

describe("directIO: 'prefer'", () => {
  test('never changes the block size, and says where it is buffered', async ({ image }) => {
    const file = image('disk', MiB)
    // On a disk of 4096-byte blocks, direct I/O needs as many.
    await using disk = await attach(file, { blockSize: 4096 })
    const said = await warningsOf(disk.path, { directIO: 'prefer' }, ({ path, number }) => {
      expect(sysfs(number, 'queue/logical_block_size')).toBe('512')
      expect(losetup(path)).toMatchObject({ dio: false })
    })
    expectCode(
      said,
      'direct-io-buffered',
      /takes no direct I\/O as it is attached \(logical block size 512, offset 0\): it is buffered/,
    )
    const direct = await warningsOf(disk.path, { directIO: 'prefer', blockSize: 4096 }, ({ path }) => {
      expect(losetup(path)).toMatchObject({ 'dio': true, 'log-sec': 4096 })
    })
    expect(direct).toEqual([])
    await disk.detach()
  })
})

describe('a block device that is read-only', () => {
  test('is one that cannot be written, though it can be opened for that', async ({ image }) => {
    await using lower = await attach(image('disk', MiB, 7), { readOnly: true })
    for (const options of [{}, { readOnly: false }]) {
      const error = await failure('backing-not-writable', () => attach(lower.path, options))
      expect(error).toMatchObject({ path: lower.path, hint: 'attach with readOnly: true' })
    }
    const fd = openSync(lower.path, 'r+')
    try {
      await failure('backing-not-writable', () => attach(fd, { readOnly: false }))
      await using device = await attach(fd)
      expect(sysfs(device.number, 'ro')).toBe('1')
      await device.detach()
    } finally {
      closeSync(fd)
    }
    await lower.detach()
  })
})

/** Offset and size limit. */
const places = (device: LoopDevice): unknown =>
  [sysfs(device.number, 'loop/offset'), sysfs(device.number, 'loop/sizelimit')].map(Number)

describe('partition', () => {
  test('by number, label, UUID and type: the window is that of the table', async ({ image }) => {
    const file = image('disk', 8 * MiB)
    sfdisk(file, TABLE)
    const { partitions } = await readPartitionTable(file)
    const [, second] = partitions
    expect(partitions).toMatchObject([
      { number: 1, start: MiB, size: MiB },
      { number: 2, label: 'second', table: 'gpt' },
    ])
    for (const partition of [2, { label: 'second' }, { uuid: (second?.uuid ?? '').toLowerCase() }]) {
      await using device = await attach(file, { partition })
      expect(places(device)).toEqual([2 * MiB, 2 * MiB])
      expect(knownPartitions(device.number)).toEqual({})
      expect(device.warnings).toEqual([])
      const fd = openSync(device.path, 'r+')
      writeSync(fd, 'written')
      closeSync(fd)
      await device.detach()
      const bytes = Buffer.alloc(7)
      const opened = openSync(file, 'r')
      readSync(opened, bytes, 0, 7, 2 * MiB)
      closeSync(opened)
      expect(bytes.toString()).toBe('written')
    }
    const mbr = image('mbr', 8 * MiB)
    sfdisk(mbr, 'label: dos\nlabel-id: 0x1a2b3c4d\nstart=2048, size=2048, type=c\nstart=4096, size=1024, type=83\n')
    for (const partition of [2, { type: '0x83' }, { type: '83' }, { uuid: '1A2B3C4D-02' }]) {
      await using device = await attach(mbr, { partition, readOnly: true })
      expect(places(device)).toEqual([2 * MiB, MiB / 2])
      await device.detach()
    }
  })

  test('none or several match, or there is no table: no-such-partition, with what there is', async ({ image }) => {
    const file = image('disk', 8 * MiB)
    sfdisk(file, TABLE)
    const none = await failure('no-such-partition', () => attach(file, { partition: 3 }))
    expect(none).toMatchObject({ code: 'ENOENT', path: file })
    expect(none.message).toMatch(/there is no partition 3: there are 1 \("first"\), 2 \("second"\)$/)
    await failure('no-such-partition', () => attach(file, { partition: { label: 'First' } }))
    const type = '0fc63daf-8483-4772-8e79-3d69d8477de4'
    const several = await failure('no-such-partition', () => attach(file, { partition: { type } }))
    expect(several.message).toMatch(/partitions 1, 2 have the type/)
    const blank = await failure('no-such-partition', () => attach(image('blank', MiB), { partition: 1 }))
    expect(blank.message).toContain('there is no partition table')
    await failure('bad-partition-table', () => readPartitionTable(image('blank2', MiB)))
  })

  test('one that reaches beyond the end is cut there, with a warning', async ({ image }) => {
    for (const label of ['dos', 'gpt']) {
      const file = image(label, 8 * MiB)
      sfdisk(file, `label: ${label}\nstart=2048, size=2048\nstart=4096, size=4096\n`)
      truncateSync(file, 3 * MiB)
      await using device = await attach(file, { partition: 2 })
      expect(places(device)).toEqual([2 * MiB, MiB])
      expect(device.warnings).toMatchObject([
        {
          code: 'partition-cut',
          message: expect.stringMatching(/^partition 2 ends 1 MiB beyond the image; it is cut/),
        },
      ])
      await device.detach()
      await using first = await attach(file, { partition: 1 })
      expect(first.warnings).toEqual([])
      await first.detach()
    }
  })

  test('more than the kernel can number', async ({ image }) => {
    const file = image('disk', 8 * MiB)
    const parts = Array.from({ length: 300 }, (_, index) => `start=${2048 + index * 8}, size=8\n`)
    sfdisk(file, `label: gpt\ntable-length: 300\n${parts.join('')}`)
    await using device = await attach(file, { partition: 300 })
    expect(places(device)).toEqual([(2048 + 299 * 8) * 512, 4096])
    await device.detach()
  })

  test("blockSize: 'auto' is that of the table", async ({ image }) => {
    const file = image('disk', 64 * MiB)
    execFileSync('fdisk', ['--sector-size', '4096', file], { input: 'g\nn\n\n\n+4M\nw\n', stdio: 'pipe' })
    await using device = await attach(file, { partition: 1, blockSize: 'auto' })
    expect(sysfs(device.number, 'queue/logical_block_size')).toBe('4096')
    expect(sysfs(device.number, 'size')).toBe(`${(4 * MiB) / 512}`)
    await device.detach()
  })

  test('wrong arguments', async () => {
    for (const [partition, error] of [
      [0, RangeError],
      [1.5, RangeError],
      [-1, RangeError],
      [{ uuid: 'x' }, RangeError],
      [{ type: 'linux' }, RangeError],
      ['root', TypeError],
      [{}, TypeError],
      [{ label: '' }, TypeError],
      [{ label: 'a', uuid: 'b' }, TypeError],
      [{ name: 'a' }, TypeError],
      [null, TypeError],
    ] as const) {
      await expect(attach('/nowhere', { partition: partition as number })).rejects.toThrow(error)
    }
    for (const other of [{ offset: 0 }, { sizeLimit: 0 }, { partscan: true }] as const) {
      await expect(attach('/nowhere', { partition: 1, ...other })).rejects.toThrow(TypeError)
    }
  })
})

describe('sizes and names', () => {
  test('a file of almost 2 ** 63 bytes', async ({ folder }) => {
    const big = join(folder, 'big')
    mkdirSync(big)
    execFileSync('mount', ['-t', 'tmpfs', 'none', big])
    try {
      const file = join(big, 'huge')
      closeSync(openSync(file, 'w'))
      execFileSync('truncate', ['-s', '9223372036854775296', file])
      await failure('bad-partition-table', () => readPartitionTable(file))
      for (const options of [{ blockSize: 'auto' }, { partscan: true }, { offset: 512 }] as const) {
        await using device = await attach(file, options)
        expect(sysfs(device.number, 'size')).toBe(
          options === undefined ? '' : `${18_014_398_509_481_983n - BigInt('offset' in options ? 1 : 0)}`,
        )
        await device.detach()
      }
      await failure('no-such-partition', () => attach(file, { partition: 1 }))
    } finally {
      execFileSync('umount', [big])
    }
  })

  test('a name that is no UTF-8', async ({ folder, image }) => {
    const plain = image('disk', 8 * MiB)
    sfdisk(plain, TABLE)
    const file = Buffer.concat([Buffer.from(`${folder}/b`), Buffer.from([0xff]), Buffer.from('.img')])
    renameSync(plain, file)
    expect((await readPartitionTable(file)).partitions).toHaveLength(2)
    await using device = await attach(file, { partition: 1 })
    expect(places(device)).toEqual([MiB, MiB])
    await device.detach()
  })
})
