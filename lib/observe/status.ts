/** One attached device: what it is set to, and setting it. */

import type { Handle } from '../handle/handle.ts'
import type { Warning } from '../common/warnings.ts'
import { findSwappableLower } from '../handle/lower.ts'
import { minorOfDevice } from '../kernel/features.ts'
import { Sequence } from '../kernel/sequence.ts'
import * as sysfs from '../kernel/sysfs.ts'
import {
  decodeInfo,
  decodeU64,
  formatDevice,
  LO_FLAGS_AUTOCLEAR,
  LO_FLAGS_DIRECT_IO,
  LO_FLAGS_PARTSCAN,
  LOOP_MAJOR,
  type LoopInfo64,
  newInfo,
  newU64,
} from '../kernel/uapi.ts'
import { describeBackingFile, type LoopInfo, requireInfo } from './list.ts'

/** A {@link LoopInfo}, and what only LOOP_GET_STATUS64 knows. */
export interface LoopStatus extends LoopInfo {
  /** `lo_file_name`: the tag given by whoever attached it; losetup writes the path there. */
  reference: string
  /** `major:minor` of the filesystem that has the backing file. */
  backingDevice: string
  /** Inode of the backing file, decimal: it can be beyond what a number holds. */
  backingInode: string
  /** The upper device of a stack: see `swappable` of attach. */
  swappable: boolean
  /** What was found odd about the device by the handle that was asked: see {@link Warning}. */
  warnings: readonly Warning[]
}

/** @throws `not-attached`, `replaced` */
export async function readStatus(handle: Handle): Promise<LoopStatus> {
  return handle.run(async () => {
    const { loop, ...info } = (await readAtOnce(handle)) ?? (await readApart(handle))
    const lower = handle.lowerNumber
    return {
      ...info,
      ...(lower !== undefined && { lower }),
      reference: loop.fileName,
      backingDevice: formatDevice(loop.device),
      backingInode: loop.inode.toString(),
      swappable: (await findSwappableLower(handle)) !== undefined,
      warnings: handle.warnings.list,
    }
  })
}

/** Without `lower`. */
type Read = LoopInfo & { loop: LoopInfo64 }

/** In one hop to the pool: all that sysfs has, but for the path, can be asked of the open device too. */
async function readAtOnce(handle: Handle): Promise<Read | undefined> {
  const { number, descriptor, expected } = handle
  if (expected === undefined) return undefined
  const [bytes, size, path] = [newInfo(), newU64(), sysfs.newAttribute()]
  const sequence = new Sequence()
  sequence.call('loopGetStatus64', descriptor, bytes)
  sequence.call('blkGetSize64', descriptor, size)
  const blockSize = sequence.call('blkSszGet', descriptor)
  const readOnly = sequence.call('blkRoGet', descriptor)
  const length = sequence.try('sysfsBackingFile', number, path)
  // Last: then all of it was of this attachment.
  const diskSeq = sequence.expect(expected.diskSeq, 'blkGetDiskSeq', descriptor)
  await sequence.run()
  const text = sysfs.decodeBackingFile(path, length.answer)
  if (diskSeq.answer !== expected.diskSeq || typeof text !== 'string') return undefined
  const loop = decodeInfo(bytes)
  const has = (flag: number): boolean => (loop.flags & flag) !== 0
  return {
    loop,
    number,
    path: handle.path,
    device: `${LOOP_MAJOR}:${minorOfDevice(number)}`,
    diskSeq: expected.diskSeq,
    attached: true,
    ...(await describeBackingFile(text)),
    offset: Number(loop.offset),
    sizeLimit: Number(loop.sizeLimit),
    size: Number(decodeU64(size)),
    blockSize: blockSize.answer ?? 0,
    readOnly: readOnly.answer === 1,
    autoclear: has(LO_FLAGS_AUTOCLEAR),
    partscan: has(LO_FLAGS_PARTSCAN),
    directIO: has(LO_FLAGS_DIRECT_IO),
  }
}

/** Where there is no telling one attachment from another by the disk sequence number; and for the errors. */
async function readApart(handle: Handle): Promise<Read> {
  const { info: loop } = await handle.readInfo()
  const { lower: _, ...info } = await requireInfo(handle.number)
  return { loop, ...info }
}
