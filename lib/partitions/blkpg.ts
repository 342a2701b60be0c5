/** Partitions added to and removed from the kernel's list with BLKPG. */

import { constants } from 'node:os'
import { Deadline } from '../common/deadline.ts'
import type { Failure } from '../errors/causes.ts'
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
import { removeNodesOfGone, settlePartitions } from './nodes.ts'

const { EBUSY, ENXIO } = constants.errno

export type Range = Pick<KnownPartition, 'number' | 'start' | 'size'>

export function isSame(a: Range, b: Range): boolean {
  return a.number === b.number && a.start === b.start && a.size === b.size
}

/** Adds those of them that are not there yet, or none; answers which. */
export async function addPartitions(handle: Handle, ranges: readonly Range[]): Promise<Range[]> {
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
export async function removePartitions(handle: Handle, partitions: readonly KnownPartition[]): Promise<void> {
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
  await addPartitions(handle, lost)
  await settlePartitions(handle, new Deadline(1_000))
}
