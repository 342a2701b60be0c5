/** The partitions of a device: what the kernel knows of them, their nodes, and those we tell the kernel about. */

import { constants } from 'node:os'
import { checkOptions, wrongValue } from './arguments.ts'
import { backoff, checkDeadline, Deadline } from './deadline.ts'
import { LoopError, refusal } from './errors.ts'
import { type Handle } from './handle.ts'
import { findHolders } from './holders.ts'
import { binding } from './kernel/binding.ts'
import { checkNode, devicePath, isDevKernels, isStaleNode, makeNode, openDevice, removeNode } from './kernel/devnode.ts'
import { close, O_EXCL, O_RDONLY, open, readAt, unlinkSync } from './kernel/files.ts'
import { isUdevRunning } from './kernel/surroundings.ts'
import * as sysfs from './kernel/sysfs.ts'
import type { KnownPartition } from './kernel/sysfs.ts'
import { decodeU64, LO_FLAGS_PARTSCAN, newInfo, newU64 } from './kernel/uapi.ts'
import { type PartitionTable, readPartitionTable, type TableEntry } from './partition-table.ts'
import { explain, type Failure } from './reasons.ts'

const { EBUSY, EEXIST, ENOENT, ENOTTY, ENXIO } = constants.errno

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
export async function listPartitions(handle: Handle): Promise<Partition[]> {
  return handle.run(async () => {
    await handle.readInfo()
    return describePartitions(handle)
  })
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
  })
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

type Range = Pick<KnownPartition, 'number' | 'start' | 'size'>

function isSame(a: Range, b: Range): boolean {
  return a.number === b.number && a.start === b.start && a.size === b.size
}

/** Of the container of logical partitions the kernel shows no more than a boot loader needs: they lie in it. */
function toRanges(table: PartitionTable | undefined, blockSize: number): Range[] {
  return (table?.partitions ?? []).map(({ number, start, size, extended }: TableEntry) => {
    return { number, start, size: extended ? Math.min(size, Math.max(1024, blockSize)) : size }
  })
}

/** Adds those of them that are not there yet, or none; answers which. */
async function addPartitions(handle: Handle, ranges: readonly Range[]): Promise<Range[]> {
  const { number, descriptor } = handle
  const added: Range[] = []
  for (const range of ranges) {
    const [start, length] = [BigInt(range.start), BigInt(range.size)]
    const answer = await binding().blkPgAddPartition(descriptor, range.number, start, length)
    if (answer >= 0) added.push(range)
    // Another process that shares the device was faster.
    else if (!sysfs.readPartitions(number).some((partition) => isSame(range, partition))) {
      await removePresent(handle, added)
      const asked = { partition: { number: range.number, start, length } }
      throw explain(handle.failure('BLKPG', answer, { asked }), 'BLKPG add')
    }
  }
  return added
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

/** Removes those of them that are there, and not in use. */
export async function removePresent({ number, descriptor }: Handle, ranges: readonly Range[]): Promise<void> {
  const partitions = sysfs.readPartitions(number).filter((one) => ranges.some((range) => isSame(range, one)))
  await removeUnused(number, descriptor, partitions)
}

/**
 * Removes all of them, and their nodes.
 *
 * @throws `in-use`, `permission`; nothing is removed then
 */
async function removePartitions(handle: Handle, partitions: readonly KnownPartition[]): Promise<void> {
  const { number, descriptor } = handle
  const removed: KnownPartition[] = []
  for (const partition of partitions) {
    const answer = await binding().blkPgDelPartition(descriptor, partition.number)
    if (answer >= 0 || answer === -ENXIO) {
      removed.push(partition)
      continue
    }
    await restorePartitions(handle, removed)
    const asked = { partition: { number: partition.number } }
    const holders = answer === -EBUSY ? await findHolders(number, [descriptor]) : undefined
    const own = holders?.filter(({ device }) => device === partition.path)
    throw explain(handle.failure('BLKPG', answer, { asked, holders: own }), 'BLKPG delete')
  }
  removeNodesOfGone(number, partitions)
}

/**
 * K3, up to 7.1: partitions of an attachment that ended otherwise than by us, with a kill, say, are removed from the
 * free device. The failure, where one of them is in use: its user would read and write the next image. While the device
 * is open exclusively nobody else attaches to it.
 */
export async function dropLeftovers(number: number): Promise<Failure | undefined> {
  if (!sysfs.hasPartitions(number) || sysfs.isBound(number)) return undefined
  const left = sysfs.readPartitions(number)
  const failure = { path: devicePath(number), number }
  const exclusive = await openDevice(number, O_RDONLY | O_EXCL)
  if (exclusive < 0) return { ...failure, call: 'open', errno: exclusive }
  try {
    if ((await binding().loopGetStatus64(exclusive, newInfo())) !== -ENXIO) return undefined
    for (const { number: index } of left) {
      const errno = await binding().blkPgDelPartition(exclusive, index)
      if (errno >= 0 || errno === -ENXIO) continue
      return { ...failure, call: 'BLKPG', errno, asked: { partition: { number: index } } }
    }
    return undefined
  } finally {
    await close(exclusive)
    removeNodesOfGone(number, left)
  }
}

/** For a detach: partitions that are in use stay. Their nodes first: another's device may get their numbers next. */
export async function removeUnused(number: number, fd: number, partitions: readonly KnownPartition[]): Promise<void> {
  for (const partition of partitions) await binding().blkPgDelPartition(fd, partition.number)
  removeNodesOfGone(number, partitions)
}

/** {@link removeUnused}, at once. */
export function removeUnusedSync(number: number, fd: number, partitions: readonly KnownPartition[]): void {
  for (const partition of partitions) binding().blkPgDelPartitionSync(fd, partition.number)
  removeNodesOfGone(number, partitions)
}

/** Adds those again that are not there any more. They get other minors, and so other nodes. */
export async function restorePartitions(handle: Handle, partitions: readonly KnownPartition[]): Promise<void> {
  const known = sysfs.readPartitions(handle.number)
  const lost = partitions.filter((partition) => !known.some((other) => other.number === partition.number))
  if (lost.length === 0) return
  await addPartitions(handle, lost)
  await settlePartitions(handle, new Deadline(1_000))
}

/** Those of partitions that are not there any more, in a /dev that the kernel does not look after. */
export function removeNodesOfGone(number: number, partitions: readonly KnownPartition[]): void {
  if (partitions.length === 0 || isDevKernels()) return
  const known = sysfs.readPartitions(number)
  for (const { path, device } of partitions) {
    if (!known.some((partition) => partition.device === device)) removeNode(path, device)
  }
}

/** How long the set has to stay the same where udev is there: its own look makes the kernel scan again (K4). */
const QUIET_MS = 50

/**
 * Waits until each partition that the kernel knows has its node, and their set is stable (K4, seen from 5.10 to 7.2).
 * Where the kernel does not look after /dev, makes the nodes.
 *
 * @throws `node-missing`, `not-a-loop-device` where there is something else at the path of a node
 */
export async function settlePartitions({ number, createNode }: Handle, deadline: Deadline): Promise<void> {
  const quiet = isUdevRunning() ? QUIET_MS : 0
  let last: string | undefined
  let since = 0
  for (let attempt = 1; ; attempt++) {
    const known = sysfs.readPartitions(number)
    const [now, seen] = [performance.now(), JSON.stringify(known)]
    if (seen !== last) [last, since] = [seen, now]
    const lacking: KnownPartition[] = []
    for (const partition of known) if (!(await hasNode(partition, createNode))) lacking.push(partition)
    const [first] = lacking
    const isSteady = first === undefined && JSON.stringify(sysfs.readPartitions(number)) === seen
    if (isSteady && now - since >= quiet) return assertOpen(known, number)
    if (await deadline.pause(backoff(attempt))) continue
    if (isSteady) return assertOpen(known, number)
    if (first === undefined) {
      throw refusal('timeout', 'open', 'the partitions come and go', { path: devicePath(number) })
    }
    throw explain({ call: 'open', errno: -ENOENT, path: first.path, number, node: first.device }, 'open device')
  }
}

/** A device cgroup lets a node be made that it then does not let be opened. The kernel's own /dev needs no proof. */
async function assertOpen(partitions: readonly KnownPartition[], number: number): Promise<void> {
  if (isDevKernels()) return
  for (const { path, device } of partitions) {
    const fd = await open(path, O_RDONLY)
    if (fd >= 0) await close(fd)
    else if (fd === -constants.errno.EPERM || fd === -constants.errno.EACCES) {
      throw explain({ call: 'open', errno: fd, path, number, node: device }, 'open device')
    }
  }
}

/** Whether the partition has its node, made here where need be. */
async function hasNode({ path, device }: KnownPartition, createNode: boolean): Promise<boolean> {
  const state = checkNode(path, device)
  if (state === 0) return true
  if (!createNode || isDevKernels()) return false
  // Minors of partitions are given out anew each time: this one is of a partition that was there before.
  if (state === -ENOTTY && isStaleNode(path)) unlinkSync(path)
  const made = await makeNode(path, device)
  if (made >= 0 || (made === -EEXIST && checkNode(path, device) === 0)) return true
  if (made !== -EEXIST) throw explain({ call: 'mknod', errno: made, path, node: device }, 'make node')
  throw explain({ call: 'open', errno: -ENOTTY, path, node: device }, 'open device')
}
