/** GUID partition tables (GPT), with their checksums and the backup at the end of the disk. */

import { crc32 } from '../common/crypto.ts'
import type { Warning } from '../common/warnings.ts'
import {
  bad,
  type BlockReader,
  digits,
  type Disk,
  formatBytes,
  type FoundTable,
  GPT_BLOCK_SIZES,
  hex,
  inBlocksOf,
  isPowerOfTwo,
  readBlocks,
  type TableEntry,
  warning,
} from './disk.ts'
import type { MbrEntry } from './mbr.ts'
import { GPT_TYPES } from './types.ts'

interface GptHeader {
  block: bigint
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
/** What all tools write; the kernel takes no others. */
const GPT_ENTRY_BYTES = 128
/** 32 768 entries of the usual size, as many as the kernel can read; all tools write 128. */
const MAX_GPT_ENTRIES_BYTES = 4 << 20

/**
 * The logical block size that the image's GPT was made for: where its header is found, first the primary, else the
 * backup in the last block. Undefined: there is no GPT with a good header. Its reads are aligned to 512 bytes.
 */
export async function probeGptBlockSize(read: BlockReader, size: bigint): Promise<number | undefined> {
  const disks = GPT_BLOCK_SIZES.map((blockSize) => {
    return { read, blockSize, blocks: size / BigInt(blockSize), path: undefined }
  })
  for (const at of [() => 1n, (disk: Disk) => disk.blocks - 1n]) {
    for (const disk of disks) {
      const block = at(disk)
      if (block < 1n || block >= disk.blocks) continue
      if (typeof parseGptHeader(await readBlocks(disk, block, 1), block) !== 'string') return disk.blockSize
    }
  }
  return undefined
}

export async function readGpt(disk: Disk, primaries: readonly MbrEntry[]): Promise<FoundTable | undefined> {
  // The kernel and sfdisk take it for protective only from block 1 on, and for no table otherwise.
  if (!primaries.some(({ type, start }) => type === GPT_PROTECTIVE && start === 1)) return undefined
  const primary = await readGptCopy(disk, 1n)
  const isCut = typeof primary !== 'string' && primary.lastUsable >= disk.blocks
  if (typeof primary !== 'string' && !isCut) return withHybrid(disk, primaries, await tableOfPrimary(disk, primary))
  const problem = typeof primary === 'string' ? primary : `its last usable block is ${primary.lastUsable}`
  const problems = [`primary in block 1: ${problem}`]
  for (const block of new Set([await primaryAlternate(disk), disk.blocks - 1n])) {
    if (block === undefined || block <= 1n) continue
    const backup = await readGptCopy(disk, block)
    if (typeof backup !== 'string') {
      const message = `the primary GPT is damaged (${problem}): the backup in block ${block} is used`
      const warnings = [
        warning('gpt-backup', message, 'the kernel does not use it: write the table anew, with sfdisk or sgdisk'),
      ]
      return withHybrid(disk, primaries, gptTable(disk, backup, { usedBackup: true, isForKernel: false }, warnings))
    }
    problems.push(`backup in block ${block}: ${backup}`)
  }
  // Of an image that was cut: what is left of it can be used, though the kernel takes no such table.
  if (typeof primary !== 'string') return withHybrid(disk, primaries, await tableOfPrimary(disk, primary))
  const other = await readForOtherBlocks(disk, primaries)
  if (other) return other
  throw bad(disk, `no copy of the GPT is whole: ${problems.join('; ')}`)
}

async function tableOfPrimary(disk: Disk, primary: GptCopy): Promise<FoundTable> {
  const warnings = await checkBackup(disk, primary)
  const isForKernel = primary.entrySize === GPT_ENTRY_BYTES && primary.lastUsable < disk.blocks
  return gptTable(disk, primary, { usedBackup: false, isForKernel }, warnings)
}

/** A table that was made for a disk of other blocks; the kernel does not see it. */
async function readForOtherBlocks(disk: Disk, primaries: readonly MbrEntry[]): Promise<FoundTable | undefined> {
  const bytes = disk.blocks * BigInt(disk.blockSize)
  const blockSize = await probeGptBlockSize(inBlocksOf(512, disk).read, bytes)
  if (blockSize === undefined || blockSize === disk.blockSize) return undefined
  const found = await readGpt(inBlocksOf(blockSize, disk), primaries)
  if (!found) return undefined
  const message = `the GPT was made for blocks of ${blockSize} bytes, the device has blocks of ${disk.blockSize}`
  const told = warning('table-block-size', message, `attach with a block size of ${blockSize}, or 'auto'`)
  return { ...found, isForKernel: false, warnings: [told, ...found.warnings] }
}

/** Where the primary header, damaged or not, says that the backup is. */
async function primaryAlternate(disk: Disk): Promise<bigint | undefined> {
  if (disk.blocks < 2n) return undefined
  const header = await readBlocks(disk, 1n, 1)
  const block = header.readBigUInt64LE(32)
  return header.toString('latin1', 0, 8) === 'EFI PART' && block < disk.blocks ? block : undefined
}

const REPAIR = 'sgdisk --move-second-header writes it where it belongs'

async function checkBackup(disk: Disk, primary: GptCopy): Promise<Warning[]> {
  const { alternate } = primary
  const last = disk.blocks - 1n
  if (alternate > last) {
    return [
      warning('gpt-backup', `the backup GPT should be in block ${alternate}, but the last block is ${last}`, REPAIR),
    ]
  }
  const backup = await readGptCopy(disk, alternate)
  if (typeof backup === 'string') {
    return [warning('gpt-backup', `the backup GPT in block ${alternate} is damaged: ${backup}`, REPAIR)]
  }
  const warnings: Warning[] = []
  if (alternate < last) {
    warnings.push(warning('gpt-backup', `the backup GPT is in block ${alternate}, not in the last, ${last}`, REPAIR))
  }
  if (backup.diskId !== primary.diskId || !backup.entries.equals(primary.entries)) {
    warnings.push(warning('gpt-backup', 'the backup GPT differs from the primary', REPAIR))
  }
  return warnings
}

/** The header of that block and its entries; a string says why it is none. */
async function readGptCopy(disk: Disk, block: bigint): Promise<GptCopy | string> {
  if (block >= disk.blocks) return `the last block is ${disk.blocks - 1n}`
  const header = parseGptHeader(await readBlocks(disk, block, 1), block)
  if (typeof header === 'string') return header
  const { firstUsable, lastUsable, entriesBlock, entryCount, entrySize, entriesCrc } = header
  if (firstUsable > lastUsable) return `its usable blocks are ${firstUsable} to ${lastUsable}`
  if (entrySize % GPT_ENTRY_BYTES !== 0 || !isPowerOfTwo(entrySize / GPT_ENTRY_BYTES)) {
    return `its entries have ${entrySize} bytes`
  }
  const length = entryCount * entrySize
  if (length === 0 || length > MAX_GPT_ENTRIES_BYTES) return `it has ${entryCount} entries of ${entrySize} bytes`
  const count = Math.ceil(length / disk.blockSize)
  if (entriesBlock < 1n || entriesBlock + BigInt(count) > disk.blocks) {
    return `its entries are in blocks ${entriesBlock} to ${entriesBlock + BigInt(count) - 1n}`
  }
  const entries = (await readBlocks(disk, entriesBlock, count)).subarray(0, length)
  const crc = crc32(entries)
  return crc === entriesCrc ? { ...header, entries } : `its entries' CRC is ${hex(crc)}, should be ${hex(entriesCrc)}`
}

/** What can be told from the header alone; a string says what is wrong with it. */
function parseGptHeader(bytes: Buffer, block: bigint): GptHeader | string {
  if (bytes.toString('latin1', 0, 8) !== 'EFI PART') return 'it has no header'
  const headerSize = bytes.readUInt32LE(12)
  if (headerSize < GPT_HEADER_BYTES || headerSize > bytes.length) return `its header has ${headerSize} bytes`
  const stored = bytes.readUInt32LE(16)
  // With the field itself taken as 0
  const crc = crc32(bytes.subarray(20, headerSize), crc32(new Uint8Array(4), crc32(bytes.subarray(0, 16))))
  if (crc !== stored) return `its header's CRC is ${hex(crc)}, should be ${hex(stored)}`
  const mine = bytes.readBigUInt64LE(24)
  if (mine !== block) return `its header says it is in block ${mine}`
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

function gptTable(
  disk: Disk,
  copy: GptCopy,
  told: Pick<FoundTable, 'usedBackup' | 'isForKernel'>,
  warnings: Warning[],
): FoundTable {
  const blockSize = BigInt(disk.blockSize)
  const partitions: TableEntry[] = []
  const reachingBeyond: TableEntry[] = []
  for (let index = 0; index < copy.entryCount; index++) {
    const bytes = copy.entries.subarray(index * copy.entrySize, (index + 1) * copy.entrySize)
    if (bytes.subarray(0, 16).every((byte) => byte === 0)) continue
    const number = index + 1
    const start = bytes.readBigUInt64LE(32)
    const last = bytes.readBigUInt64LE(40)
    const problem = whyLeftOut(disk, start, last)
    if (problem !== undefined) {
      warnings.push(warning('partition-left-out', `partition ${number} ${problem}; it is left out`))
      if (last < start || start >= disk.blocks) continue
    }
    const type = readGuid(bytes, 0)
    const typeName = GPT_TYPES.get(type)
    const label = readLabel(bytes)
    const attributes = bytes.readBigUInt64LE(48)
    const list = problem === undefined ? partitions : reachingBeyond
    const end = problem === undefined ? last + 1n : disk.blocks
    list.push({
      number,
      start: start * blockSize,
      size: (end - start) * blockSize,
      readOnly: (attributes & ATTRIBUTE_READ_ONLY) !== 0n,
      table: 'gpt',
      type,
      ...(typeName !== undefined && { typeName }),
      ...(label !== '' && { label }),
      uuid: readGuid(bytes, 16),
      bootable: (attributes & ATTRIBUTE_BOOTABLE) !== 0n,
    })
  }
  return { table: 'gpt', blockSize: disk.blockSize, diskId: copy.diskId, ...told, warnings, partitions, reachingBeyond }
}

const ATTRIBUTE_BOOTABLE = 1n << 2n
const ATTRIBUTE_READ_ONLY = 1n << 60n

/** As the kernel does: a partition of a GPT is not cut. */
function whyLeftOut({ blocks, blockSize }: Disk, start: bigint, last: bigint): string | undefined {
  if (last < start) return `goes from block ${start} to ${last}`
  const beyond = (last + 1n - blocks) * BigInt(blockSize)
  return beyond > 0n ? `ends ${formatBytes(beyond)} beyond the image` : undefined
}

/** With a word about those partitions of a hybrid MBR that the GPT does not have: the GPT counts. */
function withHybrid({ blockSize }: Disk, primaries: readonly MbrEntry[], found: FoundTable): FoundTable {
  const unit = BigInt(blockSize)
  for (const { type, start, size } of primaries) {
    if (type === GPT_PROTECTIVE || type === 0 || size === 0) continue
    const isThere = found.partitions.some(
      (other) => other.start === BigInt(start) * unit && other.size === BigInt(size) * unit,
    )
    if (isThere) continue
    const where = `${formatBytes(BigInt(size) * unit)} at ${formatBytes(BigInt(start) * unit)}`
    const message = `a partition of the hybrid MBR (${where}) is not in the GPT, which counts; it is left out`
    found.warnings.push(warning('partition-left-out', message))
  }
  return found
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
