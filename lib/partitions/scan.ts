/** Partitions made to appear: by the kernel's own parsers, or by us with BLKPG. */

import type { Deadline } from '../common/deadline.ts'
import type { Warning } from '../common/warnings.ts'
import { LoopError } from '../errors/errors.ts'
import type { Handle } from '../handle/handle.ts'
import { readBlockSize, readSize } from '../handle/size.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { decide } from '../kernel/trace.ts'
import {
  addPartitions,
  growPartition,
  isAtSamePlace,
  isSame,
  type Range,
  removePartitions,
  removePresent,
  restorePartitions,
  shrinkBack,
} from './blkpg.ts'
import { type FoundTable, shownSize, warning } from './disk.ts'
import { settlePartitions } from './nodes.ts'
import { findTableOf } from './read.ts'

/**
 * `'kernel'`: its parsers alone. `'user'`: the table is read here, and the kernel told with BLKPG. `'any'`: the kernel's
 * parsers, and where they show nothing of a table that has partitions, BLKPG.
 */
export type ScanMode = 'kernel' | 'user' | 'any'

/** By type of table, whether this kernel has a parser for it; as far as this process has seen. */
const parsers = new Map<FoundTable['table'], boolean>()

/** Whether the kernel is known to have no parser for such a table. */
export function hasNoParser({ table }: FoundTable): boolean {
  return parsers.get(table) === false
}

/**
 * After an attach, or where the kernel has just looked by itself: the partitions are there, with their nodes, and what
 * is odd about the table is among the warnings. Answers what was added, which is removed again where that fails.
 *
 * @throws `bad-partition-table` for 'user', `io`, `permission`, `node-missing`, `timeout`
 */
export async function showPartitions(handle: Handle, mode: ScanMode, deadline: Deadline): Promise<readonly Range[]> {
  let added: readonly Range[] = []
  try {
    const table = await (mode === 'user' ? mustFindTable(handle) : tryToFindTable(handle))
    const isForUs = mode === 'user' || (mode === 'any' && table !== undefined && hasNoParser(table))
    if (!isForUs) await settlePartitions(handle, deadline)
    const isOurs = isForUs || isMissing(handle, table, mode)
    decide(() => `partitions of ${handle.path}: by ${isOurs ? 'BLKPG' : "the kernel's own parsers"}`)
    if (isOurs) {
      added = await addFrom(handle, table)
      await settlePartitions(handle, deadline)
    }
    return added
  } catch (error) {
    await removePresent(handle, added)
    throw error
  }
}

/**
 * Asks what a scan is going to ask. Before partscan is switched on, which cannot be taken back.
 *
 * @throws what a device throws that cannot tell its size
 */
export function assertScannable(handle: Handle): void {
  readSize(handle)
  readBlockSize(handle)
}

/**
 * Whether the kernel shows nothing of a table that has partitions, and so has to be told of them. Notes whether it has a
 * parser, and says where it has none.
 */
function isMissing(handle: Handle, table: FoundTable | undefined, mode: ScanMode): boolean {
  if (table === undefined || table.partitions.length === 0) return false
  const isShown = sysfs.readPartitions(handle.number).length > 0
  const isScanned = sysfs.isScannedSync(handle.number)
  if (table.isForKernel && isScanned) parsers.set(table.table, isShown)
  if (isShown) return false
  if (table.isForKernel && isScanned && mode === 'kernel') tellOfNoParser(handle, table, 'they are not shown')
  return mode === 'any'
}

function tellOfNoParser(handle: Handle, { table, partitions }: FoundTable, what: string): void {
  const count = partitions.length === 1 ? 'one partition' : `${partitions.length} partitions`
  handle.warnings.add(
    'no-parser',
    `this kernel has no parser for the ${table.toUpperCase()}, which has ${count}: ${what}`,
    "partscan: true or 'user' adds them with BLKPG; where another program has the kernel look again, they vanish",
  )
}

/** What the table says that was read last, in place of what was said of an earlier one. */
export function tell(handle: Handle, warnings: readonly Warning[]): void {
  handle.warnings.clear('partition-left-out', 'partition-cut', 'gpt-backup', 'table-block-size', 'no-parser')
  for (const { code, message, hint } of warnings) handle.warnings.add(code, message, hint)
}

/** Where the kernel looks for itself, a table that cannot be read is no reason to fail: we say why nothing is shown. */
async function tryToFindTable(handle: Handle): Promise<FoundTable | undefined> {
  try {
    const table = await findTableOf(handle)
    tell(handle, table?.warnings ?? [])
    return table
  } catch (error) {
    if (!LoopError.is(error, 'bad-partition-table') && !LoopError.is(error, 'io')) throw error
    const said = LoopError.is(error, 'io') ? 'the partition table cannot be read' : 'the partition table is damaged'
    tell(handle, [warning('gpt-backup', `${said}: ${error.message}`)])
    return undefined
  }
}

/** @throws `bad-partition-table`, `io` */
async function mustFindTable(handle: Handle): Promise<FoundTable | undefined> {
  const table = await findTableOf(handle)
  tell(handle, table?.warnings ?? [])
  return table
}

function toRanges(handle: Handle, table: FoundTable | undefined): Range[] {
  const blockSize = readBlockSize(handle)
  return (table?.partitions ?? []).map((entry) => {
    return { number: entry.number, start: entry.start, size: shownSize(entry, blockSize) }
  })
}

/** Adds those that are not there yet; answers which. */
async function addFrom(handle: Handle, table: FoundTable | undefined): Promise<readonly Range[]> {
  const known = sysfs.readPartitions(handle.number)
  const missing = toRanges(handle, table).filter((range) => !known.some((partition) => isSame(range, partition)))
  const isForParser = table !== undefined && table.isForKernel && table.partitions.length > 0
  if (isForParser && hasNoParser(table) && sysfs.isScannedSync(handle.number)) {
    tellOfNoParser(handle, table, 'they are added with BLKPG')
  }
  return addPartitions(handle, missing)
}

/**
 * Makes the kernel's partitions those of the table. What is in both stays untouched, and may be in use; what has only
 * grown may be in use too.
 *
 * @throws `in-use` where one that is gone from the table, or smaller there, is in use: then all is as it was
 */
export async function updatePartitions(handle: Handle, table: FoundTable | undefined): Promise<void> {
  const wanted = toRanges(handle, table)
  const known = sysfs.readPartitions(handle.number)
  const growing = known.flatMap((partition) => {
    const range = wanted.find((one) => isAtSamePlace(one, partition) && Number(one.size) > partition.size)
    return range ? [{ partition, range }] : []
  })
  const stays = (partition: sysfs.KnownPartition): boolean =>
    wanted.some((range) => isSame(range, partition)) || growing.some((one) => one.partition === partition)
  const stale = known.filter((partition) => !stays(partition))
  const missing = wanted.filter((range) => !known.some((one) => stays(one) && one.number === range.number))
  await removePartitions(handle, stale)
  try {
    for (const { partition, range } of growing) await growPartition(handle, range, partition)
    await addPartitions(handle, missing)
  } catch (error) {
    for (const { partition } of growing) await shrinkBack(handle, partition)
    await restorePartitions(handle, stale)
    throw error
  }
}
