/** What is mounted: the device or a partition of it, and the filesystem that is found there. */

import { constants } from 'node:os'
import type { Deadline } from '../common/deadline.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Handle } from '../handle/handle.ts'
import { readBlockSize, readSize } from '../handle/size.ts'
import { checkNode, devicePath } from '../kernel/devnode.ts'
import type { Bound } from '../kernel/bounded.ts'
import { close, O_RDONLY, open, readAt } from '../kernel/files.ts'
import { minorOfDevice } from '../kernel/features.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { LOOP_MAJOR } from '../kernel/uapi.ts'
import { addPartitions, type Range, removePresent } from '../partitions/blkpg.ts'
import { describeTable, type PartitionTable } from '../partitions/disk.ts'
import { settlePartitions } from '../partitions/nodes.ts'
import { findPartition, type PartitionRef } from '../partitions/ref.ts'
import { findTableIn } from '../partitions/read.ts'
import { detect, type Detected } from './detect.ts'
import { refuseUnknown } from './refused.ts'
import { PROBE_BYTES, type Signature } from './superblocks.ts'

const { ENXIO } = constants.errno

export interface Source {
  /** The node. */
  path: string
  /** `major:minor`. */
  device: string
  /** The partition that was told to the kernel for this. */
  added: readonly Range[]
}

/** Reads from the beginning of an image, a device or a partition. */
export interface Readable {
  fd: number
  path: string
  /** Where it begins, in bytes. */
  start: number
  size: number
  blockSize: number
  /** How long a read may take. */
  bound: Bound | undefined
}

/**
 * The device, or the partition of it, which is told to the kernel (BLKPG) and gets its node where it has none.
 *
 * @throws `no-such-partition`, `bad-partition-table`, `node-missing`, `permission`
 */
export async function openSource(
  handle: Handle,
  partition: PartitionRef | undefined,
  deadline: Deadline,
): Promise<Source> {
  const { number } = handle
  if (partition === undefined) {
    return {
      path: devicePath(number),
      device: sysfs.readDeviceNumbers(number) ?? `${LOOP_MAJOR}:${minorOfDevice(number)}`,
      added: [],
    }
  }
  const known = sysfs.readPartitions(number).find((one) => one.number === partition)
  if (known !== undefined && checkNode(known.path, known.device) === 0) return { ...known, added: [] }

  const table = await readTable(readableOf(handle))
  const { number: index, start, size } = findPartition(table, partition, handle.path)
  const isKnown = sysfs.readPartitions(number).some((one) => one.number === index)
  const added = isKnown
    ? []
    : await addPartitions(handle, [{ number: index, start: BigInt(start), size: BigInt(size) }])
  try {
    await settlePartitions(handle, deadline)
    const found = sysfs.readPartitions(number).find((one) => one.number === index)
    if (found === undefined) throw explain({ call: 'open', errno: -ENXIO, path: handle.path, number }, 'open device')
    return { path: found.path, device: found.device, added }
  } catch (error) {
    await removePresent(handle, added)
    throw error
  }
}

/** The whole device as something that can be read. */
export function readableOf(handle: Handle): Readable {
  const { descriptor: fd, path } = handle
  const blockSize = readBlockSize(handle)
  return { fd, path, start: 0, size: Number(readSize(handle)), blockSize, bound: handle.bound }
}

/** The partition table; undefined where there is none. */
export async function readTable(readable: Readable): Promise<PartitionTable | undefined> {
  const { fd, path, start, size, blockSize, bound } = readable
  const found = await findTableIn({ fd, path, offset: BigInt(start), size: BigInt(size), bound }, blockSize)
  return found && describeTable(found, blockSize)
}

/** What is on the source: what its beginning shows, read through its own node. */
export async function detectAt({ path, device }: Source, bound: Bound | undefined): Promise<Detected> {
  const state = checkNode(path, device)
  const fd = state < 0 ? state : await open(path, O_RDONLY, 0, bound)
  if (fd < 0) throw explain({ call: 'open', errno: fd, path, node: device }, 'open device')
  try {
    return await detectIn({ fd, path, start: 0, size: PROBE_BYTES, bound })
  } finally {
    await close(fd)
  }
}

/** What {@link detect} finds in the bytes from `start` on. */
export async function detectIn({ fd, path, start, size, bound }: Omit<Readable, 'blockSize'>): Promise<Detected> {
  const bytes = Buffer.alloc(Math.min(PROBE_BYTES, size))
  const count = await readAt(fd, bytes, bytes.length, start, bound)
  if (count < 0) throw explain({ call: 'read', errno: count, path })
  return detect(bytes.subarray(0, count))
}

/**
 * The one filesystem that was found.
 *
 * @param path for the error
 * @param readable where a partition table can be
 * @throws `unknown-filesystem`
 */
export async function chooseFilesystem(
  detected: Detected,
  path: string,
  readable: Readable | undefined,
): Promise<Filesystem> {
  const table = readable === undefined ? undefined : await findTableBeside(detected, readable)
  const chosen = filesystemBeside(detected, table)
  if (chosen !== undefined) return chosen
  throw refuseUnknown(path, countingBeside(detected, table), table && `but a partition table: ${listOf(table)}`)
}

/** What can be mounted. */
export type Filesystem = Signature & { fsType: string }

/** The one filesystem, where it is one; undefined: none, or several, or what is not mounted. */
export function filesystemBeside(detected: Detected, table: PartitionTable | undefined): Filesystem | undefined {
  const [only, second] = countingBeside(detected, table)
  const isSure = only?.strength === 'weak' || second === undefined
  return only !== undefined && only.fsType !== null && isSure ? { ...only, fsType: only.fsType } : undefined
}

/** Where there is a table, weak ones are leftovers, unless a partition holds their place: then it is a hybrid image. */
function countingBeside({ found }: Detected, table: PartitionTable | undefined): readonly Signature[] {
  return table === undefined ? found : found.filter((one) => one.strength === 'strong' || isCovered(one, table))
}

/** The partition table, where there is nothing surer than that; a damaged one does not keep a filesystem away. */
export async function findTableBeside({ found }: Detected, readable: Readable): Promise<PartitionTable | undefined> {
  if (found.some(({ strength }) => strength === 'strong')) return undefined
  return readTableIfSound(readable)
}

async function readTableIfSound(readable: Readable): Promise<PartitionTable | undefined> {
  try {
    const table = await readTable(readable)
    return table?.partitions.length === 0 ? undefined : table
  } catch (error) {
    if (LoopError.is(error, 'bad-partition-table')) return undefined
    throw error
  }
}

/** Images of CDs that can be put on a stick have a table too, of which a partition holds the CD. */
function isCovered({ fsType, places }: Signature, table: PartitionTable): boolean {
  const [place = 0] = places
  return fsType !== 'vfat' && table.partitions.some(({ start, size }) => start <= place && place < start + size)
}

/** The partitions, for a message. */
export function listOf({ partitions }: PartitionTable): string {
  if (partitions.length === 0) return 'which is empty'
  return partitions.map(({ number, label, typeName, type }) => `${number} (${label ?? typeName ?? type})`).join(', ')
}

/** @throws `replaced` where the node is that of another device by now */
export function assertNode({ path, device }: Source): void {
  const state = checkNode(path, device)
  if (state === 0) return
  throw refusal('replaced', 'open', `is not the node of ${device} any more`, { path })
}
