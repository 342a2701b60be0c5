/** Partitions that the kernel is told of: tables made by sfdisk and sgdisk, read here, checked through the nodes. */

import { execFileSync } from 'node:child_process'
import {
  closeSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, onTestFinished, vi } from 'vitest'
import {
  attach,
  type AttachOptions,
  type DetachResult,
  LoopControl,
  type LoopDevice,
  open,
  type Partition,
} from '../../lib/index.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import {
  deletePartition,
  expectNoPartitions,
  expectUsable,
  knownPartitions,
  mark,
  MiB,
  nodeOf,
  type Opener,
  opener,
  partitionNodes,
  pattern,
  places,
  readBytes,
  Remote,
  sfdisk,
  sfdiskAt,
  sgdisk,
  told,
  TWO,
  TWO_4096,
} from './partitioned.ts'
import { countDescriptors, expectGone, failure, removeDevice, sysfs, test, unusedNumber } from './support.ts'
import { needs, skipForKernel } from '../needs.ts'
import { limit } from '../scale.ts'

beforeEach(() => needs('sfdisk', 'sgdisk'))

afterEach(() => {
  observe(undefined)
})

const SECOND = { start: 4096 * 512, size: 4096 * 512 }

/** A number that no other program is offered: one that is would have it open in the moment when it is to go. */
function ownNumber(): number {
  const number = unusedNumber()
  onTestFinished(() => removeDevice(number))
  return number
}

/** Of an image with the table TWO. */
function twoOf(number: number): Record<string, string> {
  return {
    [`loop${number}p1`]: `${MiB} ${MiB}`,
    [`loop${number}p2`]: `${SECOND.start} ${SECOND.size}`,
  }
}

function twoImage(image: (name: string, bytes: number) => string, name = 'disk', bytes = 8 * MiB): string {
  const file = image(name, bytes)
  sfdisk(file, TWO)
  mark(file, [MiB, SECOND.start])
  return file
}

/** Overwrites bytes of the image. */
function patch(file: string, position: number, bytes: Buffer): void {
  const fd = openSync(file, 'r+')
  writeSync(fd, bytes, 0, bytes.length, position)
  closeSync(fd)
}

/** An entry of a boot record. */
function slot(type: number, start: number, size: number): Buffer {
  const bytes = Buffer.alloc(16)
  bytes.writeUInt8(type, 4)
  bytes.writeUInt32LE(start, 8)
  bytes.writeUInt32LE(size, 12)
  return bytes
}

/** A boot record, in front of a block. */
function record(file: string, block: number, ...entries: Buffer[]): void {
  patch(
    file,
    block * 512 + 446,
    Buffer.concat([...entries, Buffer.alloc(64 - entries.length * 16), Buffer.from([0x55, 0xaa])]),
  )
}

interface Case {
  name: string
  make: (file: string) => unknown
  options?: AttachOptions
  kind: 'gpt' | 'mbr'
  count: number
  blockSize?: number
}

const LOGICAL = `label: dos
1 : start=2048, size=2048, type=83, bootable
2 : start=4096, size=10240, type=5
5 : start=4100, size=1024, type=82
6 : start=6000, size=1024, type=83
7 : start=8000, size=2048, type=7
`
const LOGICAL_4096 = `label: dos
1 : start=256, size=256, type=83
2 : start=512, size=1024, type=5
5 : start=520, size=128, type=83
6 : start=1024, size=128, type=c
`

const IMAGES: Case[] = [
  { name: 'GPT', kind: 'gpt', count: 2, make: (file) => sfdisk(file, TWO) },
  {
    name: 'GPT with gaps in its numbers, names, attributes',
    kind: 'gpt',
    count: 4,
    make: (file) =>
      sfdisk(
        file,
        `label: gpt
1 : start=2048, size=1, type=U, name="EFI system"
3 : start=2056, size=7, type=L, name="größer", attrs=LegacyBIOSBootable
7 : start=8192, size=512, type=S
128 : start=4096, size=512, type=L
`,
      ),
  },
  {
    name: 'GPT for blocks of 4096 bytes',
    kind: 'gpt',
    count: 2,
    make: (file) => sfdiskAt(4096, file, TWO_4096),
    options: { blockSize: 4096 },
    blockSize: 4096,
  },
  {
    name: 'GPT for blocks of 4096 bytes, which are found out',
    kind: 'gpt',
    count: 2,
    make: (file) => sfdiskAt(4096, file, TWO_4096),
    options: { blockSize: 'auto' },
    blockSize: 4096,
  },
  {
    name: 'GPT with a hybrid MBR',
    kind: 'gpt',
    count: 3,
    make: (file) => sgdisk(file, '-n1:2048:+1M', '-n2:0:+1M', '-n3:0:+1M', '-t1:ef00', '-c2:two', '-h1:2'),
  },
  {
    name: 'GPT with a damaged primary header',
    kind: 'gpt',
    count: 2,
    make: (file) => {
      sfdisk(file, TWO)
      patch(file, 512 + 40, Buffer.from([0xff]))
    },
  },
  {
    name: 'MBR with four primary partitions',
    kind: 'mbr',
    count: 4,
    make: (file) =>
      sfdisk(
        file,
        'label: dos\nstart=2048, size=2048, type=c\nstart=4096, size=1, type=83, bootable\nstart=5000, size=7, type=82\nstart=8192, size=1024\n',
      ),
  },
  { name: 'MBR with logical partitions', kind: 'mbr', count: 5, make: (file) => sfdisk(file, LOGICAL) },
  {
    name: 'MBR with logical partitions for blocks of 4096 bytes',
    kind: 'mbr',
    count: 4,
    make: (file) => sfdiskAt(4096, file, LOGICAL_4096),
    options: { blockSize: 4096 },
    blockSize: 4096,
  },
  {
    name: 'MBR with gaps in its numbers, read-only',
    kind: 'mbr',
    count: 2,
    make: (file) => sfdisk(file, 'label: dos\n2 : start=4096, size=2048\n4 : start=2048, size=2048\n'),
    options: { readOnly: true },
  },
]

/** The container of logical partitions: no GUID of a GPT is as short. */
function isExtended(type: string): boolean {
  return type === '5'
}

describe("attach with partscan: 'user'", () => {
  for (const { name, make, options = {}, kind, count, blockSize = 512 } of IMAGES) {
    test(name, async ({ image }) => {
      const file = image('disk', 8 * MiB)
      await make(file)
      await using before = await attach(file, { ...options, blockSize })
      const table = told(before.path)
      expect(knownPartitions(before.number)).toEqual({})
      await before.detach()
      mark(
        file,
        table.partitions.filter(({ type }) => !isExtended(type)).map(({ start }) => start),
      )

      await using device = await attach(file, { ...options, partscan: 'user' })
      const { number } = device
      expect(sysfs(number, 'queue/logical_block_size')).toBe(`${blockSize}`)
      expect(sysfs(number, 'loop/partscan')).toBe('0')
      const partitions = await device.partitions()
      expect(partitions).toHaveLength(count)
      expect(table.partitions).toHaveLength(count)
      expect(told(device.path)).toEqual(table)

      expect(partitions).toEqual(
        table.partitions
          .map((entry) => ({
            number: entry.number,
            path: `/dev/loop${number}p${entry.number}`,
            device: sysfs(number, `loop${number}p${entry.number}/dev`),
            start: entry.start,
            size: isExtended(entry.type) ? Math.max(1024, blockSize) : entry.size,
            readOnly: options.readOnly === true,
            table: kind,
            type: entry.type,
            typeName: expect.any(String),
            ...(entry.name !== undefined && { label: entry.name }),
            ...(kind === 'gpt' && { uuid: entry.uuid }),
            ...(kind === 'mbr' && { uuid: expect.stringMatching(new RegExp(`^[0-9a-f]{8}-0${entry.number}$`)) }),
            bootable: entry.bootable === true || entry.attrs === 'LegacyBIOSBootable',
          }))
          .toSorted((a, b) => a.number - b.number),
      )
      const kernel = partitions.map((entry) => [`loop${number}p${entry.number}`, `${entry.start} ${entry.size}`])
      expect(places(number)).toEqual(Object.fromEntries(kernel))
      expect(partitionNodes(number)).toHaveLength(count)
      expectUsable(partitions, file)
      const marked = table.partitions.filter(({ type }) => !isExtended(type))
      for (const [index, partition] of marked.entries()) {
        expect(readBytes(`/dev/loop${number}p${partition.number}`, 0, 512).equals(pattern(index))).toBe(true)
      }

      expect(await device.detach()).toBe('detached')
      expect(sysfs(number, 'loop/backing_file')).toBeUndefined()
      expectNoPartitions(number)
    })
  }

  test('what is written to the node is in the image, at the place of the partition', async ({ image }) => {
    const file = twoImage(image)
    const device = await attach(file, { partscan: 'user' })
    patch(`${device.path}p2`, 512, Buffer.from('written'))
    expect(await device.detach()).toBe('detached')
    expect(readBytes(file, SECOND.start + 512, 7).toString()).toBe('written')
  })

  test('a part of a file: the table is that of the part', async ({ image }) => {
    const table = twoImage(image)
    const file = image('larger', 16 * MiB)
    patch(file, 4 * MiB, readBytes(table, 0, 8 * MiB))
    await using device = await attach(file, { partscan: 'user', offset: 4 * MiB, sizeLimit: 8 * MiB })
    const partitions = await device.partitions()
    expect(places(device.number)).toEqual(twoOf(device.number))
    expectUsable(partitions, file, 4 * MiB)
    expect(readBytes(`${device.path}p2`, 0, 512).equals(pattern(1))).toBe(true)
  })

  test('a damaged primary GPT: the backup is used, and a warning says so', async ({ image }) => {
    const file = twoImage(image, 'disk', 9 * MiB)
    patch(file, 512, Buffer.alloc(512, 7))
    const heard: Error[] = []
    const listener = (warning: Error) => void heard.push(warning)
    process.on('warning', listener)
    onTestFinished(() => void process.off('warning', listener))
    await using device = await attach(file, { partscan: 'user' })
    const said = { code: 'gpt-backup', message: expect.stringContaining(`block ${(9 * MiB) / 512 - 1}`) }
    expect(device.warnings).toMatchObject([said])
    expect((await device.partitions()).map(({ label }) => label)).toEqual(['first', 'second'])
    expect((await device.rescanPartitions()).map(({ label }) => label)).toEqual(['first', 'second'])
    expect((await device.status()).warnings).toMatchObject([said])
    await device.detach()
    expect(heard).toEqual([])
  })

  test('no table, or an empty one: there are no partitions', async ({ image }) => {
    for (const make of [
      () => {},
      (file: string) => sfdisk(file, 'label: gpt\n'),
      (file: string) => sfdisk(file, 'label: dos\n'),
    ]) {
      const file = image('disk', 8 * MiB)
      make(file)
      const device = await attach(file, { partscan: 'user' })
      expect(await device.partitions()).toEqual([])
      expectNoPartitions(device.number)
      expect(await device.detach()).toBe('detached')
    }
  })

  test('the number of descriptors and devices stays what it was', async ({ image }) => {
    const file = twoImage(image)
    const before = countDescriptors()
    for (let turn = 0; turn < 5; turn++) {
      const device = await attach(file, { partscan: 'user' })
      expect(places(device.number)).toEqual(twoOf(device.number))
      await device.detach()
      expectNoPartitions(device.number)
    }
    expect(countDescriptors()).toBe(before)
  })
})

describe('a table that is refused leaves nothing', () => {
  const tables: [string, (file: string) => void, RegExp][] = [
    [
      'both copies of the GPT damaged',
      (file) => {
        sfdisk(file, TWO)
        patch(file, 512, Buffer.alloc(8))
        patch(file, 8 * MiB - 512, Buffer.alloc(8))
      },
      /primary.*backup/,
    ],
  ]
  for (const [name, make, says] of tables) {
    test(name, async ({ image }) => {
      const file = image('disk', 8 * MiB)
      make(file)
      for (const autoclear of [true, false]) {
        const number = unusedNumber()
        const before = countDescriptors()
        const given = { partscan: 'user', number, autoclear } as const
        const error = await failure('bad-partition-table', () => attach(file, given))
        expect(error).toMatchObject({ code: 'EINVAL', path: `/dev/loop${number}` })
        expect(error.message).toMatch(says)
        expect(existsSync(`/sys/block/loop${number}`)).toBe(false)
        expect(existsSync(`/dev/loop${number}`)).toBe(false)
        expect(partitionNodes(number)).toEqual([])
        expect(countDescriptors()).toBe(before)
        await expectDetached(file)
      }
      // a device that is there: attached in one hop, and nothing but us would detach it
      for (let i = 0; i < 2; i++) await (await attach(image('other'))).detach()
      await failure('bad-partition-table', () => attach(file, { partscan: 'user', autoclear: false }))
      await expectDetached(file)
    })
  }
})

describe('a table that is odd is read all the same, and it is said what is odd', () => {
  const tables: { name: string; make: (file: string) => void; shown: string[]; warnings: [string, RegExp][] }[] = [
    {
      name: 'a GPT that is cut off',
      make: (file) => {
        sfdisk(file, TWO)
        truncateSync(file, 3 * MiB)
      },
      shown: ['1 2048+2048'],
      warnings: [
        ['gpt-backup', /should be in block 16383, but the last block is 6143/],
        ['partition-left-out', /^partition 2 ends 1 MiB beyond the image; it is left out$/],
      ],
    },
    {
      name: 'partitions of a GPT that overlap',
      make: (file) => {
        sfdisk(file, TWO)
        forgeGpt(file, 2, 3000n, 4000n)
      },
      shown: ['1 2048+2048'],
      warnings: [['partition-left-out', /^partition 2 overlaps with partition 1 by 512512 bytes, .* it is left out$/]],
    },
    {
      name: 'an isohybrid image: partition 2 in partition 1, which is the whole image',
      make: (file) => record(file, 0, slot(0, 0, 16_384), slot(0xef, 136, 4096)),
      shown: ['1 0+16384'],
      warnings: [['partition-left-out', /^partition 2 overlaps with partition 1 by 2 MiB/]],
    },
    {
      name: 'a card image that was cut off',
      make: (file) => record(file, 0, slot(0xc, 128, 1024), slot(0x83, 2048, 208_896), slot(0x83, 210_944, 2048)),
      shown: ['1 128+1024', '2 2048+14336'],
      warnings: [
        ['partition-cut', /^partition 2 ends 95 MiB beyond the image; it is cut to 7 MiB$/],
        ['partition-left-out', /^partition 3 begins 95 MiB beyond the end of the image; it is left out$/],
      ],
    },
    {
      name: 'a chain of logical partitions that loops',
      make: (file) => {
        record(file, 0, slot(0x83, 2048, 1024), slot(5, 4096, 8192))
        record(file, 4096, slot(0x83, 8, 100), slot(5, 1024, 1024))
        record(file, 5120, slot(0x83, 8, 100), slot(5, 0, 1024))
      },
      shown: ['1 2048+1024', '2 4096+2', '5 4104+100', '6 5128+100'],
      warnings: [['partition-left-out', /comes back to the boot record in block 4096/]],
    },
    {
      name: 'more partitions than a device can have',
      make: (file) => {
        const script = Array.from({ length: 300 }, (_, index) => `start=${2048 + 8 * index}, size=8\n`)
        sfdisk(file, `label: gpt\ntable-length: 300\n${script.join('')}`)
      },
      shown: Array.from({ length: 255 }, (_, index) => `${index + 1} ${2048 + 8 * index}+8`),
      warnings: [['partition-left-out', /^45 partitions from number 256 on are left out/]],
    },
  ]
  for (const { name, make, shown, warnings } of tables) {
    test(name, async ({ image }) => {
      const file = image('disk', 8 * MiB)
      make(file)
      await using device = await attach(file, { partscan: 'user' })
      const found = (await device.partitions()).map(
        ({ number, start, size }) => `${number} ${start / 512}+${size / 512}`,
      )
      expect(found).toEqual(shown)
      expect(Object.keys(knownPartitions(device.number))).toHaveLength(shown.length)
      expect(device.warnings.map(({ code }) => code)).toEqual(warnings.map(([code]) => code))
      for (const [index, [, message]] of warnings.entries()) expect(device.warnings[index]?.message).toMatch(message)
      expect((await device.status()).warnings).toEqual(device.warnings)
      const said = [...device.warnings]
      await device.rescanPartitions({ mode: 'user' })
      expect(device.warnings).toEqual(said)
      expect(await device.detach()).toBe('detached')
      expectNoPartitions(device.number)
    })
  }

  test('a partition in the place of which somebody else has made another one', async ({ image }) => {
    const file = twoImage(image)
    await using control = await LoopControl.open()
    const number = await control.add(unusedNumber())
    onTestFinished(() => removeDevice(number))
    // Made at the last moment
    const add = `
import fcntl, struct, sys
data = struct.pack('=qqi64s64s4x', ${SECOND.start}, 4096, 9, b'', b'')
import ctypes
buffer = ctypes.create_string_buffer(data)
arg = struct.pack('@iiiP', 1, 0, len(data), ctypes.addressof(buffer))
with open(sys.argv[1], 'rb') as device: fcntl.ioctl(device, 0x1269, arg)`
    let calls = 0
    observe((call) => {
      if (call === 'blkPgAddPartition' && ++calls === 2) execFileSync('python3', ['-c', add, `/dev/loop${number}`])
    })
    await using device = await attach(file, { partscan: 'user', number })
    observe(undefined)
    expect(calls).toBe(2)
    expect((await device.partitions()).map((partition) => partition.number)).toEqual([1, 9])
    expect(device.warnings).toMatchObject([
      { code: 'partition-left-out', message: expect.stringMatching(/^partition 2 overlaps with partition 9 by 4 KiB/) },
    ])
    await device.detach()
    expectNoPartitions(number)
  })
})

/** Puts another range into an entry of the GPT, in both copies, with CRCs that fit. */
function forgeGpt(file: string, index: number, first: bigint, last: bigint): void {
  const script = `
import struct, sys, zlib
path, index, first, last = sys.argv[1], *map(int, sys.argv[2:])
with open(path, 'r+b') as image:
    for header_at in (512, -512):
        image.seek(header_at, 0 if header_at > 0 else 2)
        place = image.tell()
        header = bytearray(image.read(92))
        entries_at, = struct.unpack_from('<Q', header, 72)
        image.seek(entries_at * 512)
        entries = bytearray(image.read(128 * 128))
        entries[(index - 1) * 128:index * 128] = entries[:128]
        struct.pack_into('<QQ', entries, (index - 1) * 128 + 32, first, last)
        struct.pack_into('<I', header, 88, zlib.crc32(entries))
        struct.pack_into('<I', header, 16, 0)
        struct.pack_into('<I', header, 16, zlib.crc32(header))
        image.seek(entries_at * 512)
        image.write(entries)
        image.seek(place)
        image.write(header)`
  execFileSync('python3', ['-c', script, file, `${index}`, `${first}`, `${last}`])
}

describe('detach', () => {
  test('while another process has a partition open is in-use, and leaves all of them', async ({ image }) => {
    for (const autoclear of [true, false]) {
      const file = twoImage(image)
      await using device = await attach(file, { number: ownNumber(), partscan: 'user', autoclear })
      const { number } = device
      const other = await opener(`${device.path}p2`)
      try {
        for (const timeout of [0, 100]) {
          const error = await failure('in-use', () => device.detach({ timeout }))
          const holder = { device: `${device.path}p2`, kind: 'process', pid: other.pid, command: 'sh' }
          expect(error.holders).toContainEqual(holder)
          expect(places(number)).toEqual(twoOf(number))
          expectUsable(await device.partitions(), file)
          expect(sysfs(number, 'loop/autoclear')).toBe(autoclear ? '1' : '0')
        }
      } finally {
        await other.end()
      }
      expect(await device.detach()).toBe('detached')
      expectNoPartitions(number)
    }
  })

  test('waits for the opener of a partition that goes away in time', async ({ image }) => {
    const device = await attach(twoImage(image), { number: ownNumber(), partscan: 'user' })
    const other = await opener(`${device.path}p1`)
    const [result] = await Promise.all([device.detach({ timeout: limit(15_000) }), other.end()])
    expect(result).toBe('detached')
    expectNoPartitions(device.number)
  })

  test('while another has the device itself open is in-use, and leaves the partitions', async ({ image }) => {
    const file = twoImage(image)
    await using device = await attach(file, { number: ownNumber(), partscan: 'user' })
    const other = await opener(device.path)
    try {
      await failure('in-use', () => device.detach({ timeout: 0 }))
      expect(places(device.number)).toEqual(twoOf(device.number))
      expectUsable(await device.partitions(), file)
    } finally {
      await other.end()
    }
    expect(await device.detach()).toBe('detached')
    expectNoPartitions(device.number)
  })

  test('while a partition is mounted is in-use at once, and names the mount', async ({ folder, image }) => {
    const file = twoImage(image)
    await using device = await attach(file, { number: ownNumber(), partscan: 'user' })
    const before = knownPartitions(device.number)
    await withMount(folder, `${device.path}p2`, async (mountPoint) => {
      writeFileSync(join(mountPoint, 'file'), 'still here')
      // longer than the test may take: it is not waited for
      const error = await failure('in-use', () => device.detach({ timeout: 600_000 }))
      expect(error.holders).toContainEqual({ device: `${device.path}p2`, kind: 'mount', mountPoint, fsType: 'ext4' })
      // not even taken away for a moment
      expect(knownPartitions(device.number)).toEqual(before)
    })
    expect(await detachSoon(device)).toBe('detached')
    expectNoPartitions(device.number)
  })

  test('lazy, at once, disposed: the partitions go with the device', async ({ image }) => {
    const file = twoImage(image)
    const ways: ((device: LoopDevice) => unknown)[] = [
      (device) => device.detach({ lazy: true }),
      (device) => device.detachSync(),
      (device) => device[Symbol.asyncDispose](),
      (device) => device[Symbol.dispose](),
    ]
    for (const [index, way] of ways.entries()) {
      const device = await attach(file, { number: ownNumber(), partscan: 'user' })
      expect(places(device.number)).toEqual(twoOf(device.number))
      await way(device)
      // Others look at devices too: it goes when they have.
      await expect.poll(() => sysfs(device.number, 'loop/backing_file'), { message: `way ${index}` }).not.toBe(file)
      expectNoPartitions(device.number)
    }
  })

  test('lazy while a partition is open: deferred, and only that partition stays until then', async ({ image }) => {
    const device = await attach(twoImage(image), { number: ownNumber(), partscan: 'user' })
    const { number } = device
    const other = await opener(`${device.path}p2`)
    expect(await device.detach({ lazy: true })).toBe('deferred')
    expect(Object.keys(places(number))).toEqual([`loop${number}p2`])
    await other.end()
    expectGone(number)
    // K3: it has outlived its attachment. Whoever gets the device next does not see it.
    await using next = await attach(image('next'), { number })
    expectNoPartitions(number)
    await next.detach()
  })

  test('by a handle that was opened, after the process that attached it', async ({ image }) => {
    const file = twoImage(image)
    const remote = new Remote()
    const { number } = await remote.attach(file, { partscan: 'user', autoclear: false })
    await remote.end()
    expect(places(number)).toEqual(twoOf(number))
    await using device = await open(number)
    expect(await device.partitions()).toMatchObject([{ label: 'first' }, { label: 'second' }])
    expectUsable(await device.partitions(), file)
    expect(await device.detach()).toBe('detached')
    expectNoPartitions(number)
  })
})

/** A file system on the partition, mounted in the meantime. */
async function withMount(folder: string, path: string, use: (mountPoint: string) => Promise<void>): Promise<void> {
  const mountPoint = join(folder, 'a mount point')
  mkdirSync(mountPoint, { recursive: true })
  execFileSync('mkfs.ext4', ['-q', '-F', path])
  execFileSync('mount', [path, mountPoint])
  try {
    await use(mountPoint)
  } finally {
    execFileSync('umount', [mountPoint])
  }
}

/** A mount namespace that was made meanwhile, by whatever else runs, has the mount too until it ends. */
/** Another program that was offered the same device can have it open for a moment. */
async function expectDetached(file: string): Promise<void> {
  const devices = () => execFileSync('losetup', ['--associated', file], { encoding: 'utf8' })
  await vi.waitFor(() => expect(devices()).toBe(''), { timeout: limit(5_000), interval: 5 })
}

async function detachSoon(device: LoopDevice): Promise<DetachResult> {
  return vi.waitFor(() => device.detach(), { timeout: limit(15_000), interval: 100 })
}

/** K3, up to 7.1: the number of a free device that has them. Another process, to hold one before it goes. */
async function leftover(file: string, hold?: string): Promise<{ number: number; other?: Opener }> {
  const remote = new Remote()
  const { number } = await remote.attach(file, { number: ownNumber(), partscan: 'user' })
  const other = hold === undefined ? undefined : await opener(`/dev/loop${number}${hold}`)
  await remote.end('SIGKILL')
  return { number, ...(other && { other }) }
}

describe('partitions left by a process that was killed', () => {
  const options: [string, AttachOptions][] = [
    ['partitions are not asked for', {}],
    ['the kernel looks for partitions', { partscan: true }],
    ["partscan: 'user'", { partscan: 'user' }],
    ['read-only', { readOnly: true }],
  ]
  for (const [name, given] of options) {
    test(`the next attachment has none of them: ${name}`, async ({ image }) => {
      const { number } = await leftover(twoImage(image))
      await vi.waitUntil(() => sysfs(number, 'loop/backing_file') === undefined, limit(1_000))
      if (Object.keys(knownPartitions(number)).length === 0) skipForKernel('leftover partitions')
      expect(places(number)).toEqual(twoOf(number))
      const device = await attach(image('next', 8 * MiB), { ...given, number })
      expect(await device.partitions()).toEqual([])
      expectNoPartitions(number)
      expect(await device.detach()).toBe('detached')
      expectNoPartitions(number)
    })
  }

  test('a single one is seen too, after plain attachments of the same process', async ({ image }) => {
    const one = image('one', 8 * MiB)
    sfdisk(one, 'label: dos\nstart=2048, size=1024\n')
    // The directory of an attached device without partitions has as many links as that of a free one with one.
    await using plain = await attach(image('plain'))
    await plain.detach()
    const { number } = await leftover(one)
    await vi.waitUntil(() => sysfs(number, 'loop/backing_file') === undefined, limit(1_000))
    if (Object.keys(knownPartitions(number)).length === 0) skipForKernel('leftover partitions')
    await using device = await attach(image('next', 8 * MiB), { number })
    expectNoPartitions(number)
    expect(await device.partitions()).toEqual([])
  })

  test('the next image has its own', async ({ image }) => {
    const { number } = await leftover(twoImage(image))
    await vi.waitUntil(() => sysfs(number, 'loop/backing_file') === undefined, limit(1_000))
    const next = image('next', 8 * MiB)
    sfdisk(next, 'label: dos\nstart=2048, size=1024\n')
    await using device = await attach(next, { number, partscan: 'user' })
    expect(places(number)).toEqual({ [`loop${number}p1`]: `${MiB} ${512 * 1024}` })
    expectUsable(await device.partitions(), next)
  })

  test('one of them in use: the device is not taken, and its user sees nothing of another image', async ({ image }) => {
    const { number, other } = await leftover(twoImage(image), 'p2')
    // The user of the partition keeps the attachment: it ends with that.
    expect(sysfs(number, 'loop/autoclear')).toBe('1')
    await other?.end()
    await vi.waitUntil(() => sysfs(number, 'loop/backing_file') === undefined, limit(1_000))
    if (Object.keys(knownPartitions(number)).length === 0) skipForKernel('leftover partitions')
    const again = await opener(`/dev/loop${number}p2`)
    // On 6.1 the kernel looks for partitions at this open, and forgets them; the user of one is not to be seen then.
    if (Object.keys(knownPartitions(number)).length === 0) skipForKernel('leftover partitions')
    for (const partscan of ['user', true, false] as const) {
      const error = await failure('in-use', () => attach(twoImage(image, 'next'), { number, partscan, timeout: 0 }))
      expect(error.holders).toContainEqual(expect.objectContaining({ device: `/dev/loop${number}p2`, pid: again.pid }))
      expect(sysfs(number, 'loop/backing_file')).toBeUndefined()
    }
    // With a free choice it is another one, without waiting for that user.
    const file = twoImage(image, 'next')
    await using chosen = await attach(file, { partscan: 'user' })
    expect(chosen.number).not.toBe(number)
    expectUsable(await chosen.partitions(), file)
    await chosen.detach()
    await again.end()
    await using device = await attach(file, { number, partscan: 'user' })
    expect(places(number)).toEqual(twoOf(number))
    await device.detach()
    expectNoPartitions(number)
  })
})

describe("overlap: 'reuse'", () => {
  test('looks for partitions that are not there yet, and takes nothing away', async ({ image }) => {
    const file = twoImage(image)
    await using owner = await attach(file, { readOnly: true })
    const given = { readOnly: true, overlap: 'reuse', partscan: 'user' } as const
    const users = await Promise.all(Array.from({ length: 8 }, () => attach(file, given)))
    for (const user of users) {
      expect(user).toMatchObject({ number: owner.number, owned: false })
      expectUsable(await user.partitions(), file)
    }
    expect(places(owner.number)).toEqual(twoOf(owner.number))
    for (const user of users) await user.close()
    expect(places(owner.number)).toEqual(twoOf(owner.number))
    expect(await owner.detach()).toBe('detached')
    expectNoPartitions(owner.number)
  })

  test('given up, it leaves the partitions of the owner', async ({ image }) => {
    const file = twoImage(image)
    await using owner = await attach(file, { readOnly: true, partscan: 'user' })
    for (let calls = 1; ; calls++) {
      const controller = new AbortController()
      let seen = 0
      observe(() => void (++seen === calls && controller.abort()))
      const given = { readOnly: true, overlap: 'reuse', partscan: 'user', signal: controller.signal } as const
      const user = await attach(file, given).catch(() => undefined)
      observe(undefined)
      expect(places(owner.number), `call ${calls}`).toEqual(twoOf(owner.number))
      await user?.close()
      if (seen < calls) break
    }
    expectUsable(await owner.partitions(), file)
  })
})

function paths(partitions: Partition[]): string[] {
  return partitions.map(({ path }) => path)
}

describe('rescanPartitions', () => {
  test('after sfdisk appended a partition to the file, and removed one', async ({ image }) => {
    const file = twoImage(image)
    await using device = await attach(file, { number: ownNumber(), partscan: 'user' })
    const { number } = device
    const before = knownPartitions(number)
    expect(await device.rescanPartitions()).toEqual(await device.partitions())
    expect(knownPartitions(number)).toEqual(before)

    sfdisk(file, 'start=10240, size=2048, name=third\n', '--append')
    mark(file, [MiB, SECOND.start, 10_240 * 512])
    const partitions = await device.rescanPartitions()
    expect(partitions.map(({ label }) => label)).toEqual(['first', 'second', 'third'])
    expect(knownPartitions(number)).toMatchObject(before)
    expectUsable(partitions, file)
    expect(readBytes(`${device.path}p3`, 0, 512).equals(pattern(2))).toBe(true)

    deletePartition(file, 1)
    expect((await device.rescanPartitions()).map(({ number: index }) => index)).toEqual([2, 3])
    expect(partitionNodes(number)).toEqual([`loop${number}p2`, `loop${number}p3`])

    // Another table altogether
    sfdisk(file, 'label: dos\nstart=4096, size=2048\n')
    expect(await device.rescanPartitions()).toMatchObject([{ number: 1, table: 'mbr', start: 4096 * 512 }])
    expectUsable(await device.partitions(), file)
    execFileSync('wipefs', ['--quiet', '--all', '--force', file])
    expect(await device.rescanPartitions()).toEqual([])
    expectNoPartitions(number)
  })

  test('of a device that was attached without partitions, mode: user', async ({ image }) => {
    const file = twoImage(image)
    await using device = await attach(file)
    expect(await device.partitions()).toEqual([])
    expectUsable(await device.rescanPartitions({ mode: 'user' }), file)
    expect(places(device.number)).toEqual(twoOf(device.number))
    await device.detach()
    expectNoPartitions(device.number)
  })

  test('a partition that stays may be mounted meanwhile', async ({ folder, image }) => {
    const file = twoImage(image)
    await using device = await attach(file, { number: ownNumber(), partscan: 'user' })
    const { number } = device
    await withMount(folder, `${device.path}p2`, async (mountPoint) => {
      writeFileSync(join(mountPoint, 'file'), 'still here')
      const before = knownPartitions(number)[`loop${number}p2`]
      sfdisk(file, 'start=10240, size=2048, name=third\n', '--append')
      deletePartition(file, 1)
      const partitions = await device.rescanPartitions()
      expect(partitions.map(({ label }) => label)).toEqual(['second', 'third'])
      expect(knownPartitions(number)[`loop${number}p2`]).toEqual(before)
      expect(execFileSync('cat', [join(mountPoint, 'file')], { encoding: 'utf8' })).toBe('still here')
      execFileSync('sync', ['-f', mountPoint])
    })
    expect(await detachSoon(device)).toBe('detached')
    expectNoPartitions(number)
  })

  test('a partition that is gone from the table, but in use: in-use, and the others are there as before', async ({
    image,
  }) => {
    const file = twoImage(image)
    await using device = await attach(file, { number: ownNumber(), partscan: 'user' })
    const { number } = device
    const other = await opener(`${device.path}p2`)
    sfdisk(file, 'label: gpt\nstart=10240, size=2048\n')
    const error = await failure('in-use', () => device.rescanPartitions({ timeout: 0 }))
    expect(error).toMatchObject({ code: 'EBUSY', ioctl: 'BLKPG' })
    expect(error.holders).toEqual([{ device: `${device.path}p2`, kind: 'process', pid: other.pid, command: 'sh' }])
    expect(error.message).toContain(`${device.path}p2`)
    expect(places(number)).toEqual(twoOf(number))
    expectUsable(await device.partitions(), file)
    await other.end()
    expect(await device.rescanPartitions()).toMatchObject([{ number: 1, start: 10_240 * 512 }])
  })

  test('a table that is damaged meanwhile is refused, and the partitions stay', async ({ image }) => {
    const file = twoImage(image)
    await using device = await attach(file, { number: ownNumber(), partscan: 'user' })
    const before = knownPartitions(device.number)
    patch(file, 512, Buffer.alloc(8))
    patch(file, 8 * MiB - 512, Buffer.alloc(8))
    await failure('bad-partition-table', () => device.rescanPartitions())
    expect(knownPartitions(device.number)).toEqual(before)
    expect(await device.partitions()).toMatchObject([{ number: 1 }, { number: 2 }])
  })

  test('mode: kernel, without partscan, is partscan-off; with it, what the kernel finds', async ({ image }) => {
    const file = twoImage(image)
    await using device = await attach(file, { number: ownNumber(), partscan: 'user' })
    const before = knownPartitions(device.number)
    const error = await failure('partscan-off', () => device.rescanPartitions({ mode: 'kernel' }))
    expect(error).toMatchObject({ code: 'EINVAL', ioctl: 'BLKRRPART' })
    expect(knownPartitions(device.number)).toEqual(before)
    await device.detach()

    // Kernels without a parser of the table find nothing: that is said.
    await using scanned = await attach(file, { partscan: 'kernel' })
    const found = partitionNodes(scanned.number).map((name) => `/dev/${name}`)
    const codes = found.length === 0 ? ['no-parser'] : []
    expect(Object.keys(knownPartitions(scanned.number)).map((name) => `/dev/${name}`)).toEqual(found)
    expect(paths(await scanned.partitions())).toEqual(found)
    expect(scanned.warnings.map(({ code }) => code)).toEqual(codes)
    expect(paths(await scanned.rescanPartitions({ mode: 'kernel' }))).toEqual(found)
    expect(scanned.warnings.map(({ code }) => code)).toEqual(codes)
    expect(paths(await scanned.rescanPartitions())).toHaveLength(2)
    expect(places(scanned.number)).toEqual(twoOf(scanned.number))
    expect(scanned.warnings.map(({ code }) => code)).toEqual(codes)
    await scanned.detach()
    expectNoPartitions(scanned.number)
  })

  test('wrong arguments, an aborted signal, a device that is not attached', async ({ image }) => {
    await using device = await attach(twoImage(image), { number: ownNumber(), partscan: 'user' })
    const before = knownPartitions(device.number)
    const wrong = (options: unknown) => device.rescanPartitions(options as { timeout: number })
    await expect(wrong({ mode: 'both' })).rejects.toMatchObject({ name: 'TypeError', code: 'ERR_INVALID_ARG_VALUE' })
    await expect(wrong({ mode: 1 })).rejects.toThrow(TypeError)
    await expect(wrong({ timeout: -1 })).rejects.toThrow(RangeError)
    await expect(wrong({ modus: 'user' })).rejects.toThrow(TypeError)
    await expect(wrong('user')).rejects.toThrow(TypeError)
    const reason = new Error('enough')
    await expect(device.rescanPartitions({ signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    expect(knownPartitions(device.number)).toEqual(before)
    await using other = await open(device.number)
    await device.detach({ lazy: true })
    await other.close()
    await failure('closed', () => device.rescanPartitions())
    await failure('closed', () => device.partitions())
    await expect(attach('/x', { partscan: 'both' as 'user' })).rejects.toThrow(TypeError)
    await expect(attach('/x', { createNode: true as false })).rejects.toThrow(TypeError)
    await expect(attach('/x', { blockSize: 'best' as 'auto' })).rejects.toThrow(TypeError)

    const number = unusedNumber()
    await using control = await LoopControl.open()
    await control.add(number)
    onTestFinished(() => removeDevice(number))
    await using free = await open(number)
    await failure('not-attached', () => free.partitions())
    await failure('not-attached', () => free.rescanPartitions())
  })
})

describe('with partitions', () => {
  test('changeBackingFile and migrate keep them', async ({ folder, image }) => {
    const file = twoImage(image)
    const copy = join(folder, 'copy')
    copyFileSync(file, copy)
    await using device = await attach(file, { partscan: 'user', readOnly: true })
    const { number } = device
    const before = knownPartitions(number)
    await device.changeBackingFile(copy, { verify: true })
    expect(sysfs(number, 'loop/backing_file')).toBe(copy)
    expect(knownPartitions(number)).toEqual(before)
    expectUsable(await device.partitions(), copy)
    const destination = join(folder, 'destination')
    expect(await device.migrate(destination)).toMatchObject({ verified: true })
    expect(sysfs(number, 'loop/backing_file')).toBe(destination)
    expect(knownPartitions(number)).toEqual(before)
    expectUsable(await device.partitions(), destination)
    expect(await device.detach()).toBe('detached')
    expectNoPartitions(number)
  })

  test('changeBackingFile under a mounted partition, which survives it', async ({ folder, image }) => {
    const file = twoImage(image)
    const large = Buffer.alloc(MiB / 4, 'content ')
    await using writable = await attach(file, { partscan: 'user' })
    await withMount(folder, `${writable.path}p2`, async (mountPoint) => {
      writeFileSync(join(mountPoint, 'file'), large)
    })
    expect(await detachSoon(writable)).toBe('detached')
    const copy = join(folder, 'copy')
    copyFileSync(file, copy)
    await using device = await attach(file, { partscan: 'user', readOnly: true })
    const before = knownPartitions(device.number)
    const mountPoint = join(folder, 'a mount point')
    execFileSync('mount', ['-o', 'ro', `${device.path}p2`, mountPoint])
    try {
      await device.changeBackingFile(copy)
      expect(sysfs(device.number, 'loop/backing_file')).toBe(copy)
      execFileSync('sh', ['-c', 'echo 1 > /proc/sys/vm/drop_caches'])
      expect(readFileSync(join(mountPoint, 'file')).equals(large)).toBe(true)
      expect(knownPartitions(device.number)).toEqual(before)
    } finally {
      execFileSync('umount', [mountPoint])
    }
    expect(await detachSoon(device)).toBe('detached')
    expectNoPartitions(device.number)
  })

  test('swappable: they are those of the upper device, and stay when the lower one is changed', async ({
    folder,
    image,
  }) => {
    const file = twoImage(image)
    await using device = await attach(file, { partscan: 'user', readOnly: true, swappable: true })
    const { number } = device
    const { lower } = await device.status()
    expect(lower).toBeTypeOf('number')
    const before = knownPartitions(number)
    expect(places(number)).toEqual(twoOf(number))
    expectNoPartitions(lower ?? -1)
    expectUsable(await device.partitions(), file)
    const copy = join(folder, 'copy')
    copyFileSync(file, copy)
    await device.changeBackingFile(copy)
    expect(sysfs(lower ?? -1, 'loop/backing_file')).toBe(copy)
    expect(knownPartitions(number)).toEqual(before)
    expectUsable(await device.partitions(), copy)
    expect(await device.detach()).toBe('detached')
    expectNoPartitions(number)
    expect(sysfs(lower ?? -1, 'loop/backing_file')).toBeUndefined()
  })

  test('swappable, with blocks of 4096 bytes that are found out', async ({ image }) => {
    const file = image('disk', 8 * MiB)
    await sfdiskAt(4096, file, TWO_4096)
    const given = { partscan: 'user', blockSize: 'auto', readOnly: true, swappable: true } as const
    await using device = await attach(file, given)
    expect(sysfs(device.number, 'queue/logical_block_size')).toBe('4096')
    expect(places(device.number)).toEqual(twoOf(device.number))
    expectUsable(await device.partitions(), file)
  })
})

async function blockSizeOf(file: string, given: AttachOptions = {}): Promise<string | undefined> {
  const device = await attach(file, { blockSize: 'auto', partscan: 'user', ...given })
  try {
    const partitions = await device.partitions()
    for (const { path, device: numbers } of partitions) expect(nodeOf(path)).toBe(numbers)
    return `${sysfs(device.number, 'queue/logical_block_size')}, ${partitions.length} partitions`
  } finally {
    await device.detach()
  }
}

describe("blockSize: 'auto'", () => {
  test('is that of the GPT, also in a part of the file, and by the backup alone', async ({ image }) => {
    const plain = await attach(image('plain'))
    const usual = sysfs(plain.number, 'queue/logical_block_size')
    await plain.detach()
    expect(await blockSizeOf(image('empty', 8 * MiB))).toBe(`${usual}, 0 partitions`)
    expect(await blockSizeOf(image('small', 512))).toBe(`${usual}, 0 partitions`)
    for (const [blockSize, script] of [
      [512, TWO],
      [4096, TWO_4096],
    ] as const) {
      const file = image('disk', 8 * MiB)
      await sfdiskAt(blockSize, file, script)
      expect(await blockSizeOf(file)).toBe(`${blockSize}, 2 partitions`)
      const larger = image('larger', 16 * MiB)
      patch(larger, MiB + 512, readBytes(file, 0, 8 * MiB))
      expect(await blockSizeOf(larger, { offset: MiB + 512, sizeLimit: 8 * MiB })).toBe(`${blockSize}, 2 partitions`)
      expect(await blockSizeOf(larger)).toBe(`${usual}, 0 partitions`)
      patch(file, blockSize, Buffer.alloc(blockSize))
      expect(await blockSizeOf(file), 'by the backup').toBe(`${blockSize}, 2 partitions`)
    }
  })

  test('a table for another block size: its partitions are there, and a warning says so', async ({ image }) => {
    const file = image('disk', 8 * MiB)
    await sfdiskAt(4096, file, TWO_4096)
    for (const partscan of ['user', true] as const) {
      await using device = await attach(file, { partscan, blockSize: 512 })
      expect(places(device.number)).toEqual(twoOf(device.number))
      expect(device.warnings).toMatchObject([{ code: 'table-block-size', message: expect.stringMatching(/4096.*512/) }])
      await device.detach()
    }
  })

  test('a table for smaller blocks: what is not aligned to those of the device is left out', async ({ image }) => {
    const file = image('disk', 8 * MiB)
    sfdisk(file, 'label: gpt\nstart=2048, size=2048\nstart=4097, size=8\n')
    await using device = await attach(file, { partscan: 'user', blockSize: 4096 })
    expect(places(device.number)).toEqual({ [`loop${device.number}p1`]: `${MiB} ${MiB}` })
    expect(device.warnings).toMatchObject([
      { code: 'table-block-size' },
      { code: 'partition-left-out', message: expect.stringMatching(/^partition 2 cannot be: .*multiples of .*4096/) },
    ])
  })
})

describe('partscan: true', () => {
  test('partitions appear, whatever the kernel can, and come back after a change', async ({ folder, image }) => {
    const file = twoImage(image)
    const copy = join(folder, 'copy')
    copyFileSync(file, copy)
    for (let turn = 0; turn < 2; turn++) {
      await using device = await attach(file, { partscan: true, readOnly: true })
      expect(sysfs(device.number, 'loop/partscan')).toBe('1')
      expect(places(device.number)).toEqual(twoOf(device.number))
      expectUsable(await device.partitions(), file)
      await device.changeBackingFile(copy)
      expect(places(device.number)).toEqual(twoOf(device.number))
      expectUsable(await device.partitions(), copy)
      expect(await device.detach()).toBe('detached')
      expectNoPartitions(device.number)
    }
  })

  test('an image without a table, or with a damaged one, is no error', async ({ image }) => {
    const blank = image('blank', 8 * MiB)
    await using none = await attach(blank, { partscan: true })
    expect(await none.partitions()).toEqual([])
    expect(await none.rescanPartitions()).toEqual([])
    expect(none.warnings).toEqual([])
    await none.detach()
    const file = twoImage(image)
    patch(file, 512, Buffer.alloc(8))
    patch(file, 8 * MiB - 512, Buffer.alloc(8))
    await using device = await attach(file, { partscan: true })
    expect(device.warnings).toMatchObject([{ code: 'gpt-backup', message: expect.stringMatching(/primary.*backup/) }])
    expectNoPartitions(device.number)
    await device.detach()
  })

  test('setStatus({ partscan: true }) keeps partitions that are there', async ({ image }) => {
    const file = twoImage(image)
    await using device = await attach(file, { partscan: 'user' })
    await device.setStatus({ partscan: true })
    expect(sysfs(device.number, 'loop/partscan')).toBe('1')
    expect(places(device.number)).toEqual(twoOf(device.number))
    expectUsable(await device.partitions(), file)
    await device.detach()
    expectNoPartitions(device.number)
  })
})

describe('a partition that grows', () => {
  for (const partscan of ['user', true] as const) {
    test(`while it is mounted, attached with partscan: ${partscan}`, async ({ folder, image }) => {
      const file = image('disk', 16 * MiB)
      sfdisk(file, 'label: gpt\nstart=2048, size=2048\nstart=4096, size=16384\n')
      await using device = await attach(file, { partscan })
      const second = `loop${device.number}p2`
      await withMount(folder, `${device.path}p2`, async (mountPoint) => {
        writeFileSync(join(mountPoint, 'file'), 'still here')
        const before = knownPartitions(device.number)[second]
        truncateSync(file, 32 * MiB)
        await device.refreshCapacity()
        execFileSync('sync', ['-f', mountPoint])
        sgdisk(file, '--move-second-header')
        sfdisk(file, ',40960\n', '-N2')
        const partitions = await device.rescanPartitions({ timeout: 1_000 })
        expect(partitions).toMatchObject([
          { number: 1, size: MiB },
          { number: 2, size: 20 * MiB },
        ])
        expect(knownPartitions(device.number)[second]).toEqual({ ...before, size: 20 * MiB })
        const size = execFileSync('blockdev', ['--getsize64', `${device.path}p2`], { encoding: 'utf8' })
        expect(Number(size)).toBe(20 * MiB)
        expect(readFileSync(join(mountPoint, 'file'), 'utf8')).toBe('still here')
        // Smaller under a mount would lose what is at its end
        sfdisk(file, ',2048\n', '-N2', '--force')
        await failure('in-use', () => device.rescanPartitions({ timeout: 0 }))
        expect(knownPartitions(device.number)[second]).toEqual({ ...before, size: 20 * MiB })
      })
      expect(await detachSoon(device)).toBe('detached')
      expectNoPartitions(device.number)
    })
  }

  test('over another one, which stays: it keeps its size, and that is said', async ({ image }) => {
    const file = image('disk', 8 * MiB)
    record(file, 0, slot(0x83, 2048, 1024), slot(0x83, 4096, 1024))
    await using device = await attach(file, { partscan: 'user' })
    record(file, 0, slot(0x83, 2048, 2560), slot(0x83, 4096, 1024))
    await device.rescanPartitions()
    expect(places(device.number)).toEqual({
      [`loop${device.number}p1`]: `${MiB} ${MiB / 2}`,
      [`loop${device.number}p2`]: `${2 * MiB} ${MiB / 2}`,
    })
    expect(device.warnings).toMatchObject([
      {
        code: 'partition-cut',
        message: expect.stringMatching(/^partition 1 overlaps with partition 2 by 256 KiB.*stays at 512 KiB$/),
      },
    ])
  })
})
