/** The bytes that a partition table is read from, and what every format of table is held to. */

import { type LoopError, refusal } from '../errors/errors.ts'

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
export interface Disk {
  read: BlockReader
  blockSize: number
  /** Whole blocks of the device. */
  blocks: number
  path: string | undefined
}

export const GPT_BLOCK_SIZES: readonly number[] = [512, 1024, 2048, 4096]

/** The kernel has no more minors for one disk. */
export const MAX_NUMBER = 255

export async function readBlocks({ read, blockSize, path }: Disk, block: number, count: number): Promise<Buffer> {
  const length = count * blockSize
  const bytes = await read(block * blockSize, length)
  if (bytes.length < length) {
    const detail = `${bytes.length} bytes at ${block * blockSize} where ${length} were asked for`
    throw refusal('io', 'read', detail, { path })
  }
  return Buffer.from(bytes.buffer, bytes.byteOffset, length)
}

/** Reads any bytes, through reads of the device's own blocks. */
export function alignedReader(disk: Disk): BlockReader {
  const { blockSize } = disk
  return async (position, length) => {
    const block = Math.floor(position / blockSize)
    const bytes = await readBlocks(disk, block, Math.ceil((position + length) / blockSize) - block)
    return bytes.subarray(position - block * blockSize, position - block * blockSize + length)
  }
}

export function bad({ path }: Disk, detail: string, hint?: string): LoopError {
  return refusal('bad-partition-table', 'read', detail, { path, hint })
}

/** Refuses an entry that is not on the device; the figures are blocks. */
export function assertOnDevice(disk: Disk, number: number, start: number | bigint, end: number | bigint): void {
  if (end <= disk.blocks) return
  const detail = `partition ${number} (blocks ${start} to ${BigInt(end) - 1n}) is not on the device, whose last block of ${disk.blockSize} bytes is ${disk.blocks - 1}`
  throw bad(disk, detail, 'the image may be cut off, or its table be made for another block size')
}

export function assertNoOverlap(disk: Disk, entries: readonly TableEntry[]): void {
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

export function isPowerOfTwo(value: number): boolean {
  return value > 0 && (value & (value - 1)) === 0
}

export function digits(value: number, length = 8): string {
  return value.toString(16).padStart(length, '0')
}

export function hex(value: number): string {
  return `0x${digits(value)}`
}
