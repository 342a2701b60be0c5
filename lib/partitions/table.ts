/**
 * The partition table of a disk or its image, GPT or MBR, read the way the kernel does.
 *
 * Nothing it reads is believed: counts and sizes have bounds, positions are checked against the device before they are
 * read, and a chain that leads back is left there.
 */

import { type BlockReader, type Disk, type FoundTable, readBlocks } from './disk.ts'
import { GPT_PROTECTIVE, readGpt } from './gpt.ts'
import { hasSignature, readEntries, readMbr } from './mbr.ts'

/**
 * Reads the partition table; undefined where there is none.
 *
 * A hybrid MBR's GPT counts, as for the kernel. Unlike the kernel it takes the backup where the primary GPT is damaged,
 * a GPT of an image that was cut, and one that was made for other blocks: each with a warning. What a table says that
 * cannot be is left out, with a warning; partitions that overlap are all there.
 *
 * @param size bytes of the device
 * @param blockSize logical block size, in which the table counts: 512, 1024, 2048 or 4096
 * @param path what errors call the device
 * @throws LoopError `bad-partition-table`: no copy of the GPT is whole; `io`: the reader answered too few bytes
 */
export async function findTable(
  read: BlockReader,
  size: bigint,
  blockSize: number,
  path?: string,
): Promise<FoundTable | undefined> {
  const disk: Disk = { read, blockSize, blocks: size / BigInt(blockSize), path }
  if (disk.blocks === 0n) return undefined
  const sector = await readBlocks(disk, 0n, 1)
  if (!hasSignature(sector)) return undefined
  const primaries = readEntries(sector)
  const table = primaries.some(({ type }) => type === GPT_PROTECTIVE)
    ? await readGpt(disk, primaries)
    : await readMbr(disk, sector, primaries)
  table?.partitions.sort((a, b) => a.number - b.number)
  return table
}
