/**
 * The partition table of a disk or its image, GPT or MBR, read the way the kernel and sfdisk do.
 *
 * Nothing it reads is believed: counts and sizes have bounds, positions are checked against the device before they are
 * read, and chains that lead back are refused.
 */

import { crc32 } from './digest.ts'
import { type LoopError, refusal } from './errors.ts'
import { GPT_TYPES, MBR_TYPES } from './partition-types.ts'

/** Reads that many bytes from that byte on: whole blocks, aligned to them, and never beyond the device's end. */
export type BlockReader = (position: number, length: number) => Promise<Uint8Array>

/** A partition, as the table has it. */
export interface TableEntry {
  /** As in `/dev/loop0p3`; logical partitions begin at 5. */
  number: number
  /** Bytes from the device's beginning. */
  start: number
  /** Bytes. */
  size: number
  /** GPT: the GUID, upper case. MBR: the number, hexadecimal, lower case: `83`, `c`. */
  type: string
  /** What sfdisk calls the type, where it is a common one. */
  typeName?: string
  /** GPT only, where there is one. */
  label?: string
  /** GPT: the partition's GUID, upper case. MBR: the kernel's PARTUUID, `1a2b3c4d-05`; absent where the disk has no id. */
  uuid?: string
  /** MBR: active. GPT: legacy BIOS bootable. Absent where not. */
  bootable?: true
  /** The container of the logical partitions, of which the kernel shows 1 KiB, or one block. Absent where not. */
  extended?: true
}

export interface PartitionTable {
  kind: 'gpt' | 'mbr'
  /** GPT: the disk's GUID, upper case. MBR: `0x1a2b3c4d`. */
  diskId: string
  /** GPT: the primary header or its entries were damaged, and this is what the backup at the end says. */
  usedBackup: boolean
  /** What is wrong, and did not keep the table from being read. */
  warnings: string[]
  /** By number. */
  partitions: TableEntry[]
}

/** What all steps need to know. */
interface Disk {
  read: BlockReader
  blockSize: number
  /** Whole blocks of the device. */
  blocks: number
  path: string | undefined
}

const MBR_ENTRIES = 446
const MBR_SIGNATURE = 510
const GPT_PROTECTIVE = 0xee
const EXTENDED_TYPES: ReadonlySet<number> = new Set([0x05, 0x0f, 0x85])
const LINUX_TYPES: ReadonlySet<number> = new Set([0x82, 0x83, 0x8e, 0xfd])
const GPT_BLOCK_SIZES = [512, 1024, 2048, 4096]
const GPT_HEADER_BYTES = 92
/** 1024 entries of the usual size; all tools write 128. */
const MAX_GPT_ENTRIES_BYTES = 128 * 1024
/** The kernel has no more minors for one disk. */
const MAX_NUMBER = 255
/** The kernel gives up after 100 extended boot records in a row without a partition. */
const MAX_EMPTY_LINKS = 100

/**
 * Reads the partition table; undefined where there is none.
 *
 * A hybrid MBR's GPT counts, as for the kernel. Unlike the kernel, a damaged primary GPT is replaced by the backup, and
 * a table that contradicts itself is refused, not shown in part.
 *
 * @param size bytes of the device
 * @param blockSize logical block size, in which the table counts: 512, 1024, 2048 or 4096
 * @param path what errors call the device
 * @throws LoopError `bad-partition-table`: both copies of the GPT are damaged, partitions overlap or are not on the
 *   device, the chain of logical partitions loops or leaves its container; `io`: the reader answered too few bytes
 */
export async function readPartitionTable(
  read: BlockReader,
  size: number,
  blockSize: number,
  path?: string,
): Promise<PartitionTable | undefined> {
  const disk: Disk = { read, blockSize, blocks: Math.floor(size / blockSize), path }
  if (disk.blocks === 0) return undefined
  const sector = await readBlocks(disk, 0, 1)
  if (!hasSignature(sector)) return undefined
  const primaries = readEntries(sector)
  const table = primaries.some(({ type }) => type === GPT_PROTECTIVE)
    ? await readGpt(disk, primaries)
    : await readMbr(disk, sector, primaries)
  table?.partitions.sort((a, b) => a.number - b.number)
  return table
}

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

async function readBlocks({ read, blockSize, path }: Disk, block: number, count: number): Promise<Buffer> {
  const length = count * blockSize
  const bytes = await read(block * blockSize, length)
  if (bytes.length < length) {
    const detail = `${bytes.length} bytes at ${block * blockSize} where ${length} were asked for`
    throw refusal('io', 'read', detail, { path })
  }
  return Buffer.from(bytes.buffer, bytes.byteOffset, length)
}

/** Reads any bytes, through reads of the device's own blocks. */
function alignedReader(disk: Disk): BlockReader {
  const { blockSize } = disk
  return async (position, length) => {
    const block = Math.floor(position / blockSize)
    const bytes = await readBlocks(disk, block, Math.ceil((position + length) / blockSize) - block)
    return bytes.subarray(position - block * blockSize, position - block * blockSize + length)
  }
}

function bad({ path }: Disk, detail: string, hint?: string): LoopError {
  return refusal('bad-partition-table', 'read', detail, { path, hint })
}

/** Refuses an entry that is not on the device; the figures are blocks. */
function assertOnDevice(disk: Disk, number: number, start: number | bigint, end: number | bigint): void {
  if (end <= disk.blocks) return
  const detail = `partition ${number} (blocks ${start} to ${BigInt(end) - 1n}) is not on the device, whose last block of ${disk.blockSize} bytes is ${disk.blocks - 1}`
  throw bad(disk, detail, 'the image may be cut off, or its table be made for another block size')
}

function assertNoOverlap(disk: Disk, entries: readonly TableEntry[]): void {
  const sorted = entries.toSorted((a, b) => a.start - b.start)
  for (const [index, entry] of sorted.entries()) {
    const next = sorted[index + 1]
    if (next && next.start < entry.start + entry.size) {
      throw bad(disk, `partitions ${bytesOf(entry)} and ${bytesOf(next)} overlap`)
    }
  }
}

function bytesOf({ number, start, size }: TableEntry): string {
  return `${number} (bytes ${start} to ${start + size - 1})`
}

// ── MBR ──

/** One of the four entries of a boot record; the figures are blocks. */
interface MbrEntry {
  active: number
  type: number
  start: number
  size: number
}

function hasSignature(sector: Buffer): boolean {
  return sector.readUInt16LE(MBR_SIGNATURE) === 0xaa55
}

function readEntries(sector: Buffer): MbrEntry[] {
  return [0, 1, 2, 3].map((index) => {
    const at = MBR_ENTRIES + index * 16
    return {
      active: sector.readUInt8(at),
      type: sector.readUInt8(at + 4),
      start: sector.readUInt32LE(at + 8),
      size: sector.readUInt32LE(at + 12),
    }
  })
}

/** Whether the entry is a container; one without a size is not in use, whatever its type. */
function isContainer({ type, size }: MbrEntry): boolean {
  return size > 0 && EXTENDED_TYPES.has(type)
}

/** A boot sector of a filesystem on the whole device has the MBR's signature too, and code where the entries would be. */
function isFilesystem(sector: Buffer, primaries: readonly MbrEntry[]): boolean {
  if (primaries.some(({ active }) => active !== 0 && active !== 0x80)) return true
  const oem = sector.toString('latin1', 3, 11)
  if (oem === 'NTFS    ' || oem === 'EXFAT   ') return true
  const fat = sector.toString('latin1', 54, 59) === 'FAT12' || sector.toString('latin1', 54, 59) === 'FAT16'
  if (!fat && sector.toString('latin1', 82, 87) !== 'FAT32') return false
  // A boot loader may have left such a string in a real MBR: a FAT has a plausible geometry as well.
  const media = sector.readUInt8(21)
  return (
    GPT_BLOCK_SIZES.includes(sector.readUInt16LE(11)) &&
    isPowerOfTwo(sector.readUInt8(13)) &&
    sector.readUInt16LE(14) > 0 &&
    sector.readUInt8(16) > 0 &&
    (media === 0xf0 || media >= 0xf8)
  )
}

/** AIX leaves its mark in front of what is no table; it stays there where Linux partitions came later. */
function isAix(sector: Buffer, primaries: readonly MbrEntry[]): boolean {
  const ofLinux = primaries.some(({ type }) => LINUX_TYPES.has(type) || EXTENDED_TYPES.has(type))
  return sector.readUInt32BE(0) === 0xc9c2d4c1 && !ofLinux
}

function isPowerOfTwo(value: number): boolean {
  return value > 0 && (value & (value - 1)) === 0
}

async function readMbr(disk: Disk, sector: Buffer, primaries: MbrEntry[]): Promise<PartitionTable | undefined> {
  if (isAix(sector, primaries) || isFilesystem(sector, primaries)) return undefined
  const id = sector.readUInt32LE(440)
  const table: PartitionTable = {
    kind: 'mbr',
    diskId: hex(id),
    usedBackup: false,
    warnings: [],
    partitions: [],
  }
  const logicals: TableEntry[] = []
  const containers: MbrEntry[] = []
  for (const [index, entry] of primaries.entries()) {
    if (entry.size === 0) continue
    assertOnDevice(disk, index + 1, entry.start, entry.start + entry.size)
    table.partitions.push(mbrEntry(disk, id, index + 1, entry.start, entry))
    if (isContainer(entry)) containers.push(entry)
  }
  assertNoOverlap(disk, table.partitions)
  for (const container of containers) await readLogicals(disk, id, container, logicals, table.warnings)
  assertNoOverlap(disk, logicals)
  table.partitions.push(...logicals)
  return table
}

function mbrEntry({ blockSize }: Disk, id: number, number: number, start: number, entry: MbrEntry): TableEntry {
  const type = entry.type.toString(16)
  const typeName = MBR_TYPES.get(type)
  return {
    number,
    start: start * blockSize,
    size: entry.size * blockSize,
    type,
    ...(typeName !== undefined && { typeName }),
    ...(id !== 0 && { uuid: `${digits(id)}-${digits(number, 2)}` }),
    ...(entry.active === 0x80 && { bootable: true }),
    ...(EXTENDED_TYPES.has(entry.type) && { extended: true }),
  }
}

/** The chain of extended boot records: each has a partition, relative to itself, and the next, relative to the container. */
async function readLogicals(
  disk: Disk,
  id: number,
  container: MbrEntry,
  logicals: TableEntry[],
  warnings: string[],
): Promise<void> {
  const end = container.start + container.size
  const range = `blocks ${container.start} to ${end - 1}`
  const visited = new Set<number>()
  let empty = 0
  let block = container.start
  let room = container.size
  while (true) {
    if (visited.has(block)) {
      throw bad(disk, `the chain of logical partitions loops: it comes back to the boot record in block ${block}`)
    }
    visited.add(block)
    const sector = await readBlocks(disk, block, 1)
    if (!hasSignature(sector)) {
      warnings.push(`the chain of logical partitions ends in block ${block}, which is no boot record`)
      return
    }
    const entries = readEntries(sector)
    empty++
    for (const [index, entry] of entries.entries()) {
      if (entry.size === 0 || EXTENDED_TYPES.has(entry.type)) continue
      const start = block + entry.start
      const fits = start + entry.size <= end
      // Some tools leave garbage in the last two entries: there the kernel takes only what can be a partition.
      if (index >= 2 && (!fits || entry.start + entry.size > room)) continue
      const number = 5 + logicals.length
      if (!fits) {
        const blocks = `blocks ${start} to ${start + entry.size - 1}`
        throw bad(disk, `logical partition ${number} (${blocks}) leaves the extended partition (${range})`)
      }
      if (number > MAX_NUMBER) throw bad(disk, `there are more partitions than ${MAX_NUMBER}`)
      logicals.push(mbrEntry(disk, id, number, start, entry))
      empty = 0
    }
    if (empty > MAX_EMPTY_LINKS) {
      throw bad(disk, `the chain of logical partitions has ${empty} boot records in a row without a partition`)
    }
    const link = entries.find((entry) => isContainer(entry))
    if (!link) {
      const zero = entries.find(({ type, start }) => EXTENDED_TYPES.has(type) && start > 0)
      if (!zero) return
      throw bad(
        disk,
        `the boot record in block ${block} leads to one in block ${container.start + zero.start} of no size`,
      )
    }
    block = container.start + link.start
    room = link.size
    if (block >= end) {
      throw bad(
        disk,
        `the chain of logical partitions leads to block ${block}, outside the extended partition (${range})`,
      )
    }
  }
}

// ── GPT ──

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

async function readGpt(disk: Disk, primaries: MbrEntry[]): Promise<PartitionTable | undefined> {
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

function digits(value: number, length = 8): string {
  return value.toString(16).padStart(length, '0')
}

function hex(value: number): string {
  return `0x${digits(value)}`
}
