/** Partitions added to and removed from the kernel's list with BLKPG. */

import { constants } from 'node:os'
import { Deadline } from '../common/deadline.ts'
import type { Failure } from '../errors/causes.ts'
import { partitionFault } from '../errors/evidence.ts'
import { explain } from '../errors/explain.ts'
import { findHolders } from '../errors/holders.ts'
import type { Handle } from '../handle/handle.ts'
import { binding } from '../kernel/binding.ts'
import { GivenUp } from '../kernel/bounded.ts'
import { devicePath, openDevice } from '../kernel/devnode.ts'
import { close, O_EXCL, O_RDONLY } from '../kernel/files.ts'
import { Sequence } from '../kernel/sequence.ts'
import * as sysfs from '../kernel/sysfs.ts'
import type { KnownPartition } from '../kernel/sysfs.ts'
import { newInfo } from '../kernel/uapi.ts'
import { formatBytes, MAX_NUMBER } from './disk.ts'
import { removeNodesOfGone, settlePartitions } from './nodes.ts'

const { EBUSY, EINVAL, ENXIO } = constants.errno

/** A partition as BLKPG takes it: its number, and its place in bytes. */
export interface Range {
  number: number
  start: bigint
  size: bigint
}

export function isSame(range: Range, known: KnownPartition): boolean {
  return isAtSamePlace(range, known) && Number(range.size) === known.size
}

export function isAtSamePlace(range: Range, known: KnownPartition): boolean {
  return range.number === known.number && Number(range.start) === known.start
}

function rangeOf({ number, start, size }: KnownPartition): Range {
  return { number, start: BigInt(start), size: BigInt(size) }
}

/**
 * Adds those of them that are not there yet; answers which. One that the kernel does not take, because it overlaps with
 * another or is not aligned to the blocks of the device, is left out with a warning.
 *
 * @throws `permission`, `device-exists` where another partition has the number, `no-such-device`; none is added then
 */
export async function addPartitions(handle: Handle, ranges: readonly Range[]): Promise<Range[]> {
  const { number, descriptor } = handle
  const possible = leaveOutBeyond(handle, ranges)
  const added: Range[] = []
  for (const range of possible) {
    const answer = await handle.calls.blkPgAddPartition(descriptor, range.number, range.start, range.size)
    if (answer >= 0) {
      added.push(range)
      continue
    }
    const known = sysfs.readPartitions(number)
    // Another process that shares the device was faster.
    if (known.some((partition) => isSame(range, partition))) continue
    const failure = failureOf(handle, range, answer)
    const problem = whyNotTaken(range, known, failure)
    if (problem === undefined) {
      await removePresent(handle, added)
      throw explain(failure, 'BLKPG add')
    }
    handle.warnings.add('partition-left-out', `partition ${range.number} ${problem}; it is left out`, ALONE)
  }
  return added
}

const ALONE = 'it can be attached by itself, with the option partition'

function leaveOutBeyond(handle: Handle, ranges: readonly Range[]): readonly Range[] {
  const beyond = ranges.filter(({ number }) => number > MAX_NUMBER)
  const [first] = beyond
  if (first === undefined) return ranges
  const message = `${beyond.length} partitions from number ${first.number} on are left out: the kernel has none beyond ${MAX_NUMBER}`
  handle.warnings.add('partition-left-out', message, ALONE)
  return ranges.filter(({ number }) => number <= MAX_NUMBER)
}

function failureOf(handle: Handle, { number, start, size }: Range, errno: number): Failure {
  return handle.failure('BLKPG', errno, { asked: { partition: { number, start, length: size } } })
}

/** What is wrong with this one partition; undefined where it is something else. */
function whyNotTaken(range: Range, known: readonly KnownPartition[], failure: Failure): string | undefined {
  if (failure.errno === -EINVAL) return `cannot be: ${partitionFault(failure) ?? 'the kernel does not take it'}`
  if (failure.errno !== -EBUSY || known.some(({ number }) => number === range.number)) return undefined
  const [start, end] = [Number(range.start), Number(range.start + range.size)]
  const other = known.find((one) => one.start < end && start < one.start + one.size)
  if (other === undefined) return undefined
  const bytes = Math.min(end, other.start + other.size) - Math.max(start, other.start)
  return `overlaps with partition ${other.number} by ${formatBytes(BigInt(bytes))}, which only the kernel's own parser allows`
}

/** A partition that is in use can grow so: BLKPG_RESIZE_PARTITION. Its node stays, and so does whoever has it open. */
export async function growPartition(handle: Handle, range: Range, from: KnownPartition): Promise<void> {
  const answer = await handle.calls.blkPgResizePartition(handle.descriptor, range.number, range.start, range.size)
  if (answer >= 0) return
  const failure = failureOf(handle, range, answer)
  if (answer !== -EBUSY && answer !== -EINVAL) throw explain(failure, 'BLKPG resize')
  const others = sysfs.readPartitions(handle.number).filter(({ number }) => number !== range.number)
  const problem = whyNotTaken(range, others, failure) ?? 'is not taken by the kernel as large as the table has it'
  handle.warnings.add(
    'partition-cut',
    `partition ${range.number} ${problem}; it stays at ${formatBytes(BigInt(from.size))}`,
  )
}

/** Back to what it was; by somebody who has just made it larger. */
export async function shrinkBack({ descriptor }: Handle, known: KnownPartition): Promise<void> {
  const { number, start, size } = rangeOf(known)
  await binding().blkPgResizePartition(descriptor, number, start, size)
}

/** Removes those of them that are there, and not in use. */
export async function removePresent({ number, descriptor }: Handle, ranges: readonly Range[]): Promise<void> {
  const partitions = sysfs.readPartitions(number).filter((one) => ranges.some((range) => isSame(range, one)))
  await removeUnused(number, descriptor, partitions)
}

/** Removes all that nobody uses; their nodes first. */
export async function removeAllUnused({ number, descriptor }: Handle): Promise<void> {
  await removeUnused(number, descriptor, sysfs.readPartitions(number))
}

/**
 * Removes all of them, and their nodes.
 *
 * @throws `in-use`, `permission`; nothing is removed then
 */
export async function removePartitions(handle: Handle, partitions: readonly KnownPartition[]): Promise<void> {
  const { number, descriptor } = handle
  const removed: KnownPartition[] = []
  for (const partition of partitions) {
    const answer = await handle.calls.blkPgDelPartition(descriptor, partition.number)
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
 * free device, with their nodes. The failure, where one of them is in use: its user would read and write the next image.
 * While the device is open exclusively nobody else attaches to it.
 *
 * @param left what there was before the device was opened: at an open the kernel can look for partitions, and forget these
 */
export async function dropLeftovers(number: number, left: readonly KnownPartition[]): Promise<Failure | undefined> {
  if (left.length === 0 || sysfs.isBound(number)) return undefined
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

/** {@link removeUnused}, for an exit handler: within that time, as far as the kernel lets it. */
export function removeUnusedSync(
  { number, descriptor }: Handle,
  partitions: readonly KnownPartition[],
  ms: number,
): void {
  if (partitions.length === 0) return
  const sequence = new Sequence()
  for (const partition of partitions) sequence.try('blkPgDelPartition', descriptor, partition.number)
  try {
    sequence.runWithinSync(ms, number)
  } catch (error) {
    if (!(error instanceof GivenUp)) throw error
  }
  removeNodesOfGone(number, partitions)
}

/** Adds those again that are not there any more. They get other minors, and so other nodes. */
export async function restorePartitions(handle: Handle, partitions: readonly KnownPartition[]): Promise<void> {
  const known = sysfs.readPartitions(handle.number)
  const lost = partitions.filter((partition) => !known.some((other) => other.number === partition.number))
  if (lost.length === 0) return
  await addPartitions(handle, lost.map(rangeOf))
  await settlePartitions(handle, new Deadline(1_000))
}
