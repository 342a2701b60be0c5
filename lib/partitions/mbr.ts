/** MBR partition tables, with the logical partitions of extended ones. */

import {
  assertNoOverlap,
  assertOnDevice,
  bad,
  digits,
  type Disk,
  GPT_BLOCK_SIZES,
  hex,
  isPowerOfTwo,
  MAX_NUMBER,
  type PartitionTable,
  readBlocks,
  type TableEntry,
} from './disk.ts'
import { MBR_TYPES } from './types.ts'

/** One of the four entries of a boot record; the figures are blocks. */
export interface MbrEntry {
  active: number
  type: number
  start: number
  size: number
}

const MBR_ENTRIES = 446
const MBR_SIGNATURE = 510

const EXTENDED_TYPES: ReadonlySet<number> = new Set([0x05, 0x0f, 0x85])
const LINUX_TYPES: ReadonlySet<number> = new Set([0x82, 0x83, 0x8e, 0xfd])

/** The kernel gives up after 100 extended boot records in a row without a partition. */
const MAX_EMPTY_LINKS = 100

export function hasSignature(sector: Buffer): boolean {
  return sector.readUInt16LE(MBR_SIGNATURE) === 0xaa55
}

export function readEntries(sector: Buffer): MbrEntry[] {
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

export async function readMbr(disk: Disk, sector: Buffer, primaries: MbrEntry[]): Promise<PartitionTable | undefined> {
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
