/** The partitions of a device: what the kernel knows of them, what the table says, and looking again. */

import { constants } from 'node:os'
import { checkOptions, wrongValue } from '../common/arguments.ts'
import { backoff, checkDeadline, checkWait, type Deadline, LOOKING, type Wait } from '../common/deadline.ts'
import { LoopError } from '../errors/errors.ts'
import { findHolders } from '../errors/holders.ts'
import type { Handle } from '../handle/handle.ts'
import { readMounts } from '../kernel/mountinfo.ts'
import * as sysfs from '../kernel/sysfs.ts'
import type { KnownPartition } from '../kernel/sysfs.ts'
import { LO_FLAGS_PARTSCAN } from '../kernel/uapi.ts'
import type { FoundTable } from './disk.ts'
import { settlePartitions } from './nodes.ts'
import { findTableOf } from './read.ts'
import { hasNoParser, showPartitions, tell, updatePartitions } from './scan.ts'

const { EBUSY } = constants.errno

/** A partition of an attached device; plain data. */
export interface Partition extends KnownPartition {
  /** From here on: what the partition table says about it. Absent if the table says nothing. */
  table?: 'gpt' | 'mbr'
  /** GPT: the GUID, upper case. MBR: two hexadecimal digits or one, `83`, `c`. */
  type?: string
  /** The name that sfdisk has for the type, if it is a common type. */
  typeName?: string
  /** GPT only. */
  label?: string
  /** GPT: the GUID of the partition, upper case. MBR: `1a2b3c4d-01`. */
  uuid?: string
  /** GPT: for a legacy BIOS. MBR: active. */
  bootable?: boolean
}

export interface RescanOptions extends Wait {
  /**
   * `'kernel'`: BLKRRPART, with the kernel's own parsers. `'user'`: loopctl reads the table (GPT or MBR) and adds the
   * partitions with BLKPG. Default: BLKRRPART; but BLKPG if a partition is mounted, the kernel has no parser for the
   * table, or the device has no `LO_FLAGS_PARTSCAN`.
   */
  mode?: 'kernel' | 'user' | undefined
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
  const table = await findTableFor(handle, known)
  for (const { code, message, hint } of table?.warnings ?? []) handle.warnings.add(code, message, hint)
  return known.map((partition) => {
    const entry = table?.partitions.find(
      (other) => other.number === partition.number && Number(other.start) === partition.start,
    )
    if (entry === undefined) return partition
    const { table: kind, type, typeName, label, uuid, bootable } = entry
    return {
      ...partition,
      table: kind,
      type,
      ...(typeName !== undefined && { typeName }),
      ...(label !== undefined && { label }),
      ...(uuid !== undefined && { uuid }),
      bootable,
    }
  })
}

/** A table that cannot be read says nothing of partitions that the kernel has all the same. */
async function findTableFor(handle: Handle, known: KnownPartition[]): Promise<FoundTable | undefined> {
  try {
    return await findTableOf(handle)
  } catch (error) {
    if (known.length > 0 && LoopError.is(error, 'bad-partition-table')) return undefined
    throw error
  }
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
    const isScanned = (info.flags & LO_FLAGS_PARTSCAN) !== 0
    if (mode === 'user' || (mode === undefined && !isScanned)) await scanHere(handle)
    else if (mode === 'kernel') await scanInKernel(handle, deadline)
    else await scanAnyhow(handle, deadline)
    if (mode !== 'user' && isScanned) await showPartitions(handle, mode ?? 'any', deadline)
    await settlePartitions(handle, deadline)
    return describePartitions(handle)
  }, deadline)
}

/**
 * BLKRRPART drops all partitions and adds those that the kernel finds: not where it is known to find none, nor where one
 * of them is mounted.
 */
async function scanAnyhow(handle: Handle, deadline: Deadline): Promise<void> {
  if ((await isMounted(handle)) || (await isWithoutParser(handle))) await scanHere(handle)
  else await scanInKernel(handle, deadline)
}

async function isMounted({ number }: Handle): Promise<boolean> {
  const devices = new Set(sysfs.readPartitions(number).map(({ device }) => device))
  if (devices.size === 0) return false
  const mounts = await readMounts()
  return typeof mounts !== 'number' && mounts.some(({ device }) => devices.has(device))
}

async function isWithoutParser(handle: Handle): Promise<boolean> {
  try {
    const table = await findTableOf(handle)
    return table !== undefined && hasNoParser(table)
  } catch {
    return false
  }
}

/** BLKRRPART; a udev probe that has the device, or a partition, is waited for. */
async function scanInKernel(handle: Handle, deadline: Deadline): Promise<void> {
  for (let attempt = 1; ; attempt++) {
    const answer = await handle.calls.blkRrPart(handle.descriptor)
    if (answer >= 0) return
    if (answer === -EBUSY && (await deadline.pause(backoff(attempt)))) continue
    const { info: status } = await handle.readInfo()
    const holders = answer === -EBUSY ? await findHolders(handle.number, [handle.descriptor]) : undefined
    throw handle.explain('BLKRRPART', answer, { status, holders })
  }
}

/** What another program wrote into the backing file is not in the cache of the device: BLKRRPART empties it too. */
async function scanHere(handle: Handle): Promise<void> {
  const answer = await handle.calls.blkFlsBuf(handle.descriptor)
  if (answer < 0) throw handle.explain('BLKFLSBUF', answer)
  const table = await findTableOf(handle)
  tell(handle, table?.warnings ?? [])
  await updatePartitions(handle, table)
}
