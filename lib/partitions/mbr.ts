/** MBR partition tables, with the logical partitions of extended ones. */

import type { Warning } from '../common/warnings.ts'
import {
  digits,
  type Disk,
  formatBytes,
  type FoundTable,
  GPT_BLOCK_SIZES,
  hex,
  inBlocksOf,
  isPowerOfTwo,
  MAX_NUMBER,
  readBlocks,
  type TableEntry,
  warning,
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

/** The kernel gives up after so many extended boot records in a row without a partition. */
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
async function isAix(disk: Disk, sector: Buffer, primaries: readonly MbrEntry[]): Promise<boolean> {
  const ofLinux = primaries.some(({ type }) => LINUX_TYPES.has(type) || EXTENDED_TYPES.has(type))
  if (sector.readUInt32BE(0) !== 0xc9c2d4c1 || ofLinux) return false
  const sectors = inBlocksOf(512, disk)
  return sectors.blocks > 7n && (await readBlocks(sectors, 7n, 1)).toString('latin1', 0, 4) === '_LVM'
}

export async function readMbr(disk: Disk, sector: Buffer, primaries: MbrEntry[]): Promise<FoundTable | undefined> {
  if (isFilesystem(sector, primaries) || (await isAix(disk, sector, primaries))) return undefined
  const id = sector.readUInt32LE(440)
  const reader = new MbrReader(disk, id)
  for (const [index, entry] of primaries.entries()) {
    if (entry.size === 0) continue
    reader.take(index + 1, BigInt(entry.start), entry)
    if (isContainer(entry)) await reader.readLogicals(entry)
  }
  const { partitions, warnings } = reader
  return {
    table: 'mbr',
    blockSize: disk.blockSize,
    diskId: hex(id),
    usedBackup: false,
    isForKernel: true,
    warnings,
    partitions,
    reachingBeyond: [],
  }
}

/** What is found of one table: its partitions and what is odd about them. */
class MbrReader {
  readonly partitions: TableEntry[] = []
  readonly warnings: Warning[] = []
  readonly #disk: Disk
  readonly #id: number
  /** Of the next logical partition, over all containers. */
  #next = 5

  constructor(disk: Disk, id: number) {
    this.#disk = disk
    this.#id = id
  }

  /** As the kernel does: what reaches beyond the end is cut there, what begins there is left out. */
  take(number: number, start: bigint, entry: MbrEntry): void {
    const { blocks, blockSize } = this.#disk
    const unit = BigInt(blockSize)
    const end = start + BigInt(entry.size)
    if (start >= blocks) {
      const beyond = formatBytes((start - blocks) * unit)
      const where = start === blocks ? 'at the end of the image' : `${beyond} beyond the end of the image`
      this.#leaveOut(`partition ${number} begins ${where}; it is left out`)
      return
    }
    const size = end > blocks ? blocks - start : BigInt(entry.size)
    if (end > blocks) {
      const beyond = formatBytes((end - blocks) * unit)
      const message = `partition ${number} ends ${beyond} beyond the image; it is cut to ${formatBytes(size * unit)}`
      this.warnings.push(warning('partition-cut', message))
    }
    const type = entry.type.toString(16)
    const typeName = MBR_TYPES.get(type)
    this.partitions.push({
      number,
      start: start * unit,
      size: size * unit,
      readOnly: false,
      table: 'mbr',
      type,
      ...(typeName !== undefined && { typeName }),
      ...(this.#id !== 0 && { uuid: `${digits(this.#id)}-${digits(number, 2)}` }),
      bootable: entry.active === 0x80,
      ...(EXTENDED_TYPES.has(entry.type) && { extended: true }),
    })
  }

  /**
   * The chain of extended boot records: each has a partition, relative to itself, and the next, relative to the
   * container. It is followed as the kernel does, also out of the container; but not where it comes back.
   */
  async readLogicals(container: MbrEntry): Promise<void> {
    const end = container.start + container.size
    const visited = new Set<number>()
    let empty = 0
    let block = container.start
    let room = container.size
    while (true) {
      if (visited.has(block)) {
        return this.#endChain(`comes back to the boot record in block ${block}`)
      }
      visited.add(block)
      if (++empty > MAX_EMPTY_LINKS) {
        return this.#endChain(`has ${MAX_EMPTY_LINKS} boot records in a row without a partition`)
      }
      if (BigInt(block) >= this.#disk.blocks)
        return this.#endChain(`leads to block ${block}, beyond the end of the image`)
      const sector = await readBlocks(this.#disk, BigInt(block), 1)
      if (!hasSignature(sector)) return this.#endChain(`ends in block ${block}, which is no boot record`)
      const entries = readEntries(sector)
      for (const [index, entry] of entries.entries()) {
        if (entry.size === 0 || EXTENDED_TYPES.has(entry.type)) continue
        const start = block + entry.start
        // Some tools leave garbage in the last two entries: there the kernel takes only what can be a partition.
        if (index >= 2 && (start + entry.size > end || entry.start + entry.size > room)) continue
        if (this.#next > MAX_NUMBER)
          return this.#endChain(`goes on behind partition ${MAX_NUMBER}, the last that there can be`)
        this.take(this.#next++, BigInt(start), entry)
        empty = 0
      }
      const link = entries.find((entry) => isContainer(entry))
      if (!link) {
        const zero = entries.find(({ type, start }) => EXTENDED_TYPES.has(type) && start > 0)
        if (zero) this.#endChain(`leads to a boot record of no size, in block ${container.start + zero.start}`)
        return
      }
      block = container.start + link.start
      room = link.size
    }
  }

  #endChain(problem: string): void {
    this.#leaveOut(`the chain of logical partitions ${problem}; what may follow is left out`)
  }

  #leaveOut(message: string): void {
    this.warnings.push(warning('partition-left-out', message))
  }
}
