/** The partitions of a device: what the kernel knows of them, their nodes, and those we tell the kernel about. */

import { constants } from 'node:os'
import { checkOptions, wrongValue } from '../common/arguments.ts'
import { backoff, checkDeadline, Deadline, checkWait, LOOKING, type Wait } from '../common/deadline.ts'
import { LoopError } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { findHolders } from '../errors/holders.ts'
import type { Handle } from '../handle/handle.ts'
import { binding } from '../kernel/binding.ts'
import { readAt } from '../kernel/files.ts'
import * as sysfs from '../kernel/sysfs.ts'
import type { KnownPartition } from '../kernel/sysfs.ts'
import { decodeU64, LO_FLAGS_PARTSCAN, newU64 } from '../kernel/uapi.ts'
import { addPartitions, isSame, type Range, removePartitions, restorePartitions } from './blkpg.ts'
import type { PartitionTable, TableEntry } from './disk.ts'
import { settlePartitions } from './nodes.ts'
import { readPartitionTable } from './table.ts'

const { EBUSY } = constants.errno

/** A partition of an attached device; plain data. */
export interface Partition extends KnownPartition {
  /** From here on: what the partition table says of it. Absent where there is none that does. */
  table?: 'gpt' | 'mbr'
  /** GPT: the GUID, upper case. MBR: two hexadecimal digits or one, `83`, `c`. */
  type?: string
  /** What sfdisk calls the type, where it is a common one. */
  typeName?: string
  /** GPT only. */
  label?: string
  /** GPT: the GUID of the partition, upper case. MBR: `1a2b3c4d-01`. */
  uuid?: string
  /** GPT: for a legacy BIOS. MBR: active. */
  bootable?: boolean
}

export interface RescanOptions {
  /**
   * `'kernel'`: BLKRRPART. `'user'`: the table is read here, GPT or MBR, and the kernel told with BLKPG: for kernels
   * without a parser for the table. Default: `'kernel'` where the device was attached with `partscan: true`.
   */
  mode?: 'kernel' | 'user' | undefined
  /** Milliseconds to wait for what passes by itself; 0: one try. Default 5 000. */
  timeout?: number | undefined
  /** Gives up and rejects with the signal's reason. */
  signal?: AbortSignal | undefined
}

/** What the kernel knows, with what the table on the device says of it. */
export async function listPartitions(handle: Handle, options?: Wait): Promise<Partition[]> {
  const deadline = checkWait(options, LOOKING)
  return handle.run(async () => {
    await handle.readInfo()
    return describePartitions(handle)
  }, deadline)
}

async function describePartitions(handle: Handle): Promise<Partition[]> {
  const known = sysfs.readPartitions(handle.number)
  const table = await readTableFor(handle, known)
  return known.map((partition) => {
    const entry = table?.partitions.find(
      (other) => other.number === partition.number && other.start === partition.start,
    )
    if (table === undefined || entry === undefined) return partition
    const { type, typeName, label, uuid } = entry
    return {
      ...partition,
      table: table.kind,
      type,
      ...(typeName !== undefined && { typeName }),
      ...(label !== undefined && { label }),
      ...(uuid !== undefined && { uuid }),
      bootable: entry.bootable ?? false,
    }
  })
}

/** A table that is refused here says nothing of partitions that the kernel has all the same. */
async function readTableFor(handle: Handle, known: KnownPartition[]): Promise<PartitionTable | undefined> {
  try {
    return await readTable(handle)
  } catch (error) {
    if (known.length > 0 && LoopError.is(error, 'bad-partition-table')) return undefined
    throw error
  }
}

/** @throws `bad-partition-table`, `io` */
async function readTable(handle: Handle): Promise<PartitionTable | undefined> {
  const { descriptor, path } = handle
  const size = newU64()
  const answer = binding().blkGetSize64Sync(descriptor, size)
  if (answer < 0) throw explain({ call: 'BLKGETSIZE64', errno: answer, path, fd: descriptor })
  const read = async (position: number, length: number): Promise<Uint8Array> => {
    const bytes = new Uint8Array(length)
    const count = await readAt(descriptor, bytes, length, position)
    if (count < 0) throw explain({ call: 'read', errno: count, path })
    return bytes.subarray(0, count)
  }
  const table = await readPartitionTable(read, Number(decodeU64(size)), binding().blkSszGetSync(descriptor), path)
  if (table?.usedBackup) warn(handle, table.warnings)
  return table
}

const warned = new WeakMap<Handle, string>()

/** Once for each handle: nobody else says that the table at the beginning is damaged. */
function warn(handle: Handle, warnings: string[]): void {
  const text = `${handle.path}: ${warnings.join('; ')}`
  if (warned.get(handle) === text) return
  warned.set(handle, text)
  process.emitWarning(`the backup of the GPT is used: ${text}`, { type: 'LoopctlWarning', code: 'LOOPCTL_BACKUP_GPT' })
}

/** Looks for partitions again, and resolves to them when each has a node and their set is stable. */
export async function rescanPartitions(handle: Handle, options?: RescanOptions): Promise<Partition[]> {
  const given = checkOptions(options, ['mode', 'timeout', 'signal'])
  const { mode } = given
  if (mode !== undefined && mode !== 'kernel' && mode !== 'user') {
    throw wrongValue('mode', "must be 'kernel' or 'user'")
  }
  const deadline = checkDeadline(given, 5_000)
  return handle.run(async () => {
    deadline.throwIfAborted()
    const { info } = await handle.readInfo()
    const byKernel = (info.flags & LO_FLAGS_PARTSCAN) !== 0
    if ((mode ?? (byKernel ? 'kernel' : 'user')) === 'kernel') await scanInKernel(handle, deadline)
    else await scanAgain(handle)
    await settlePartitions(handle, deadline)
    return describePartitions(handle)
  }, deadline)
}

/** BLKRRPART; a udev probe that has the device, or a partition, is waited for. */
async function scanInKernel(handle: Handle, deadline: Deadline): Promise<void> {
  for (let attempt = 1; ; attempt++) {
    const answer = await binding().blkRrPart(handle.descriptor)
    if (answer >= 0) return
    if (answer === -EBUSY && (await deadline.pause(backoff(attempt)))) continue
    const { info: status } = await handle.readInfo()
    const holders = answer === -EBUSY ? await findHolders(handle.number, [handle.descriptor]) : undefined
    throw handle.explain('BLKRRPART', answer, { status, holders })
  }
}

/** What another program wrote into the backing file is not in the cache of the device: BLKRRPART empties it too. */
async function scanAgain(handle: Handle): Promise<void> {
  const answer = await binding().blkFlsBuf(handle.descriptor)
  if (answer < 0) throw handle.explain('BLKFLSBUF', answer)
  await scanHere(handle, await readTable(handle))
}

/** Makes the kernel's partitions those of the table. What is in both stays untouched, and may be in use. */
async function scanHere(handle: Handle, table: PartitionTable | undefined): Promise<void> {
  const { number, descriptor } = handle
  const wanted = toRanges(table, binding().blkSszGetSync(descriptor))
  const known = sysfs.readPartitions(number)
  const stale = known.filter((partition) => !wanted.some((range) => isSame(range, partition)))
  const missing = wanted.filter((range) => !known.some((partition) => isSame(range, partition)))
  await removePartitions(handle, stale)
  try {
    await addPartitions(handle, missing)
  } catch (error) {
    await restorePartitions(handle, stale)
    throw error
  }
}

/** Of the container of logical partitions the kernel shows no more than a boot loader needs: they lie in it. */
function toRanges(table: PartitionTable | undefined, blockSize: number): Range[] {
  return (table?.partitions ?? []).map(({ number, start, size, extended }: TableEntry) => {
    return { number, start, size: extended ? Math.min(size, Math.max(1024, blockSize)) : size }
  })
}

/**
 * Reads the partition table and adds its partitions with BLKPG: for kernels without a parser of the table, or without
 * partition scan. The PARTSCAN flag is not needed, and would drop them at the next rescan. Answers those that were not
 * there before.
 *
 * @throws `bad-partition-table`, `permission`
 */
export async function addFromTable(handle: Handle): Promise<readonly Range[]> {
  const known = sysfs.readPartitions(handle.number)
  const wanted = toRanges(await readTable(handle), binding().blkSszGetSync(handle.descriptor))
  const missing = wanted.filter((range) => !known.some((partition) => isSame(range, partition)))
  return addPartitions(handle, missing)
}
