import { execFileSync } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, truncateSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { crc32 } from 'node:zlib'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { LoopError } from '../../lib/errors/errors.ts'
import { type BlockReader, describeTable, type FoundTable } from '../../lib/partitions/disk.ts'
import { probeGptBlockSize } from '../../lib/partitions/gpt.ts'
import { findTable } from '../../lib/partitions/table.ts'
import { GPT_TYPES, MBR_TYPES } from '../../lib/partitions/types.ts'
import { env, needs } from '../needs.ts'
import { STEP } from '../scale.ts'

const MiB = 1 << 20
const LINUX = '0FC63DAF-8483-4772-8E79-3D69D8477DE4'
const EFI = 'C12A7328-F81F-11D2-BA4B-00A0C93EC93B'
const SWAP = '0657FD6D-A4AB-43C4-84E5-0933C84B4F4F'
const DISK = '11223344-5566-7788-99AA-BBCCDDEEFF00'

/** Reads a buffer; a read that is not of whole blocks or leaves the device fails the test. */
function readerOf(bytes: Uint8Array, blockSize = 512): BlockReader & { bytes: number } {
  const reader = async (at: bigint, length: number): Promise<Uint8Array> => {
    const position = Number(at)
    if (length <= 0 || position < 0 || position % blockSize !== 0 || length % blockSize !== 0) {
      throw new Error(`read of ${length} bytes at ${position}`)
    }
    if (position + length > bytes.length) throw new Error(`read to ${position + length} of ${bytes.length}`)
    reader.bytes += length
    return bytes.subarray(position, position + length)
  }
  reader.bytes = 0
  return reader
}

/** A table in a form that is short to write down: of what is not so, nothing; of the warnings the messages. */
interface Short {
  kind: 'gpt' | 'mbr'
  diskId: string
  usedBackup: boolean
  warnings: string[]
  partitions: {
    number: number
    start: number
    size: number
    type: string
    typeName?: string
    label?: string
    uuid?: string
    bootable?: true
    readOnly?: true
    extended?: true
  }[]
}

function shorten(found: FoundTable): Short {
  const { table: kind, diskId, usedBackup, warnings, partitions } = found
  expect(partitions.every((partition) => partition.table === kind)).toBe(true)
  return {
    kind,
    diskId,
    usedBackup,
    warnings: warnings.map(({ message }) => message),
    partitions: partitions.map(({ table: _, start, size, readOnly, bootable, ...partition }) => ({
      ...partition,
      start: Number(start),
      size: Number(size),
      ...(readOnly && { readOnly }),
      ...(bootable && { bootable }),
    })),
  }
}

async function read(bytes: Uint8Array, blockSize = 512): Promise<Short | undefined> {
  const found = await findTable(readerOf(bytes, blockSize), BigInt(bytes.length), blockSize)
  return found && shorten(found)
}

/** The codes and messages of the warnings. */
async function warningsOf(bytes: Uint8Array, blockSize = 512): Promise<string[]> {
  const found = await findTable(readerOf(bytes, blockSize), BigInt(bytes.length), blockSize)
  return (found?.warnings ?? []).map(({ code, message }) => `${code}: ${message}`)
}

async function table(bytes: Uint8Array, blockSize = 512): Promise<Short> {
  const found = await read(bytes, blockSize)
  if (!found) throw new Error('no table found')
  return found
}

async function refused(bytes: Uint8Array, blockSize = 512): Promise<LoopError> {
  const error = await read(bytes, blockSize).catch((thrown: unknown) => thrown)
  if (!LoopError.is(error, 'bad-partition-table')) throw new Error('it was not refused', { cause: error })
  expect(error.code).toBe('EINVAL')
  return error
}

// ── Tables made byte by byte ──

type Entry = [type: number, start: number, size: number, active?: number]

/** Writes a boot record with those entries to that block. */
function bootRecord(image: Buffer, block: number, entries: (Entry | undefined)[], blockSize = 512, id = 0): Buffer {
  const at = block * blockSize
  if (id !== 0) image.writeUInt32LE(id, at + 440)
  for (const [index, entry] of entries.entries()) {
    if (!entry) continue
    const [type, start, size, active = 0] = entry
    const place = at + 446 + index * 16
    image.writeUInt8(active, place)
    image.writeUInt8(type, place + 4)
    image.writeUInt32LE(start, place + 8)
    image.writeUInt32LE(size, place + 12)
  }
  image.writeUInt16LE(0xaa55, at + 510)
  return image
}

function mbr(entries: (Entry | undefined)[], blockSize = 512, bytes = MiB): Buffer {
  return bootRecord(Buffer.alloc(bytes), 0, entries, blockSize, 0x1a2b3c4d)
}

function reverse(digits: string): Buffer {
  return Buffer.from(Buffer.from(digits, 'hex').toReversed())
}

function guid(text: string): Buffer {
  const [a = '', b = '', c = '', d = '', e = ''] = text.split('-')
  return Buffer.concat([reverse(a), reverse(b), reverse(c), Buffer.from(d + e, 'hex')])
}

interface GptEntry {
  type?: string
  first: number | bigint
  last: number | bigint
  name?: string
  attributes?: bigint
}

interface GptOptions {
  blockSize?: number
  bytes?: number
  count?: number
  entrySize?: number
  /** Changes both headers before their CRC is made. */
  header?: (header: Buffer, primary: boolean) => void
}

/** A protective MBR, and both copies of that table. */
function gpt(entries: (GptEntry | undefined)[], options: GptOptions = {}): Buffer {
  const { blockSize = 512, bytes = MiB, count = 128, entrySize = 128, header } = options
  const blocks = bytes / blockSize
  const image = bootRecord(Buffer.alloc(bytes), 0, [[0xee, 1, blocks - 1]], blockSize)
  const array = Buffer.alloc(count * entrySize)
  for (const [index, entry] of entries.entries()) {
    if (!entry) continue
    const at = index * entrySize
    guid(entry.type ?? LINUX).copy(array, at)
    guid(`00000000-0000-0000-0000-${String(index + 1).padStart(12, '0')}`).copy(array, at + 16)
    array.writeBigUInt64LE(BigInt(entry.first), at + 32)
    array.writeBigUInt64LE(BigInt(entry.last), at + 40)
    array.writeBigUInt64LE(entry.attributes ?? 0n, at + 48)
    array.write(entry.name ?? '', at + 56, 72, 'utf16le')
  }
  const arrayBlocks = Math.ceil(array.length / blockSize)
  const last = blocks - 1
  for (const [mine, other, place] of [
    [1, last, 2],
    [last, 1, last - arrayBlocks],
  ] as const) {
    const bytesOfHeader = Buffer.alloc(92)
    bytesOfHeader.write('EFI PART', 'latin1')
    bytesOfHeader.writeUInt32LE(0x10000, 8)
    bytesOfHeader.writeUInt32LE(92, 12)
    bytesOfHeader.writeBigUInt64LE(BigInt(mine), 24)
    bytesOfHeader.writeBigUInt64LE(BigInt(other), 32)
    bytesOfHeader.writeBigUInt64LE(BigInt(2 + arrayBlocks), 40)
    bytesOfHeader.writeBigUInt64LE(BigInt(last - arrayBlocks - 1), 48)
    guid(DISK).copy(bytesOfHeader, 56)
    bytesOfHeader.writeBigUInt64LE(BigInt(place), 72)
    bytesOfHeader.writeUInt32LE(count, 80)
    bytesOfHeader.writeUInt32LE(entrySize, 84)
    bytesOfHeader.writeUInt32LE(crc32(array), 88)
    header?.(bytesOfHeader, mine === 1)
    bytesOfHeader.writeUInt32LE(crc32(bytesOfHeader), 16)
    bytesOfHeader.copy(image, mine * blockSize)
    array.copy(image, place * blockSize)
  }
  return image
}

/** That byte is another one. */
function damage(image: Buffer, ...positions: number[]): Buffer {
  for (const at of positions) image.writeUInt8(image.readUInt8(at) ^ 0xff, at)
  return image
}

/** What sfdisk reads, in the shape of ours. */
function bySfdisk(path: string): Pick<Short, 'diskId' | 'kind'> & { partitions: object[] } {
  interface Dump {
    label: string
    id: string
    sectorsize: number
    partitions?: {
      node: string
      start: number
      size: number
      type: string
      uuid?: string
      name?: string
      attrs?: string
      bootable?: boolean
    }[]
  }
  const text = execFileSync('sfdisk', ['--json', path], { env, encoding: 'utf8', stdio: 'pipe' })
  const { partitiontable: dump } = JSON.parse(text) as { partitiontable: Dump }
  return {
    kind: dump.label === 'gpt' ? 'gpt' : 'mbr',
    diskId: dump.id,
    partitions: (dump.partitions ?? []).map(({ node, start, size, type, uuid, name, attrs, bootable }) => {
      const boots = bootable === true || attrs?.includes('LegacyBIOSBootable') === true
      return {
        number: Number(node.slice(path.length)),
        start: start * dump.sectorsize,
        size: size * dump.sectorsize,
        type,
        uuid,
        label: name,
        bootable: boots ? true : undefined,
      }
    }),
  }
}

/** Ours, without what sfdisk does not tell. */
function comparable(found: Short): ReturnType<typeof bySfdisk> {
  return {
    kind: found.kind,
    diskId: found.diskId,
    partitions: found.partitions.map(({ number, start, size, type, uuid, label, bootable }) => {
      return { number, start, size, type, uuid: found.kind === 'gpt' ? uuid : undefined, label, bootable }
    }),
  }
}

/** Reads it, and holds it against what sfdisk reads. */
async function agrees(path: string): Promise<Short> {
  const found = await table(readFileSync(path))
  expect(comparable(found)).toEqual(bySfdisk(path))
  return found
}

describe('against sfdisk', () => {
  let folder = ''
  let made = 0
  beforeEach(() => needs('sfdisk'))
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'loopctl-table-'))
  })
  afterAll(() => rmSync(folder, { recursive: true, force: true }))

  function blank(bytes: number): string {
    const path = join(folder, `${++made}.img`)
    closeSync(openSync(path, 'w'))
    truncateSync(path, bytes)
    return path
  }

  function sfdisk(script: string, bytes = 64 * MiB): string {
    const path = blank(bytes)
    execFileSync('sfdisk', ['--quiet', path], { env, input: script, stdio: ['pipe', 'pipe', 'pipe'] })
    return path
  }

  const GPT_SCRIPT = `label: gpt
1: size=4M, type=${EFI}, name="EFI \u{e9}"
2: size=5M, type=${LINUX}, name="root", attrs="LegacyBIOSBootable GUID:60"
7: size=6M, type=${SWAP}
128: size=7M, type=${LINUX}, name="${'x'.repeat(36)}"
`

  test('a GPT: numbers with gaps, names, attributes', async () => {
    const found = await agrees(sfdisk(GPT_SCRIPT))
    expect(found).toMatchObject({ kind: 'gpt', usedBackup: false, warnings: [] })
    expect(found.partitions.map(({ number }) => number)).toEqual([1, 2, 7, 128])
    expect(found.partitions.map(({ typeName }) => typeName)).toEqual([
      'EFI System',
      'Linux filesystem',
      'Linux swap',
      'Linux filesystem',
    ])
    expect(found.partitions[0]?.label).toBe('EFI \u{e9}')
  })

  test('an empty GPT and an empty MBR', async () => {
    for (const label of ['gpt', 'dos']) {
      expect(await agrees(sfdisk(`label: ${label}\n`))).toMatchObject({ partitions: [], warnings: [] })
    }
  })

  for (const [what, at] of [
    ['header', 512 + 60],
    ['signature', 512],
    ['entries', 1024 + 32],
  ] as const) {
    test(`a GPT whose primary ${what} is damaged`, async () => {
      const path = sfdisk(GPT_SCRIPT)
      const whole = await table(readFileSync(path))
      const damaged = damage(readFileSync(path), at)
      const fd = openSync(path, 'r+')
      writeSync(fd, damaged, at, 1, at)
      closeSync(fd)
      const found = await agrees(path)
      expect(found).toEqual({
        ...whole,
        usedBackup: true,
        warnings: [expect.stringContaining('primary GPT is damaged')],
      })
    })
  }

  test('an MBR with primaries, one of type 0', async () => {
    const found = await agrees(
      sfdisk(`label: dos
label-id: 0x0a2b3c4d
1: size=4M, type=83, bootable
2: size=4M, type=c
4: size=4M, type=0
`),
    )
    expect(found).toMatchObject({ kind: 'mbr', diskId: '0x0a2b3c4d', usedBackup: false, warnings: [] })
    expect(found.partitions.map(({ uuid }) => uuid)).toEqual(['0a2b3c4d-01', '0a2b3c4d-02', '0a2b3c4d-04'])
    expect(found.partitions.map(({ typeName }) => typeName)).toEqual(['Linux', 'W95 FAT32 (LBA)', 'Empty'])
  })

  for (const type of ['5', 'f', '85']) {
    test(`an MBR with logical partitions in an extended one of type ${type}`, async () => {
      const logical = Array.from(
        { length: 12 },
        (_, index) => `${5 + index}: size=2M, type=${index % 2 === 0 ? '83' : '82'}`,
      )
      const found = await agrees(
        sfdisk(`label: dos
1: size=4M, type=83
2: size=50M, type=${type}
3: size=4M, type=b
${logical.join('\n')}
`),
      )
      expect(found.warnings).toEqual([])
      expect(found.partitions.map(({ number }) => number)).toEqual([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
      expect(found.partitions.filter(({ extended }) => extended).map(({ number }) => number)).toEqual([2])
      expect(found.partitions.at(-1)?.uuid).toMatch(/^[0-9a-f]{8}-10$/)
    })
  }

  test('an extended partition without logical ones, and one whose middle one is gone', async () => {
    await agrees(sfdisk('label: dos\nsize=30M, type=5\n'))
    const path = sfdisk(
      `label: dos\n1: size=50M, type=5\n${[5, 6, 7, 8].map((number) => `${number}: size=4M, type=83\n`).join('')}`,
    )
    execFileSync('sfdisk', ['--quiet', '--delete', path, '6'], { env, stdio: 'pipe' })
    expect((await agrees(path)).partitions.map(({ number }) => number)).toEqual([1, 5, 6, 7])
  })

  test('a hybrid MBR: the GPT counts', async () => {
    needs('sgdisk')
    const path = sfdisk(GPT_SCRIPT)
    execFileSync('sgdisk', ['--hybrid', '1:2', path], { env, stdio: 'pipe' })
    const types = [0, 1, 2, 3].map((index) => readFileSync(path).readUInt8(446 + index * 16 + 4))
    expect(types).toContain(0xee)
    expect(types.filter((type) => type !== 0 && type !== 0xee)).toHaveLength(2)
    const found = await agrees(path)
    expect(found).toMatchObject({ kind: 'gpt', warnings: [] })
    expect(found.partitions).toHaveLength(4)
  })

  // sfdisk has no option for the sector size before 2.40 or so; fdisk has had one for ever.
  for (const blockSize of [512, 1024, 2048, 4096]) {
    for (const kind of ['gpt', 'mbr'] as const) {
      test(`${kind} with sectors of ${blockSize} bytes`, async () => {
        needs('fdisk')
        const path = blank(64 * MiB)
        const input =
          kind === 'gpt'
            ? 'g\nn\n\n\n+4M\nn\n\n\n+8M\nw\n'
            : 'o\nn\np\n\n\n+4M\nn\ne\n\n\n\nn\nl\n\n+8M\nn\nl\n\n+5M\nw\n'
        const size = ['--sector-size', String(blockSize)]
        execFileSync('fdisk', [...size, path], { env, input, stdio: ['pipe', 'pipe', 'pipe'] })
        const columns = kind === 'gpt' ? 'Device,Start,Sectors,Type-UUID,UUID' : 'Device,Start,Sectors,Id'
        const text = execFileSync('fdisk', [...size, '-l', '-o', columns, path], {
          env,
          encoding: 'utf8',
          stdio: 'pipe',
        })
        const lines = text
          .split('\n')
          .filter((line) => line.startsWith(path))
          .map((line) => {
            const [device = '', start, sectors, type, uuid] = line.trim().split(/\s+/)
            const where = { start: Number(start) * blockSize, size: Number(sectors) * blockSize }
            return { number: Number(device.slice(path.length)), ...where, type, ...(kind === 'gpt' && { uuid }) }
          })
        expect(lines.length).toBeGreaterThan(1)
        const bytes = readFileSync(path)
        const found = await table(bytes, blockSize)
        expect(found.kind).toBe(kind)
        expect(found.partitions).toHaveLength(lines.length)
        expect(found.partitions).toMatchObject(lines)
        const probed = await probeGptBlockSize(readerOf(bytes), BigInt(bytes.length))
        expect(probed).toBe(kind === 'gpt' ? blockSize : undefined)
      })
    }
  }

  for (const [label, types] of [
    ['gpt', GPT_TYPES],
    ['dos', MBR_TYPES],
  ] as const) {
    test(`our types are sfdisk's: ${label}`, () => {
      const text = execFileSync('sfdisk', ['--list-types', '--label', label], { env, encoding: 'utf8' })
      const theirs = new Map(
        text.split('\n').flatMap((line) => {
          const match = /^\s*([0-9A-Fa-f-]+)\s+(.*)$/.exec(line)
          const [, id = '', name = ''] = match ?? []
          return match ? [[label === 'gpt' ? id.toUpperCase() : id, name] as const] : []
        }),
      )
      expect(theirs.size).toBeGreaterThan(50)
      // LUKS is newer than the sfdisk of Debian 12. Names change from version to version, numbers do not.
      const unknown = [...types.keys()].filter((id) => !theirs.has(id))
      expect(unknown.filter((id) => types.get(id) !== 'Linux LUKS')).toEqual([])
      for (const id of [LINUX, EFI, SWAP, '83', '82', 'c', 'ef'])
        expect(types.get(id)).toBe(types.has(id) ? theirs.get(id) : undefined)
    })
  }
})

describe('GPT', () => {
  const TWO: GptEntry[] = [
    { first: 40, last: 99, type: EFI, name: 'one \u{e9}\u{1f600}' },
    { first: 100, last: 199, attributes: 4n },
  ]

  test('made byte by byte, it is read', async () => {
    expect(await read(gpt(TWO))).toEqual({
      kind: 'gpt',
      diskId: DISK,
      usedBackup: false,
      warnings: [],
      partitions: [
        {
          number: 1,
          start: 40 * 512,
          size: 60 * 512,
          type: EFI,
          typeName: 'EFI System',
          label: 'one \u{e9}\u{1f600}',
          uuid: '00000000-0000-0000-0000-000000000001',
        },
        {
          number: 2,
          start: 100 * 512,
          size: 100 * 512,
          type: LINUX,
          typeName: 'Linux filesystem',
          uuid: '00000000-0000-0000-0000-000000000002',
          bootable: true,
        },
      ],
    })
  })

  test('longer entries, more of them, a header as long as a block', async () => {
    const whole = (await table(gpt(TWO))).partitions
    for (const [count, entrySize] of [
      [128, 256],
      [64, 512],
      [4, 128],
    ] as const) {
      const found = await table(gpt([{ first: 200, last: 299 }], { count, entrySize }))
      expect(found.partitions).toMatchObject([{ number: 1, start: 200 * 512, size: 100 * 512 }])
    }
    for (const count of [1024, 32_768]) {
      const most = await table(gpt([{ first: 9000, last: 9099 }], { count, bytes: 10 * MiB }))
      expect(most).toMatchObject({ usedBackup: false, partitions: [{ number: 1 }] })
    }
    const long = gpt(TWO)
    for (const block of [1, MiB / 512 - 1]) {
      const header = long.subarray(block * 512, (block + 1) * 512)
      header.writeUInt32LE(512, 12)
      header.writeUInt32LE(0, 16)
      header.writeUInt32LE(crc32(header), 16)
    }
    expect(await table(long)).toMatchObject({ usedBackup: false, warnings: [], partitions: whole })
  })

  test('a type that is none of the common ones has no name', async () => {
    const found = await table(gpt([{ type: 'DEADBEEF-0000-4000-8000-0123456789AB', first: 40, last: 41 }]))
    expect(found.partitions[0]).toMatchObject({ type: 'DEADBEEF-0000-4000-8000-0123456789AB' })
    expect(found.partitions[0]).not.toHaveProperty('typeName')
  })

  test('a damaged primary: the backup, and what was damaged', async () => {
    const whole = await table(gpt(TWO))
    for (const [at, message] of [
      [512, 'it has no header'],
      [512 + 60, "its header's CRC"],
      [512 + 10, "its header's CRC"],
      [512 + 13, 'its header has'],
      [1024, "its entries' CRC"],
    ] as const) {
      const found = await table(damage(gpt(TWO), at))
      expect(found).toEqual({ ...whole, usedBackup: true, warnings: [expect.stringContaining(message)] })
      expect(await warningsOf(damage(gpt(TWO), at))).toEqual([
        expect.stringMatching(/^gpt-backup: .* backup in block 2047/),
      ])
    }
  })

  test('the backup is found by the primary header, where the disk has grown and the entries are damaged', async () => {
    const grown = Buffer.concat([gpt(TWO), Buffer.alloc(MiB)])
    const found = await table(grown)
    expect(found.warnings).toEqual(['the backup GPT is in block 2047, not in the last, 4095'])
    expect(await table(damage(grown, 1024))).toMatchObject({ usedBackup: true, partitions: found.partitions })
    // Without the primary header nothing leads there.
    expect((await refused(damage(grown, 512))).message).toContain('backup in block 4095: it has no header')
  })

  test('a backup that is damaged or differs is a warning', async () => {
    expect((await table(damage(gpt(TWO), MiB - 512))).warnings).toEqual([
      'the backup GPT in block 2047 is damaged: it has no header',
    ])
    const other = gpt(TWO, {
      header: (header, primary) => {
        if (!primary) header.writeUInt8(1, 56)
      },
    })
    expect((await table(other)).warnings).toEqual(['the backup GPT differs from the primary'])
  })

  test('both copies damaged is an error, with what is wrong with each', async () => {
    const { message } = await refused(damage(gpt(TWO), 512, MiB - 512))
    expect(message).toBe(
      'EINVAL: read: no copy of the GPT is whole: primary in block 1: it has no header; backup in block 2047: it has no header',
    )
    expect((await refused(damage(gpt(TWO), 1024, MiB - 512 - 16_384))).message).toMatch(/entries' CRC.*entries' CRC/)
  })

  test('a table for another block size is read all the same, and the warning says which', async () => {
    const large = gpt(TWO, { blockSize: 4096 })
    const found = await findTable(readerOf(large), BigInt(large.length), 512)
    expect(found).toMatchObject({ blockSize: 4096, isForKernel: false, usedBackup: false })
    expect(found?.partitions).toMatchObject([{ start: 40n * 4096n, size: 60n * 4096n }, { number: 2 }])
    expect(await warningsOf(large)).toEqual([
      'table-block-size: the GPT was made for blocks of 4096 bytes, the device has blocks of 512',
    ])
    const small = gpt([{ first: 100, last: 199 }])
    expect((await table(small, 4096)).partitions).toMatchObject([{ start: 100 * 512, size: 100 * 512 }])
    expect(await warningsOf(small, 4096)).toEqual([expect.stringContaining('for blocks of 512 bytes')])
  })

  test('figures of a header that cannot be true', async () => {
    const cases: [string, (header: Buffer) => void][] = [
      ['it has 4294967295 entries of 128 bytes', (header) => header.writeUInt32LE(0xffff_ffff, 80)],
      ['it has 32769 entries of 128 bytes', (header) => header.writeUInt32LE(32_769, 80)],
      ['it has 0 entries', (header) => header.writeUInt32LE(0, 80)],
      ['its entries have 0 bytes', (header) => header.writeUInt32LE(0, 84)],
      ['its entries have 64 bytes', (header) => header.writeUInt32LE(64, 84)],
      ['its entries have 384 bytes', (header) => header.writeUInt32LE(384, 84)],
      ['entries of 2147483648 bytes', (header) => header.writeUInt32LE(0x8000_0000, 84)],
      ['its entries are in blocks 2047 to', (header) => header.writeBigUInt64LE(2047n, 72)],
      ['its entries are in blocks 0 to', (header) => header.writeBigUInt64LE(0n, 72)],
      ['its entries are in blocks 18446744073709551615', (header) => header.writeBigUInt64LE(2n ** 64n - 1n, 72)],
      ['its usable blocks are 3000 to', (header) => header.writeBigUInt64LE(3000n, 40)],
      ['its header says it is in block 5', (header) => header.writeBigUInt64LE(5n, 24)],
      ['its header has 91 bytes', (header) => header.writeUInt32LE(91, 12)],
      ['its header has 513 bytes', (header) => header.writeUInt32LE(513, 12)],
    ]
    for (const [message, header] of cases) {
      const image = gpt(TWO, { header })
      const reader = readerOf(image)
      const error = await findTable(reader, BigInt(image.length), 512, '/dev/loop7').catch((thrown: unknown) => thrown)
      expect(LoopError.is(error, 'bad-partition-table'), message).toBe(true)
      expect(error).toMatchObject({ path: '/dev/loop7', message: expect.stringContaining(message) })
      expect(reader.bytes).toBeLessThan(64 * 1024)
    }
  })

  test('partitions that overlap are all there: the kernel shows them', async () => {
    const image = gpt([
      { first: 100, last: 199 },
      { first: 300, last: 400 },
      { first: 199, last: 250 },
    ])
    expect(await table(image)).toMatchObject({
      warnings: [],
      partitions: [{ number: 1 }, { number: 2 }, { number: 3 }],
    })
  })

  test('partitions beyond the end, and backwards, are left out', async () => {
    const first: GptEntry = { first: 40, last: 41 }
    for (const [entry, message] of [
      [{ first: 100, last: 2048 }, 'ends 512 bytes beyond the image'],
      [{ first: 100, last: 2047 + 8192 }, 'ends 4 MiB beyond the image'],
      [{ first: 100, last: 2n ** 64n - 1n }, 'ends 9444732965739289182208 bytes beyond the image'],
      [{ first: 2n ** 63n, last: 2n ** 63n + 1n }, 'beyond the image'],
      [{ first: 100, last: 99 }, 'goes from block 100 to 99'],
    ] as const) {
      const image = gpt([first, entry])
      expect((await table(image)).partitions, message).toMatchObject([{ number: 1 }])
      const [said, ...rest] = await warningsOf(image)
      expect(rest).toEqual([])
      expect(said).toMatch(/^partition-left-out: partition 2 .*; it is left out$/)
      if (!message.includes('9444')) expect(said).toContain(message)
    }
  })

  test('of an image that was cut the partitions that are whole are there', async () => {
    const cut = gpt([
      { first: 40, last: 99 },
      { first: 100, last: 1900 },
    ]).subarray(0, MiB / 2)
    const found = await findTable(readerOf(cut), BigInt(cut.length), 512)
    expect(found).toMatchObject({ isForKernel: false, usedBackup: false, partitions: [{ number: 1 }] })
    expect(found?.reachingBeyond).toMatchObject([{ number: 2, start: 100n * 512n, size: BigInt(MiB / 2 - 100 * 512) }])
    expect(await warningsOf(cut)).toEqual([
      'gpt-backup: the backup GPT should be in block 2047, but the last block is 1023',
      'partition-left-out: partition 2 ends 438.5 KiB beyond the image; it is left out'.replace(
        '438.5 KiB',
        '449024 bytes',
      ),
    ])
  })

  test('any revision of the header, and the attribute for read-only', async () => {
    const found = await table(
      gpt([{ first: 2040, last: 2046, attributes: 1n << 60n }], {
        header: (header) => header.writeUInt32LE(0x20000, 8),
      }),
    )
    expect(found).toMatchObject({ warnings: [], partitions: [{ number: 1, readOnly: true }] })
  })

  test('without its protective MBR it is none, as for the kernel', async () => {
    expect(await read(gpt(TWO).fill(0, 0, 512))).toBe(undefined)
    expect(await read(bootRecord(gpt(TWO), 0, [[0xee, 2, 100]]))).toBe(undefined)
    const second = bootRecord(gpt(TWO).fill(0, 0, 512), 0, [undefined, [0xee, 1, 100]])
    expect((await table(second)).kind).toBe('gpt')
  })

  test('the block size is told by the backup too', async () => {
    for (const blockSize of [512, 1024, 2048, 4096]) {
      const image = gpt([{ first: 40, last: 41 }], { blockSize })
      expect(await probeGptBlockSize(readerOf(image), BigInt(image.length))).toBe(blockSize)
      damage(image, blockSize + 20)
      expect(await probeGptBlockSize(readerOf(image), BigInt(image.length))).toBe(blockSize)
      damage(image, image.length - blockSize + 20)
      expect(await probeGptBlockSize(readerOf(image), BigInt(image.length))).toBe(undefined)
    }
    for (const bytes of [0, 1, 511, 512, 1024, 4096, 8192]) {
      expect(await probeGptBlockSize(readerOf(Buffer.alloc(bytes)), BigInt(bytes))).toBe(undefined)
    }
  })
})

const numbersOf = async (image: Buffer): Promise<number[]> =>
  (await table(image)).partitions.map(({ number }) => number)

describe('MBR', () => {
  /** An extended partition in blocks 100 to 1099. */
  const CONTAINER: Entry = [5, 100, 1000]

  test('sectors of 4096 bytes', async () => {
    const image = mbr(
      [
        [0x83, 1, 10],
        [0xf, 20, 100],
      ],
      4096,
    )
    bootRecord(
      image,
      20,
      [
        [0x82, 1, 5],
        [5, 10, 20],
      ],
      4096,
    )
    bootRecord(image, 30, [[0x83, 2, 5, 0x80]], 4096)
    expect((await table(image, 4096)).partitions).toEqual([
      { number: 1, start: 4096, size: 40_960, type: '83', typeName: 'Linux', uuid: '1a2b3c4d-01' },
      {
        number: 2,
        start: 81_920,
        size: 409_600,
        type: 'f',
        typeName: "W95 Ext'd (LBA)",
        uuid: '1a2b3c4d-02',
        extended: true,
      },
      { number: 5, start: 21 * 4096, size: 20_480, type: '82', typeName: 'Linux swap / Solaris', uuid: '1a2b3c4d-05' },
      {
        number: 6,
        start: 32 * 4096,
        size: 20_480,
        type: '83',
        typeName: 'Linux',
        uuid: '1a2b3c4d-06',
        bootable: true,
      },
    ])
  })

  test('a disk without an id has no uuids', async () => {
    const found = await table(bootRecord(Buffer.alloc(MiB), 0, [[0x83, 1, 10]]))
    expect(found.diskId).toBe('0x00000000')
    expect(found.partitions[0]).not.toHaveProperty('uuid')
  })

  test('no signature, an empty device, one smaller than a block', async () => {
    expect(await read(Buffer.alloc(MiB))).toBe(undefined)
    expect(await read(mbr([[0x83, 1, 10]]).fill(0, 510, 512))).toBe(undefined)
    expect(await read(Buffer.alloc(0))).toBe(undefined)
    expect(await read(Buffer.alloc(511))).toBe(undefined)
    expect(await read(Buffer.alloc(2048), 4096)).toBe(undefined)
  })

  test('the boot sector of a filesystem is no table', async () => {
    /** A FAT's, with no code where the entries would be: only its own fields tell it. */
    const fat = (): Buffer => {
      const image = mbr([])
      image.writeUInt16LE(512, 11)
      image.writeUInt8(4, 13)
      image.writeUInt16LE(1, 14)
      image.writeUInt8(2, 16)
      image.writeUInt8(0xf8, 21)
      return image
    }
    for (const [name, at] of [
      ['FAT12   ', 54],
      ['FAT16   ', 54],
      ['FAT32   ', 82],
    ] as const) {
      const image = fat()
      image.write(name, at)
      expect(await read(image), name).toBe(undefined)
      // A boot loader's leftover in a real table
      const leftover = mbr([[0x83, 1, 10]])
      leftover.write(name, at)
      expect(await read(leftover), name).toMatchObject({ kind: 'mbr', partitions: [{ number: 1 }] })
    }
    expect(await read(fat())).toMatchObject({ partitions: [] })
    for (const name of ['NTFS    ', 'EXFAT   ']) {
      const image = mbr([])
      image.write(name, 3)
      expect(await read(image), name).toBe(undefined)
    }
    expect(await read(mbr([[0x83, 1, 10, 0x20]]))).toBe(undefined)
    expect(await read(mbr([[0x83, 1, 10], undefined, undefined, [0, 0, 0, 1]]))).toBe(undefined)
    for (const [type, partitions] of [
      [0x08, undefined],
      [0x83, 1],
    ] as const) {
      const aix = mbr([[type, 1, 10]])
      aix.writeUInt32BE(0xc9c2d4c1)
      expect((await table(aix)).partitions).toHaveLength(1)
      aix.write('_LVM', 7 * 512)
      expect((await read(aix))?.partitions.length).toBe(partitions)
    }
  })

  test('partitions that overlap are all there, as in an isohybrid image', async () => {
    const image = mbr([
      [0x00, 0, 2048, 0x80],
      [0xef, 136, 400],
    ])
    expect(await table(image)).toMatchObject({
      warnings: [],
      partitions: [
        { number: 1, start: 0, size: MiB, bootable: true },
        { number: 2, start: 136 * 512 },
      ],
    })
    expect((await table(mbr([CONTAINER, [0x83, 500, 10]]))).partitions).toMatchObject([{ number: 1 }, { number: 2 }])
  })

  test('what reaches beyond the end is cut, what begins there is left out', async () => {
    expect(await warningsOf(mbr([[0x83, 2000, 48]]))).toEqual([])
    for (const [entry, size, said] of [
      [[0x83, 2000, 49], 48, 'partition-cut: partition 1 ends 512 bytes beyond the image; it is cut to 24 KiB'],
      [[0x83, 2000, 8240], 48, 'partition-cut: partition 1 ends 4 MiB beyond the image; it is cut to 24 KiB'],
      [[0x83, 2048, 1], 0, 'partition-left-out: partition 1 begins at the end of the image; it is left out'],
      [[0x83, 4096, 1], 0, 'partition-left-out: partition 1 begins 1 MiB beyond the end of the image; it is left out'],
    ] as const) {
      const image = mbr([[...entry], [0x82, 1, 10]])
      const { partitions } = await table(image)
      expect(partitions.filter(({ number }) => number === 1).map((one) => one.size / 512)).toEqual(
        size === 0 ? [] : [size],
      )
      expect(partitions.at(-1)).toMatchObject({ number: 2, size: 5120 })
      expect(await warningsOf(image)).toEqual([said])
    }
    expect((await table(mbr([[0x83, 0xffff_ffff, 0xffff_ffff]]))).partitions).toEqual([])
  })

  test('two extended partitions: logical ones are numbered on', async () => {
    const image = mbr([CONTAINER, [0xf, 1100, 500]])
    bootRecord(image, 100, [[0x83, 1, 10]])
    bootRecord(image, 1100, [[0x82, 1, 10]])
    expect((await table(image)).partitions.map(({ number, type }) => `${number} ${type}`)).toEqual([
      '1 5',
      '2 f',
      '5 83',
      '6 82',
    ])
  })

  const LEFT_OUT = 'partition-left-out: the chain of logical partitions'
  test('a chain that loops, to itself and to an earlier one, ends there', async () => {
    const self = bootRecord(mbr([CONTAINER]), 100, [
      [0x83, 1, 10],
      [5, 0, 50],
    ])
    expect(await numbersOf(self)).toEqual([1, 5])
    expect(await warningsOf(self)).toEqual([
      `${LEFT_OUT} comes back to the boot record in block 100; what may follow is left out`,
    ])
    const image = mbr([CONTAINER])
    bootRecord(image, 100, [
      [0x83, 1, 10],
      [5, 50, 50],
    ])
    bootRecord(image, 150, [
      [0x83, 1, 10],
      [5, 100, 50],
    ])
    bootRecord(image, 200, [
      [0x83, 1, 10],
      [5, 50, 50],
    ])
    expect(await numbersOf(image)).toEqual([1, 5, 6, 7])
    expect(await warningsOf(image)).toEqual([expect.stringContaining('comes back to the boot record in block 150')])
    // Without partitions on the way, too
    expect(await numbersOf(bootRecord(mbr([CONTAINER]), 100, [undefined, [5, 0, 50]]))).toEqual([1])
  })

  test('a chain that leaves the extended partition is followed, as the kernel does', async () => {
    const image = bootRecord(mbr([CONTAINER]), 100, [
      [0x83, 900, 101],
      [5, 1500, 50],
    ])
    bootRecord(image, 1600, [[0x82, 1, 10]])
    expect(await table(image)).toMatchObject({
      warnings: [],
      partitions: [{}, { number: 5, start: 512_000 }, { number: 6 }],
    })
    for (const start of [0x7fff_ffff, 0xffff_ffff]) {
      const far = bootRecord(mbr([CONTAINER]), 100, [
        [0x83, 1, 10],
        [5, start, 50],
      ])
      expect(await numbersOf(far)).toEqual([1, 5])
      expect(await warningsOf(far)).toEqual([
        `${LEFT_OUT} leads to block ${100 + start}, beyond the end of the image; what may follow is left out`,
      ])
    }
    const beyond = bootRecord(mbr([CONTAINER]), 100, [[0x83, 0xffff_ffff, 1]])
    expect(await numbersOf(beyond)).toEqual([1])
    expect(await warningsOf(beyond)).toEqual([
      expect.stringMatching(/^partition-left-out: partition 5 begins .* beyond/),
    ])
  })

  test('a link of no size', async () => {
    const image = bootRecord(mbr([CONTAINER]), 100, [
      [0x83, 1, 10],
      [5, 50, 0],
    ])
    expect(await numbersOf(image)).toEqual([1, 5])
    expect(await warningsOf(image)).toEqual([
      `${LEFT_OUT} leads to a boot record of no size, in block 150; what may follow is left out`,
    ])
    const unused = bootRecord(mbr([CONTAINER]), 100, [
      [0x83, 1, 10],
      [5, 0, 0],
    ])
    expect(await table(unused)).toMatchObject({ warnings: [], partitions: [{}, {}] })
  })

  test('an extended boot record without a signature ends the chain', async () => {
    expect(await numbersOf(mbr([CONTAINER]))).toEqual([1])
    expect(await warningsOf(mbr([CONTAINER]))).toEqual([
      `${LEFT_OUT} ends in block 100, which is no boot record; what may follow is left out`,
    ])
  })

  test('garbage in the last two entries of an extended boot record is passed over', async () => {
    const image = mbr([CONTAINER])
    bootRecord(image, 100, [[0x83, 1, 10], undefined, [0x12, 0xdead_beef, 0xbeef], [0x83, 20, 10]])
    expect((await table(image)).partitions.map(({ number, start }) => [number, start / 512])).toEqual([
      [1, 100],
      [5, 101],
      [6, 120],
    ])
  })

  /** As many logical partitions; each takes 2 blocks, its boot record and itself. */
  function chain(length: number, type = 0x83): Buffer {
    const image = mbr([[5, 100, 1900]])
    for (let index = 0; index < length; index++) {
      const entry: Entry | undefined = type === 0 ? undefined : [type, 1, 1]
      const link: Entry | undefined = index + 1 < length ? [5, 2 * (index + 1), 2] : undefined
      bootRecord(image, 100 + 2 * index, [entry, link])
    }
    return image
  }

  test('partitions up to 255, and no more', async () => {
    const found = await table(chain(251))
    expect(found.partitions.at(-1)).toMatchObject({ number: 255, uuid: '1a2b3c4d-ff' })
    expect(found.warnings).toEqual([])
    expect((await table(chain(252))).partitions).toHaveLength(252)
    expect(await warningsOf(chain(252))).toEqual([expect.stringContaining('goes on behind partition 255')])
  })

  test('a long chain without partitions', async () => {
    expect(await table(chain(100, 0))).toMatchObject({ warnings: [], partitions: [{}] })
    expect(await warningsOf(chain(101, 0))).toEqual([
      expect.stringContaining('100 boot records in a row without a partition'),
    ])
  })
})

/** mulberry32 */
function randomOf(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let value = Math.imul(state ^ (state >>> 15), 1 | state)
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32
  }
}

const whole = (): Buffer[] => {
  const logical = mbr([
    [0x83, 1, 50, 0x80],
    [5, 100, 1000],
  ])
  bootRecord(logical, 100, [
    [0x83, 1, 10],
    [5, 50, 50],
  ])
  bootRecord(logical, 150, [
    [0x83, 1, 10],
    [5, 100, 50],
  ])
  bootRecord(logical, 200, [[0x83, 1, 10]])
  return [
    gpt([
      { first: 40, last: 99, name: 'one' },
      { first: 100, last: 199 },
    ]),
    logical,
  ]
}

/** The CRCs of both copies made good again, so that the bytes behind them are looked at. */
function seal(image: Buffer): void {
  for (const at of [512, image.length - 512]) {
    const header = image.subarray(at, at + 92)
    const place = Number(header.readBigUInt64LE(72)) * 512
    const length = header.readUInt32LE(80) * header.readUInt32LE(84)
    if (place + length <= image.length) header.writeUInt32LE(crc32(image.subarray(place, place + length)), 88)
    header.writeUInt32LE(0, 16)
    header.writeUInt32LE(crc32(header), 16)
  }
}

async function check(image: Buffer, seed: number): Promise<'none' | 'read' | 'refused'> {
  const reader = readerOf(image)
  let outcome: 'none' | 'read' | 'refused' = 'none'
  try {
    const found = await findTable(reader, BigInt(image.length), 512)
    if (found) {
      outcome = 'read'
      const numbers = found.partitions.map(({ number }) => number)
      expect(new Set(numbers).size, `seed ${seed}`).toBe(numbers.length)
      for (const { start, size } of found.partitions) {
        expect(size > 0n && start + size <= image.length, `seed ${seed}`).toBe(true)
      }
      expect(() => structuredClone(describeTable(found, 512))).not.toThrow()
    }
  } catch (error) {
    if (!LoopError.is(error, 'bad-partition-table')) throw new Error(`seed ${seed}`, { cause: error })
    outcome = 'refused'
  }
  expect(reader.bytes, `seed ${seed}`).toBeLessThan(2 * MiB)
  return outcome
}

describe('whatever the bytes', () => {
  test('random bytes, with the signature and without', async () => {
    for (let seed = 1; seed <= 300; seed++) {
      const random = randomOf(seed)
      const image = Buffer.alloc(64 * 512)
      for (let at = 0; at < image.length; at += 4) image.writeUInt32LE(Math.floor(random() * 2 ** 32), at)
      if (seed % 3 > 0) image.writeUInt16LE(0xaa55, 510)
      if (seed % 3 > 1) for (let at = 446; at < 510; at += 16) image.writeUInt8(random() < 0.5 ? 0 : 0x80, at)
      if (seed % 2 > 0) image.writeUInt8(0xee, 450)
      await check(image, seed)
      await probeGptBlockSize(readerOf(image), BigInt(image.length))
    }
  })

  test('whole tables with a few bytes changed', async () => {
    const outcomes = { none: 0, read: 0, refused: 0 }
    const images = whole()
    for (let seed = 1; seed <= 2000 / STEP; seed++) {
      const random = randomOf(seed)
      const pick = (bound: number): number => Math.floor(random() * bound)
      const image = Buffer.from(images[seed % 2] ?? Buffer.alloc(0))
      const places =
        seed % 2 === 0 ? [446, 512 + 8, 1024, image.length - 512 + 8] : [446, 51_200 + 446, 76_800 + 446, 102_400 + 446]
      for (let changes = 1 + pick(4); changes > 0; changes--) {
        const at = (places[pick(4)] ?? 0) + pick(64)
        image.writeUInt8(random() < 0.5 ? pick(256) : ([0, 1, 5, 0x0f, 0x7f, 0x80, 0xff][pick(7)] ?? 0), at)
      }
      if (seed % 2 === 0) seal(image)
      outcomes[await check(image, seed)]++
    }
    expect(outcomes.none * STEP).toBeGreaterThan(50)
    expect(outcomes.read * STEP).toBeGreaterThan(50)
    // Only of the GPT, and only where both copies are damaged
    expect(outcomes.refused * STEP).toBeGreaterThan(10)
  })

  test('a reader that answers too little is an input/output error, and its own error comes through', async () => {
    const short = findTable(async () => new Uint8Array(100), BigInt(MiB), 512, '/dev/loop7')
    await expect(short).rejects.toMatchObject({ reason: 'io', path: '/dev/loop7' })
    const own = new Error('mine')
    await expect(findTable(() => Promise.reject(own), BigInt(MiB), 512)).rejects.toBe(own)
  })

  test('a large device: positions beyond 2 ** 32', async () => {
    const bytes = 2n ** 45n
    const sector = mbr([[0x83, 0xffff_ff00, 0xffff_ff00]], 4096, 4096)
    const found = await findTable(async () => sector, bytes, 4096)
    expect(found?.partitions).toMatchObject([{ start: 0xffff_ff00n * 4096n, size: 0xffff_ff00n * 4096n }])
  })
})
