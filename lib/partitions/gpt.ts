/** GUID partition tables (GPT), with their checksums and the backup at the end of the disk. */

import { crc32 } from '../common/digest.ts'
import {
  alignedReader,
  assertNoOverlap,
  assertOnDevice,
  bad,
  type BlockReader,
  digits,
  type Disk,
  GPT_BLOCK_SIZES,
  hex,
  isPowerOfTwo,
  type PartitionTable,
  readBlocks,
  type TableEntry,
} from './disk.ts'
import type { MbrEntry } from './mbr.ts'
import { GPT_TYPES } from './types.ts'

interface GptHeader {
  block: number
  diskId: string
  alternate: bigint
  firstUsable: bigint
  lastUsable: bigint
  entriesBlock: bigint
  entryCount: number
  entrySize: number
  entriesCrc: number
}

/** A copy of the table that is whole. */
interface GptCopy extends GptHeader {
  entries: Buffer
}

export const GPT_PROTECTIVE = 0xee

const GPT_HEADER_BYTES = 92
/** 1024 entries of the usual size; all tools write 128. */
const MAX_GPT_ENTRIES_BYTES = 128 * 1024

/**
 * The logical block size that the image's GPT was made for: where its header is found, first the primary, else the
 * backup in the last block. Undefined: there is no GPT with a good header. Its reads are aligned to 512 bytes.
 */
export async function probeGptBlockSize(read: BlockReader, size: number): Promise<number | undefined> {
  const disks = GPT_BLOCK_SIZES.map((blockSize) => {
    return { read, blockSize, blocks: Math.floor(size / blockSize), path: undefined }
  })
  for (const at of [() => 1, (disk: Disk) => disk.blocks - 1]) {
    for (const disk of disks) {
      const block = at(disk)
      if (block < 1 || block >= disk.blocks) continue
      if (typeof parseGptHeader(await readBlocks(disk, block, 1), block) !== 'string') return disk.blockSize
    }
  }
  return undefined
}

export async function readGpt(disk: Disk, primaries: MbrEntry[]): Promise<PartitionTable | undefined> {
  // The kernel and sfdisk take it for protective only from block 1 on, and for no table otherwise.
  if (!primaries.some(({ type, start }) => type === GPT_PROTECTIVE && start === 1)) return undefined
  const warnings: string[] = []
  const others = primaries.filter((entry) => entry.type !== GPT_PROTECTIVE && entry.type !== 0 && entry.size > 0)
  if (others.length > 0) warnings.push(`the MBR is a hybrid one: its ${others.length} other partitions do not count`)

  const last = disk.blocks - 1
  const primary = await readGptCopy(disk, 1)
  if (typeof primary !== 'string') {
    warnings.push(...(await checkBackup(disk, primary)))
    return gptTable(disk, primary, false, warnings)
  }
  const problems = [`primary in block 1: ${primary}`]
  for (const block of new Set([await primaryAlternate(disk), last])) {
    if (block === undefined || block <= 1) continue
    const backup = await readGptCopy(disk, block)
    if (typeof backup !== 'string') {
      warnings.push(`the primary GPT is damaged (${primary}): the backup in block ${block} is used`)
      return gptTable(disk, backup, true, warnings)
    }
    problems.push(`backup in block ${block}: ${backup}`)
  }
  const other = await probeGptBlockSize(alignedReader(disk), disk.blocks * disk.blockSize)
  const hint =
    other === undefined || other === disk.blockSize
      ? undefined
      : `there is a GPT made for blocks of ${other} bytes, the device has ${disk.blockSize}: attach with that block size`
  throw bad(disk, `no copy of the GPT is whole: ${problems.join('; ')}`, hint)
}

/** Where the primary header, damaged or not, says that the backup is. */
async function primaryAlternate(disk: Disk): Promise<number | undefined> {
  if (disk.blocks < 2) return undefined
  const header = await readBlocks(disk, 1, 1)
  const block = header.readBigUInt64LE(32)
  return header.toString('latin1', 0, 8) === 'EFI PART' && block < disk.blocks ? Number(block) : undefined
}

async function checkBackup(disk: Disk, primary: GptCopy): Promise<string[]> {
  const { alternate } = primary
  const last = disk.blocks - 1
  if (alternate > last) return [`the backup GPT should be in block ${alternate}, the device ends with block ${last}`]
  const backup = await readGptCopy(disk, Number(alternate))
  if (typeof backup === 'string') return [`the backup GPT in block ${alternate} is damaged: ${backup}`]
  const warnings: string[] = []
  if (alternate < last) warnings.push(`the backup GPT is in block ${alternate}, not in the device's last, ${last}`)
  if (backup.diskId !== primary.diskId || !backup.entries.equals(primary.entries)) {
    warnings.push('the backup GPT differs from the primary')
  }
  return warnings
}

/** The header of that block and its entries; a string says why it is none. */
async function readGptCopy(disk: Disk, block: number): Promise<GptCopy | string> {
  if (block >= disk.blocks) return `the device ends with block ${disk.blocks - 1}`
  const header = parseGptHeader(await readBlocks(disk, block, 1), block)
  if (typeof header === 'string') return header
  const { firstUsable, lastUsable, entriesBlock, entryCount, entrySize, entriesCrc } = header
  if (lastUsable >= disk.blocks)
    return `its last usable block is ${lastUsable}, the device's last is ${disk.blocks - 1}`
  if (firstUsable > lastUsable) return `its usable blocks are ${firstUsable} to ${lastUsable}`
  if (entrySize % 128 !== 0 || !isPowerOfTwo(entrySize / 128)) return `its entries have ${entrySize} bytes`
  const length = entryCount * entrySize
  if (length === 0 || length > MAX_GPT_ENTRIES_BYTES) return `it has ${entryCount} entries of ${entrySize} bytes`
  const count = Math.ceil(length / disk.blockSize)
  if (entriesBlock < 1n || entriesBlock + BigInt(count) > disk.blocks) {
    return `its entries are in blocks ${entriesBlock} to ${entriesBlock + BigInt(count) - 1n}`
  }
  const entries = (await readBlocks(disk, Number(entriesBlock), count)).subarray(0, length)
  const crc = crc32(entries)
  return crc === entriesCrc ? { ...header, entries } : `its entries' CRC is ${hex(crc)}, should be ${hex(entriesCrc)}`
}

/** What can be told from the header alone; a string says what is wrong with it. */
function parseGptHeader(bytes: Buffer, block: number): GptHeader | string {
  if (bytes.toString('latin1', 0, 8) !== 'EFI PART') return 'it has no header'
  const revision = bytes.readUInt32LE(8)
  if (revision >>> 16 !== 1) return `its revision is ${hex(revision)}`
  const headerSize = bytes.readUInt32LE(12)
  if (headerSize < GPT_HEADER_BYTES || headerSize > bytes.length) return `its header has ${headerSize} bytes`
  const stored = bytes.readUInt32LE(16)
  // With the field itself taken as 0
  const crc = crc32(bytes.subarray(20, headerSize), crc32(new Uint8Array(4), crc32(bytes.subarray(0, 16))))
  if (crc !== stored) return `its header's CRC is ${hex(crc)}, should be ${hex(stored)}`
  const mine = bytes.readBigUInt64LE(24)
  if (mine !== BigInt(block)) return `its header says it is in block ${mine}`
  return {
    block,
    alternate: bytes.readBigUInt64LE(32),
    firstUsable: bytes.readBigUInt64LE(40),
    lastUsable: bytes.readBigUInt64LE(48),
    diskId: readGuid(bytes, 56),
    entriesBlock: bytes.readBigUInt64LE(72),
    entryCount: bytes.readUInt32LE(80),
    entrySize: bytes.readUInt32LE(84),
    entriesCrc: bytes.readUInt32LE(88),
  }
}

function gptTable(disk: Disk, copy: GptCopy, usedBackup: boolean, warnings: string[]): PartitionTable {
  const partitions: TableEntry[] = []
  for (let index = 0; index < copy.entryCount; index++) {
    const bytes = copy.entries.subarray(index * copy.entrySize, (index + 1) * copy.entrySize)
    if (bytes.subarray(0, 16).every((byte) => byte === 0)) continue
    const number = index + 1
    const start = bytes.readBigUInt64LE(32)
    const last = bytes.readBigUInt64LE(40)
    if (last < start) throw bad(disk, `partition ${number} goes from block ${start} to ${last}`)
    assertOnDevice(disk, number, start, last + 1n)
    if (start < copy.firstUsable || last > copy.lastUsable) {
      const usable = `${copy.firstUsable} to ${copy.lastUsable}`
      warnings.push(`partition ${number} (blocks ${start} to ${last}) leaves the usable blocks (${usable})`)
    }
    const type = readGuid(bytes, 0)
    const typeName = GPT_TYPES.get(type)
    const label = readLabel(bytes)
    partitions.push({
      number,
      start: Number(start) * disk.blockSize,
      size: Number(last - start + 1n) * disk.blockSize,
      type,
      ...(typeName !== undefined && { typeName }),
      ...(label !== '' && { label }),
      uuid: readGuid(bytes, 16),
      ...((bytes.readUInt8(48) & 4) !== 0 && { bootable: true }),
    })
  }
  assertNoOverlap(disk, partitions)
  return { kind: 'gpt', diskId: copy.diskId, usedBackup, warnings, partitions }
}

/** The first three groups are little-endian. */
function readGuid(bytes: Buffer, at: number): string {
  const groups = [
    digits(bytes.readUInt32LE(at)),
    digits(bytes.readUInt16LE(at + 4), 4),
    digits(bytes.readUInt16LE(at + 6), 4),
    bytes.toString('hex', at + 8, at + 10),
    bytes.toString('hex', at + 10, at + 16),
  ]
  return groups.join('-').toUpperCase()
}

/** 36 UTF-16 units at most, to the first 0. */
function readLabel(bytes: Buffer): string {
  const text = bytes.toString('utf16le', 56, 128)
  const end = text.indexOf('\0')
  return end < 0 ? text : text.slice(0, end)
}
