/**
 * The partition table of a disk or its image, GPT or MBR, read the way the kernel and sfdisk do.
 *
 * Nothing it reads is believed: counts and sizes have bounds, positions are checked against the device before they are
 * read, and chains that lead back are refused.
 */

import { type BlockReader, type Disk, type PartitionTable, readBlocks } from './disk.ts'
import { GPT_PROTECTIVE, readGpt } from './gpt.ts'
import { hasSignature, readEntries, readMbr } from './mbr.ts'

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
