/** One attached device: what it is set to, and setting it. */

import { constants } from 'node:os'
import {
  type Bytes,
  checkBlockSize,
  checkBoolean,
  checkBytes,
  checkObject,
  checkOptions,
  checkReference,
  wrongValue,
} from './arguments.ts'
import { backoff, Deadline } from './deadline.ts'
import { type Handle } from './handle.ts'
import { findHolders } from './holders.ts'
import { binding } from './kernel/binding.ts'
import { openDevice } from './kernel/devnode.ts'
import { minorOfDevice } from './kernel/features.ts'
import { close, fsync, O_EXCL, O_RDONLY, O_RDWR } from './kernel/files.ts'
import { Sequence } from './kernel/sequence.ts'
import * as sysfs from './kernel/sysfs.ts'
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
  patchInfo,
} from './kernel/uapi.ts'
import { describeBackingFile, type LoopInfo, requireInfo } from './list.ts'
import { findSwappableLower } from './stack.ts'

const { EAGAIN, EBUSY, EPERM } = constants.errno

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
}

/** What to change; whatever is not named keeps every bit. */
export interface StatusChange {
  /** Bytes. */
  offset?: Bytes | undefined
  /** Bytes; 0: to the end of the file. */
  sizeLimit?: Bytes | undefined
  autoclear?: boolean | undefined
  /** It can be switched on only; the kernel keeps it until the device is detached. */
  partscan?: true | undefined
  /** At most 63 bytes. */
  reference?: string | undefined
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
    }
  })
}

/** Without `lower`. */
type Read = LoopInfo & { loop: LoopInfo64 }

/** In one hop to a thread: all that sysfs has, but for the path, can be asked of the open device too. */
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

/** LOOP_GET_STATUS64, the named fields changed, LOOP_SET_STATUS64. */
export async function setStatus(handle: Handle, change: StatusChange): Promise<void> {
  const given = checkOptions(checkObject('change', change), [
    'offset',
    'sizeLimit',
    'autoclear',
    'partscan',
    'reference',
  ])
  const offset = given.offset === undefined ? undefined : checkBytes('offset', given.offset)
  const sizeLimit = given.sizeLimit === undefined ? undefined : checkBytes('sizeLimit', given.sizeLimit)
  const fileName = given.reference === undefined ? undefined : checkReference(given.reference)
  const autoclear = given.autoclear === undefined ? undefined : checkBoolean('autoclear', given.autoclear)
  if (given.partscan !== undefined && !checkBoolean('partscan', given.partscan)) {
    throw wrongValue('partscan', 'can be switched on only: the kernel keeps it until the device is detached')
  }
  return handle.run(async () => {
    const { bytes, info } = await handle.readInfo()
    let { flags } = info
    if (autoclear !== undefined) flags = autoclear ? flags | LO_FLAGS_AUTOCLEAR : flags & ~LO_FLAGS_AUTOCLEAR
    if (given.partscan) flags |= LO_FLAGS_PARTSCAN
    patchInfo(bytes, {
      flags,
      ...(offset !== undefined && { offset }),
      ...(sizeLimit !== undefined && { sizeLimit }),
      ...(fileName !== undefined && { fileName }),
    })
    const answer = await handle.changeIdentity({ ...info, offset: offset ?? info.offset }, () =>
      retryDirty(handle, async () => {
        handle.assertOpen()
        return handle.write('loopSetStatus64', bytes)
      }),
    )
    if (answer < 0) throw handle.explain('LOOP_SET_STATUS64', answer)
    await handle.renewDetach()
  })
}

/** LOOP_SET_CAPACITY, after the backing file grew or shrank. Partitions are not looked at again. */
export async function refreshCapacity(handle: Handle): Promise<number> {
  return handle.run(async () => {
    await handle.readInfo()
    const answer = await handle.write('loopSetCapacity')
    if (answer < 0) throw handle.explain('LOOP_SET_CAPACITY', answer)
    return Number(readSize(handle))
  })
}

/** LOOP_SET_DIRECT_IO. */
export async function setDirectIO(handle: Handle, enabled: boolean): Promise<void> {
  checkBoolean('enabled', enabled)
  return handle.run(async () => {
    await handle.readInfo()
    const answer = await handle.write('loopSetDirectIo', enabled ? 1 : 0)
    if (answer < 0) throw handle.explain('LOOP_SET_DIRECT_IO', answer)
  })
}

/**
 * LOOP_SET_BLOCK_SIZE, with the device held exclusively: kernels up to 6.16 (K11) change it under a mounted
 * filesystem.
 */
export async function setBlockSize(handle: Handle, bytes: number): Promise<void> {
  checkBlockSize('bytes', bytes, 65_536)
  return handle.run(async () => {
    await handle.readInfo()
    const refused = await setBlockSizeExclusively(handle, O_RDONLY, bytes)
    if (refused < 0) await setBlockSizeExclusively(handle, O_RDWR, bytes)
  })
}

/** 0, or -EPERM for a read-only descriptor: then a writable one may do. Every other failure is thrown. */
async function setBlockSizeExclusively(handle: Handle, access: number, bytes: number): Promise<number> {
  const fd = await openDevice(handle.number, access | O_EXCL)
  if (fd === -EBUSY) {
    const holders = await findHolders(handle.number, [handle.descriptor])
    throw handle.explain('open', fd, { holders })
  }
  if (fd < 0) throw handle.explain('open', fd)
  try {
    const answer = await retryDirty(handle, () => binding().loopSetBlockSize(fd, bytes))
    if (answer < 0 && !(answer === -EPERM && access === O_RDONLY)) {
      throw handle.explain('LOOP_SET_BLOCK_SIZE', answer, { asked: { blockSize: bytes } })
    }
    return answer
  } finally {
    await close(fd)
  }
}

/**
 * Up to 5.17 the kernel answers EAGAIN while the page cache of the device is not empty, which another reader (udev,
 * mostly) can cause at any moment.
 */
async function retryDirty(handle: Handle, call: () => Promise<number>): Promise<number> {
  const deadline = new Deadline(5_000)
  for (let attempt = 1; ; attempt++) {
    const answer = await call()
    if (answer !== -EAGAIN || !(await deadline.pause(backoff(attempt)))) return answer
    await binding().blkFlsBuf(handle.descriptor)
  }
}

/** What is written to the device is in the backing file, and that on its medium. */
export async function flush(handle: Handle): Promise<void> {
  return handle.run(async () => {
    const answer = await fsync(handle.descriptor)
    if (answer < 0) throw handle.explain('fsync', answer)
  })
}

/** BLKGETSIZE64. */
export function readSize(handle: Handle): bigint {
  const bytes = newU64()
  const answer = binding().blkGetSize64Sync(handle.descriptor, bytes)
  if (answer < 0) throw handle.explain('BLKGETSIZE64', answer)
  return decodeU64(bytes)
}
