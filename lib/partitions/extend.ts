/** Making the last partition of a table as large as the device lets it be: GPT, or a primary one of an MBR. */

import { crc32 } from '../common/crypto.ts'
import { refusal } from '../errors/errors.ts'
import { findTable } from './table.ts'

/** The device that the table is on. */
export interface Extendable {
  read: (position: number, length: number) => Promise<Uint8Array>
  /** Writes whole blocks. */
  write: (position: number, bytes: Uint8Array) => Promise<void>
  /** What is written is on the medium. */
  flush: () => Promise<void>
  /** Bytes. */
  size: number
  blockSize: number
  /** For errors. */
  path: string
}

/** The partition as it is in the table then; figures in bytes. */
export interface Extended {
  number: number
  start: number
  size: number
}

const HEADER_BLOCK = 1
/** Filesystems want whole pages. */
const ALIGNMENT = 4096

/**
 * Extends the partition with the highest start to the end of the device, in whole pages of 4096 bytes; never makes one
 * smaller. A kill at any moment leaves a table that is valid: of a GPT the backup is written first, at the new end, and
 * then the primary; an MBR is one sector.
 *
 * @throws `bad-partition-table`: there is none, its primary is damaged, or the last one is a logical partition
 */
export async function extendLastPartition(device: Extendable): Promise<Extended> {
  const { read, size, blockSize, path } = device
  const table = await findTable((position, length) => read(Number(position), length), BigInt(size), blockSize, path)
  if (table === undefined) throw bad(device, 'there is no partition table')
  if (table.usedBackup) throw bad(device, 'the primary GPT is damaged: repair it first, with sgdisk or gdisk')
  const last = table.partitions.toSorted((a, b) => Number(a.start - b.start)).at(-1)
  if (last === undefined) throw bad(device, 'there is no partition')
  const { number, start, size: length, extended } = last
  const present = { number, start: Number(start), size: Number(length), ...(extended && { extended }) }
  return table.table === 'gpt' ? extendGpt(device, present) : extendMbr(device, present)
}

/** The number of blocks from `start` on that end with a whole page, and not behind `end`. */
function alignedLength({ blockSize }: Extendable, start: number, end: number): number {
  const bytes = Math.floor((end * blockSize) / ALIGNMENT) * ALIGNMENT
  return bytes / blockSize - start
}

async function extendGpt(device: Extendable, last: Extended): Promise<Extended> {
  const { blockSize } = device
  const lastBlock = Math.floor(device.size / blockSize) - 1
  const header = Buffer.from(await device.read(HEADER_BLOCK * blockSize, blockSize))
  const [entryCount, entrySize] = [header.readUInt32LE(80), header.readUInt32LE(84)]
  const entriesBlock = Number(header.readBigUInt64LE(72))
  const entryBlocks = Math.ceil((entryCount * entrySize) / blockSize)
  const entries = Buffer.from(await device.read(entriesBlock * blockSize, entryBlocks * blockSize))
  const lastUsable = lastBlock - entryBlocks - 1

  const start = last.start / blockSize
  const blocks = Math.max(last.size / blockSize, alignedLength(device, start, lastUsable + 1))
  entries.writeBigUInt64LE(BigInt(start + blocks - 1), (last.number - 1) * entrySize + 40)
  const entriesCrc = crc32(entries.subarray(0, entryCount * entrySize))

  const backup = gptHeader(header, entriesCrc, {
    own: lastBlock,
    other: HEADER_BLOCK,
    lastUsable,
    entriesBlock: lastBlock - entryBlocks,
  })
  await device.write((lastBlock - entryBlocks) * blockSize, Buffer.concat([entries, backup]))
  await device.flush()
  const primary = gptHeader(header, entriesCrc, { own: HEADER_BLOCK, other: lastBlock, lastUsable, entriesBlock })
  if (entriesBlock === HEADER_BLOCK + 1) {
    await device.write(HEADER_BLOCK * blockSize, Buffer.concat([primary, entries]))
  } else {
    await device.write(entriesBlock * blockSize, entries)
    await device.write(HEADER_BLOCK * blockSize, primary)
  }
  await device.flush()
  await writeProtective(device, lastBlock)
  return { number: last.number, start: last.start, size: blocks * blockSize }
}

interface Places {
  own: number
  other: number
  lastUsable: number
  entriesBlock: number
}

function gptHeader(from: Buffer, entriesCrc: number, { own, other, lastUsable, entriesBlock }: Places): Buffer {
  const header = Buffer.from(from)
  header.writeBigUInt64LE(BigInt(own), 24)
  header.writeBigUInt64LE(BigInt(other), 32)
  header.writeBigUInt64LE(BigInt(lastUsable), 48)
  header.writeBigUInt64LE(BigInt(entriesBlock), 72)
  header.writeUInt32LE(entriesCrc, 88)
  header.writeUInt32LE(0, 16)
  header.writeUInt32LE(crc32(header.subarray(0, header.readUInt32LE(12))), 16)
  return header
}

const [MBR_ENTRIES, MBR_ENTRY_SIZE] = [446, 16]
const GPT_PROTECTIVE = 0xee
const MOST_BLOCKS = 0xffff_ffff

/** The protective entry covers the disk, as far as an MBR can say that; of a hybrid MBR it does not. */
async function writeProtective(device: Extendable, lastBlock: number): Promise<void> {
  const sector = Buffer.from(await device.read(0, device.blockSize))
  const entry = sector.subarray(MBR_ENTRIES, MBR_ENTRIES + MBR_ENTRY_SIZE)
  const others = sector.subarray(MBR_ENTRIES + MBR_ENTRY_SIZE, MBR_ENTRIES + 4 * MBR_ENTRY_SIZE)
  if (entry.readUInt8(4) !== GPT_PROTECTIVE || !others.every((byte) => byte === 0)) return
  entry.writeUInt32LE(Math.min(lastBlock, MOST_BLOCKS), 12)
  await device.write(0, sector)
  await device.flush()
}

async function extendMbr(device: Extendable, last: Extended & { extended?: true }): Promise<Extended> {
  const { blockSize } = device
  if (last.number > 4 || last.extended) {
    throw bad(device, `the last partition, ${last.number}, is ${last.extended ? 'an extended' : 'a logical'} one`)
  }
  const start = last.start / blockSize
  const end = Math.min(Math.floor(device.size / blockSize), start + MOST_BLOCKS)
  const blocks = Math.max(last.size / blockSize, alignedLength(device, start, end))
  const sector = Buffer.from(await device.read(0, blockSize))
  const entry = sector.subarray(MBR_ENTRIES + (last.number - 1) * MBR_ENTRY_SIZE)
  entry.writeUInt32LE(blocks, 12)
  // Cylinder, head and sector of the end: beyond what they can say.
  entry.set([0xfe, 0xff, 0xff], 5)
  await device.write(0, sector)
  await device.flush()
  return { number: last.number, start: last.start, size: blocks * blockSize }
}

function bad({ path }: Extendable, detail: string): Error {
  return refusal('bad-partition-table', 'read', detail, { path })
}
