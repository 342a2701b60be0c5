/** Which bytes of the backing file a device shows: given as they are, or as those of a partition. */

import {
  type BackingFile,
  checkBackingFile,
  checkBlockSize,
  checkOptions,
  type FileArgument,
} from '../common/arguments.ts'
import { checkDeadline, type Deadline, LOOKING, type Wait } from '../common/deadline.ts'
import type { Warning } from '../common/warnings.ts'
import { assertSupported, LoopError, refusal } from '../errors/errors.ts'
import { fromCaller } from '../errors/from-caller.ts'
import { explained } from '../errors/given-up.ts'
import type { Bound } from '../kernel/bounded.ts'
import { readBlockSizeSync } from '../kernel/sysfs.ts'
import { formatDevice, visibleSize } from '../kernel/uapi.ts'
import { describeTable, formatBytes, type FoundTable, type PartitionTable } from '../partitions/disk.ts'
import { probeGptBlockSize } from '../partitions/gpt.ts'
import { findTableIn, readerOf, type Window } from '../partitions/read.ts'
import { findPartition, type PartitionRef } from '../partitions/ref.ts'
import { type Backing, openBacking } from './backing.ts'
import type { Wanted } from './options.ts'

export interface TableOptions extends Wait {
  /**
   * Logical block size in bytes in which the table counts: a power of two from 512 to 65 536. Default: the one for
   * which the GPT was made; without a GPT, the block size of a block device, and 512 for a file.
   */
  blockSize?: number | undefined
}

/**
 * Reads the partition table, GPT or MBR, of an image or a block device. Attaches nothing, and only reads the file.
 *
 * @throws LoopError `bad-partition-table` (there is none, or no copy of the GPT is whole), `no-such-file`, `permission`,
 *   `not-a-file-or-block-device`, `io`
 *
 * @example
 * ```ts
 * const { table, partitions } = await readPartitionTable('sdcard.img')
 * for (const { number, start, size } of partitions) console.log(table, number, start, size)
 * ```
 */
export async function readPartitionTable(file: BackingFile, options?: TableOptions): Promise<PartitionTable> {
  const given = checkOptions(options, ['blockSize', 'signal', 'timeout'])
  const argument = checkBackingFile(file)
  const blockSize = given.blockSize === undefined ? undefined : checkBlockSize('blockSize', given.blockSize, 65_536)
  const deadline = checkDeadline(given, LOOKING)
  assertSupported()
  deadline.throwIfAborted()
  const path = 'path' in argument ? argument.path.toString() : undefined
  return await fromCaller(explained(() => readTableOf(argument, blockSize, deadline), path))
}

async function readTableOf(
  argument: FileArgument,
  blockSize: number | undefined,
  deadline: Deadline,
): Promise<PartitionTable> {
  const backing = await openBacking(argument, true, deadline)
  try {
    const found = await findTableOfFile(backing, blockSize, deadline.bound)
    deadline.throwIfAborted()
    if (found) return describeTable(found, found.blockSize)
    const { path } = backing
    throw refusal('bad-partition-table', 'read', 'there is no partition table, neither a GPT nor an MBR', { path })
  } finally {
    await backing.close()
  }
}

/** @throws `bad-partition-table`, `io` */
async function findTableOfFile(
  backing: Backing,
  blockSize: number | undefined,
  bound: Bound,
): Promise<FoundTable | undefined> {
  const used = blockSize ?? (await gptBlockSize(backing, bound)) ?? ownBlockSize(backing)
  return findTableIn(windowOf(backing, used, bound), used)
}

function gptBlockSize(backing: Backing, bound: Bound): Promise<number | undefined> {
  const window = windowOf(backing, 512, bound)
  return probeGptBlockSize(readerOf(window), window.size)
}

/** In whole blocks: what is left at the end no device shows. */
function windowOf({ fd, size, path }: Backing, blockSize: number, bound: Bound): Window {
  return { fd, offset: 0n, size: size - (size % BigInt(blockSize)), path, bound }
}

function ownBlockSize({ rdevice }: Backing): number {
  return (rdevice === undefined ? undefined : readBlockSizeSync(formatDevice(rdevice))) ?? 512
}

/** What of the file the device shows, in blocks of which size, and what is odd about it. */
export interface Choice {
  offset: bigint
  sizeLimit: bigint
  /** Undefined: the kernel's choice. */
  blockSize: number | undefined
  warnings: Warning[]
}

/** Whether the file has to be read to know its window, or what is odd about it. */
export function mustRead({ partition, blockSize, offset, sizeLimit }: Wanted): boolean {
  return partition !== undefined || blockSize === 'auto' || isUnbounded({ offset, sizeLimit })
}

function isUnbounded({ offset, sizeLimit }: Pick<Wanted, 'offset' | 'sizeLimit'>): boolean {
  return offset > 0n && sizeLimit === 0n
}

/**
 * The window that was asked for: that of a partition, or as it was given.
 *
 * @throws `no-such-partition`, `bad-partition-table`, `io`
 */
export async function chooseWindow(backing: Backing, wanted: Wanted, bound: Bound): Promise<Choice> {
  const { partition, offset, sizeLimit, blockSize } = wanted
  if (partition !== undefined) return findWindow(backing, partition, blockSize, bound)
  return {
    offset,
    sizeLimit,
    blockSize: blockSize === 'auto' ? await probeBlockSize(backing, wanted, bound) : blockSize,
    warnings: isUnbounded(wanted) ? await findNext(backing, offset, bound) : [],
  }
}

/** That of the GPT in the window of the file; undefined where there is none. */
async function probeBlockSize(
  { fd, path, size }: Backing,
  { offset, sizeLimit }: Wanted,
  bound: Bound,
): Promise<number | undefined> {
  const window = { fd, path, bound, offset, size: visibleSize(size, offset, sizeLimit) }
  return probeGptBlockSize(readerOf(window), window.size)
}

/**
 * One that reaches beyond the end is cut there, also in a GPT, where the kernel would leave it out: it was asked for by
 * name.
 */
async function findWindow(
  backing: Backing,
  ref: PartitionRef,
  asked: Wanted['blockSize'],
  bound: Bound,
): Promise<Choice> {
  // A GPT says itself which blocks it counts in; for an MBR those that the device is to have are the best guess.
  const blockSize = (await gptBlockSize(backing, bound)) ?? (typeof asked === 'number' ? asked : undefined)
  const found = await findTableOfFile(backing, blockSize, bound)
  const whole = found && { ...found, partitions: [...found.partitions, ...found.reachingBeyond] }
  const { number } = findPartition(whole && describeTable(whole, whole.blockSize), ref, backing.path)
  const entry = whole?.partitions.find((partition) => partition.number === number)
  if (!whole || !entry) throw refusal('no-such-partition', 'read', `there is no partition ${number}`, backing)
  return {
    offset: entry.start,
    sizeLimit: entry.size,
    // A filesystem in it was made on a disk of such blocks.
    blockSize: asked === 'auto' ? (whole.table === 'gpt' ? whole.blockSize : undefined) : asked,
    warnings: warningsOf(whole, number),
  }
}

/** What was said of the one partition, or of all of the table. */
function warningsOf({ usedBackup, warnings }: FoundTable, number: number): Warning[] {
  return warnings.flatMap((said): Warning[] => {
    if (said.code === 'gpt-backup' && usedBackup) return [said]
    if (!said.message.startsWith(`partition ${number} `)) return []
    if (said.code !== 'partition-left-out') return [said]
    return [{ code: 'partition-cut', message: said.message.replace('it is left out', 'it is cut there') }]
  })
}

/** Without a size limit the device goes on over what comes next in the image. */
async function findNext(backing: Backing, offset: bigint, bound: Bound): Promise<Warning[]> {
  let found: FoundTable | undefined
  try {
    found = await findTableOfFile(backing, undefined, bound)
  } catch (error) {
    // Then the image is read for this alone, and says nothing.
    if (LoopError.is(error)) return []
    throw error
  }
  const own = found?.partitions.find(({ start, size }) => start <= offset && offset < start + size)
  if (found === undefined || found.partitions.length === 0) return []
  const end = own && own.start + own.size
  if (end !== undefined && end >= backing.size) return []
  const where =
    own === undefined
      ? 'no partition begins there'
      : `partition ${own.number} ends ${formatBytes((end ?? 0n) - offset)} after it`
  const message = `the image has a partition table, and without a size limit the device goes on to the end of the file, ${formatBytes(backing.size - offset)} from offset ${offset} on; ${where}`
  const hint = own === undefined ? 'give a size limit' : `attach with partition: ${own.number}`
  return [{ code: 'window-unbounded', message, hint }]
}
