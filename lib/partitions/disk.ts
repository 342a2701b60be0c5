/** The bytes that a partition table is read from, and what every format of table is held to. */

import type { Warning, WarningCode } from '../common/warnings.ts'
import { type LoopError, refusal } from '../errors/errors.ts'

/** Reads that many bytes from that byte on: whole blocks, aligned to them, and never beyond the device's end. */
export type BlockReader = (position: bigint, length: number) => Promise<Uint8Array>

/** A partition, as the partition table describes it; plain data. */
export interface TablePartition {
  /** As in `/dev/loop0p3`; logical partitions begin at 5. The kernel shows numbers up to 255. */
  number: number
  /** Bytes from the beginning of the device. */
  start: number
  /** Bytes, as the kernel shows them: for the extended partition of an MBR 1 KiB, or one block. */
  size: number
  /** GPT: attribute 60, "read-only", which the kernel ignores. MBR: false. */
  readOnly: boolean
  table: 'gpt' | 'mbr'
  /** GPT: the GUID, upper case. MBR: the number, hexadecimal, lower case: `83`, `c`. */
  type: string
  /** The name that sfdisk has for the type, if it is a common type. */
  typeName?: string
  /** GPT only, if the partition has one. */
  label?: string
  /** GPT: the partition's GUID, upper case. MBR: the kernel's PARTUUID, `1a2b3c4d-05`; absent if the disk has no id. */
  uuid?: string
  /** MBR: active. GPT: legacy BIOS bootable. */
  bootable: boolean
}

/** The partition table of an image or a device; plain data. */
export interface PartitionTable {
  table: 'gpt' | 'mbr'
  /** The logical block size, in bytes, in which the table counts. */
  blockSize: number
  /** GPT: the disk's GUID, upper case. MBR: `0x1a2b3c4d`. */
  diskId: string
  /**
   * Ordered by number. Overlapping partitions are included. Those that reach beyond the end of the image are cut, or
   * left out with a warning.
   */
  partitions: TablePartition[]
  /** What is odd about the table, although it could be read. */
  warnings: Warning[]
}

/** A partition, with the figures that a number cannot hold. */
export interface TableEntry extends Omit<TablePartition, 'start' | 'size'> {
  start: bigint
  /** Of the container of logical partitions all of it. */
  size: bigint
  /** The container of the logical partitions. Absent where not. */
  extended?: true
}

/** A table as it was found. */
export interface FoundTable extends Omit<PartitionTable, 'partitions'> {
  partitions: TableEntry[]
  /** Left out of them, for they end beyond the end of the image; cut there. */
  reachingBeyond: TableEntry[]
  /** GPT: the primary header or its entries were damaged, and this is what the backup at the end says. */
  usedBackup: boolean
  /** Whether a kernel that has a parser for this type of table reads it too, from a device of these blocks. */
  isForKernel: boolean
}

/** What all steps need to know. */
export interface Disk {
  read: BlockReader
  /** Logical block size, in which a table counts. */
  blockSize: number
  /** Whole blocks of the device. */
  blocks: bigint
  path: string | undefined
}

export const GPT_BLOCK_SIZES: readonly number[] = [512, 1024, 2048, 4096]

/** The kernel has no more minors for one disk. */
export const MAX_NUMBER = 255

export async function readBlocks({ read, blockSize, path }: Disk, block: bigint, count: number): Promise<Buffer> {
  const length = count * blockSize
  const position = block * BigInt(blockSize)
  const bytes = await read(position, length)
  if (bytes.length < length) {
    const detail = `${bytes.length} bytes at ${position} where ${length} were asked for`
    throw refusal('io', 'read', detail, { path })
  }
  return Buffer.from(bytes.buffer, bytes.byteOffset, length)
}

/** The same bytes in blocks of another size, through reads of the device's own blocks. */
export function inBlocksOf(blockSize: number, disk: Disk): Disk {
  const own = BigInt(disk.blockSize)
  const read = async (position: bigint, length: number): Promise<Uint8Array> => {
    const block = position / own
    const end = position + BigInt(length)
    const bytes = await readBlocks(disk, block, Number((end + own - 1n) / own - block))
    const from = Number(position - block * own)
    return bytes.subarray(from, from + length)
  }
  return { read, blockSize, blocks: (disk.blocks * own) / BigInt(blockSize), path: disk.path }
}

export function bad({ path }: Disk, detail: string, hint?: string): LoopError {
  return refusal('bad-partition-table', 'read', detail, { path, hint })
}

export function warning(code: WarningCode, message: string, hint?: string): Warning {
  return { code, message, ...(hint !== undefined && { hint }) }
}

export function isPowerOfTwo(value: number): boolean {
  return value > 0 && (value & (value - 1)) === 0
}

export function digits(value: number, length = 8): string {
  return value.toString(16).padStart(length, '0')
}

export function hex(value: number): string {
  return `0x${digits(value)}`
}

const UNITS = [
  ['TiB', 1n << 40n],
  ['GiB', 1n << 30n],
  ['MiB', 1n << 20n],
  ['KiB', 1n << 10n],
] as const

/** `4 MiB`, or in bytes what is no multiple of a unit. */
export function formatBytes(bytes: bigint): string {
  const [name, size] = UNITS.find(([, unit]) => bytes >= unit && bytes % unit === 0n) ?? ['bytes', 1n]
  return `${bytes / size} ${name}`
}

/** What users see of a table. `deviceBlockSize`: that of the device, for the container of logical partitions. */
export function describeTable(found: FoundTable, deviceBlockSize: number): PartitionTable {
  const { table, blockSize, diskId, partitions, warnings } = found
  return {
    table,
    blockSize,
    diskId,
    partitions: partitions.map((partition) => {
      const { extended: _, number, start, size: __, ...entry } = partition
      return { number, start: Number(start), size: Number(shownSize(partition, deviceBlockSize)), ...entry }
    }),
    warnings,
  }
}

/** Of the container of logical partitions the kernel shows no more than a boot loader needs: they lie in it. */
export function shownSize({ size, extended }: Pick<TableEntry, 'size' | 'extended'>, blockSize: number): bigint {
  const shown = BigInt(Math.max(1024, blockSize))
  return extended && size > shown ? shown : size
}
