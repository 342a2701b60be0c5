/** Small images with one partition each, to see whether the kernel finds it. */

import { crc32 } from '../common/crypto.ts'

const SECTOR = 512
const SECTORS = 2048
export const SAMPLE_SIZE: number = SECTOR * SECTORS
const LAST = SECTORS - 1
const FIRST_USABLE = 34
const PARTITION = { first: 64, length: 64 }

/** Nothing but zeros. */
export function blank(): Buffer {
  return Buffer.alloc(SAMPLE_SIZE)
}

/** An MBR with one Linux partition. */
export function mbr(): Buffer {
  return withMbr(blank(), 0x83, PARTITION.first, PARTITION.length)
}

/** A GPT, with its backup at the end, and one Linux partition. */
export function gpt(): Buffer {
  const image = withMbr(blank(), 0xee, 1, LAST)
  const entries = Buffer.alloc(128 * 128)
  Buffer.from('af3dc60f838472478e793d69d8477de4', 'hex').copy(entries, 0)
  entries.fill(0x11, 16, 32)
  entries.writeBigUInt64LE(BigInt(PARTITION.first), 32)
  entries.writeBigUInt64LE(BigInt(PARTITION.first + PARTITION.length - 1), 40)
  const places = [
    { header: 1, other: LAST, table: 2 },
    { header: LAST, other: 1, table: LAST - 32 },
  ]
  for (const { header, other, table } of places) {
    const bytes = Buffer.alloc(92)
    bytes.write('EFI PART', 'latin1')
    bytes.writeUInt32LE(0x1_0000, 8)
    bytes.writeUInt32LE(bytes.length, 12)
    for (const [offset, sector] of [
      [24, header],
      [32, other],
      [40, FIRST_USABLE],
      [48, LAST - FIRST_USABLE + 1],
      [72, table],
    ] as const) {
      bytes.writeBigUInt64LE(BigInt(sector), offset)
    }
    bytes.fill(0x22, 56, 72)
    bytes.writeUInt32LE(128, 80)
    bytes.writeUInt32LE(128, 84)
    bytes.writeUInt32LE(crc32(entries), 88)
    bytes.writeUInt32LE(crc32(bytes), 16)
    bytes.copy(image, header * SECTOR)
    entries.copy(image, table * SECTOR)
  }
  return image
}

function withMbr(image: Buffer, type: number, first: number, length: number): Buffer {
  image[450] = type
  image.writeUInt32LE(first, 454)
  image.writeUInt32LE(length, 458)
  image.writeUInt16LE(0xaa55, 510)
  return image
}
