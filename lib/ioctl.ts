/**
 * The loop driver's ioctls as functions. They take descriptors, and their arguments and results are the kernel's;
 * 64-bit fields are bigint. If the kernel refuses a call, they fail with a LoopError. They do not retry, wait or undo:
 * use `loopctl` for that.
 *
 * Each function exists twice: one returns a promise (the call runs on a thread of the addon), and `...Sync` is
 * synchronous. All of them refuse a descriptor that does not belong to a whole loop device, with reason
 * `not-a-loop-device` (LOOP_CLR_FD on a partition would detach the whole device), and a descriptor that is not open,
 * with `closed`.
 */

import {
  checkBlockSize,
  checkBoolean,
  checkDescriptor,
  checkInteger,
  checkObject,
  checkOptions,
  checkReference,
  checkU64,
} from './common/arguments.ts'
import type { Failure, Role } from './errors/causes.ts'
import { assertSupported } from './errors/errors.ts'
import type { Asked } from './errors/evidence.ts'
import { diagnose, explain } from './errors/explain.ts'
import { fromCaller } from './errors/from-caller.ts'
import { binding, type CallName } from './kernel/binding.ts'
import { pageSize } from './kernel/features.ts'
import { pathOfDescriptor } from './kernel/process.ts'
import {
  decodeInfo,
  decodeU64,
  encodeConfig,
  LOOP_NUMBER_MAX,
  type LoopInfo64,
  newInfo,
  newU64,
  patchInfo,
} from './kernel/uapi.ts'

export { LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO, LO_FLAGS_PARTSCAN, LO_FLAGS_READ_ONLY } from './kernel/uapi.ts'

export { type LoopInfo64 } from './kernel/uapi.ts'

/** struct loop_config. */
export interface LoopConfig {
  /** The backing file's descriptor. */
  fd: number
  /** Logical block size, a power of two from 512 to the page size. Default: the kernel's choice. */
  blockSize?: number | undefined
  /** Fields that you leave out are 0. */
  info?: Partial<LoopInfo64> | undefined
}

/** Where a partition lies in the device, in bytes; `number` from 1. */
export interface PartitionRange {
  number: number
  start: bigint
  length: bigint
}

interface Spec<Values extends unknown[], Result> {
  /** The request's name, for errors. */
  ioctl: string
  name: CallName
  /** Checks the arguments, and makes those of the native call of them. */
  encode: (...values: Values) => [fd: number, ...unknown[]]
  /** Makes the result of the kernel's answer and of what it wrote into the encoded arguments. */
  decode: (answer: number, encoded: unknown[]) => Result
  /** For the diagnosis. */
  known?: (...values: Values) => Pick<Failure, 'backingFd' | 'number' | 'asked'>
  role?: Role
}

/** As a promise, and at once. */
interface Pair<Values extends unknown[], Result> {
  promised: (...values: Values) => Promise<Result>
  immediate: (...values: Values) => Result
}

function ioctl<Values extends unknown[], Result>(spec: Spec<Values, Result>): Pair<Values, Result> {
  const failureOf = (errno: number, fd: number, values: Values): Failure => {
    const known = spec.known?.(...values) ?? {}
    const backingFile = known.backingFd === undefined ? undefined : pathOfDescriptor(known.backingFd)
    const path = pathOfDescriptor(fd)
    return { call: spec.ioctl, errno, path, number: numberOfPath(path), fd, backingFile, ...known }
  }
  const nameSync = `${spec.name}Sync` as const
  const promised = async (values: Values): Promise<Result> => {
    const encoded = spec.encode(...values)
    assertSupported()
    const call = binding()[spec.name] as (...native: unknown[]) => Promise<number>
    const answer = await call(...encoded)
    if (answer >= 0) return spec.decode(answer, encoded)
    throw await diagnose(failureOf(answer, encoded[0], values), spec.role)
  }
  return {
    promised: (...values) => fromCaller(promised(values)),
    immediate: (...values) => {
      const encoded = spec.encode(...values)
      assertSupported()
      const call = binding()[nameSync] as (...native: unknown[]) => number
      const answer = call(...encoded)
      if (answer >= 0) return spec.decode(answer, encoded)
      throw explain(failureOf(answer, encoded[0], values), spec.role)
    },
  }
}

function numberOfPath(path: string): number | undefined {
  const digits = /^\/dev\/loop(\d+)$/.exec(path)?.[1]
  return digits === undefined ? undefined : Number(digits)
}

const nothing = (): void => {}
const theAnswer = (answer: number): number => answer

function onlyFd(fd: number): [number] {
  return [checkDescriptor('fd', fd)]
}

function twoFds(fd: number, backingFd: number): [number, number] {
  return [checkDescriptor('fd', fd), checkDescriptor('backingFd', backingFd)]
}

function fdAndBoolean(fd: number, enabled: boolean): [number, number] {
  return [checkDescriptor('fd', fd), checkBoolean('enabled', enabled) ? 1 : 0]
}

function checkInfo(given: Partial<LoopInfo64>): Partial<LoopInfo64> {
  const info = checkOptions(checkObject('info', given), [
    'device',
    'inode',
    'rdevice',
    'offset',
    'sizeLimit',
    'number',
    'flags',
    'fileName',
  ])
  if (info.device !== undefined) checkU64('device', info.device)
  if (info.inode !== undefined) checkU64('inode', info.inode)
  if (info.rdevice !== undefined) checkU64('rdevice', info.rdevice)
  // K13: kernels up to 5.19 take more than a signed 64-bit offset can hold, and see it as negative.
  if (info.offset !== undefined) checkU64('offset', info.offset, LLONG_MAX)
  if (info.sizeLimit !== undefined) checkU64('sizeLimit', info.sizeLimit, LLONG_MAX)
  if (info.number !== undefined) checkInteger('number', info.number, 0, 0xffff_ffff)
  if (info.flags !== undefined) checkInteger('flags', info.flags, 0, 0xffff_ffff)
  if (info.fileName !== undefined) checkReference(info.fileName)
  return info
}

const LLONG_MAX = 2n ** 63n - 1n

function encodeConfigure(fd: number, config: LoopConfig): [number, number, Uint8Array] {
  checkDescriptor('fd', fd)
  const given = checkOptions(checkObject('config', config), ['fd', 'blockSize', 'info'])
  const backingFd = checkDescriptor('config.fd', given.fd)
  if (given.blockSize !== undefined) {
    checkBlockSize('blockSize', given.blockSize, 65_536)
    assertSupported()
    // K1, 6.11 and later: one that the kernel refuses leaves the device half configured.
    checkBlockSize('blockSize', given.blockSize, pageSize())
  }
  return [fd, backingFd, encodeConfig(given.blockSize ?? 0, checkInfo(given.info === undefined ? {} : given.info))]
}

function encodePartition(fd: number, range: PartitionRange): [number, number, bigint, bigint] {
  checkDescriptor('fd', fd)
  const { number, start, length } = checkOptions(checkObject('range', range), ['number', 'start', 'length'])
  return [
    fd,
    checkInteger('number', number, 1, 0x7fff_ffff),
    checkU64('start', start, LLONG_MAX),
    checkU64('length', length, LLONG_MAX),
  ]
}

function askedPartition(_: number, partition: PartitionRange): { asked: Asked } {
  return { asked: { partition } }
}

const ctlAdd = ioctl({
  ioctl: 'LOOP_CTL_ADD',
  name: 'loopCtlAdd',
  encode: (fd: number, number: number) => [
    checkDescriptor('fd', fd),
    checkInteger('number', number, -1, LOOP_NUMBER_MAX),
  ],
  decode: theAnswer,
  known: (_, number) => (number === -1 ? {} : { number }),
})
/**
 * Makes /dev/loop`number`, or with -1 the next unused one (up to 5.13 only if no device is free). Returns the number.
 */
export const loopCtlAdd: (fd: number, number: number) => Promise<number> = ctlAdd.promised
/** {@link loopCtlAdd}, synchronous. */
export const loopCtlAddSync: (fd: number, number: number) => number = ctlAdd.immediate

const ctlRemove = ioctl({
  ioctl: 'LOOP_CTL_REMOVE',
  name: 'loopCtlRemove',
  // Up to 5.13 a negative number removes the first free device.
  encode: (fd: number, number: number) => [
    checkDescriptor('fd', fd),
    checkInteger('number', number, 0, LOOP_NUMBER_MAX),
  ],
  decode: theAnswer,
  known: (_, number) => ({ number }),
})
/** Removes a free device that nobody has open. Returns its number up to kernel 5.11, and 0 from 5.12 on. */
export const loopCtlRemove: (fd: number, number: number) => Promise<number> = ctlRemove.promised
/** {@link loopCtlRemove}, synchronous; takes some 45 ms. */
export const loopCtlRemoveSync: (fd: number, number: number) => number = ctlRemove.immediate

const ctlGetFree = ioctl({
  ioctl: 'LOOP_CTL_GET_FREE',
  name: 'loopCtlGetFree',
  encode: onlyFd,
  decode: theAnswer,
})
/** The number of a free device, which is made if there is none. Another program can take it before you do. */
export const loopCtlGetFree: (fd: number) => Promise<number> = ctlGetFree.promised
/** {@link loopCtlGetFree}, synchronous. */
export const loopCtlGetFreeSync: (fd: number) => number = ctlGetFree.immediate

const setFd = ioctl({
  ioctl: 'LOOP_SET_FD',
  name: 'loopSetFd',
  encode: twoFds,
  decode: nothing,
  known: (_, backingFd) => ({ backingFd }),
})
/** Attaches a file. The device is read-only if one of the two descriptors is. */
export const loopSetFd: (fd: number, backingFd: number) => Promise<void> = setFd.promised
/** {@link loopSetFd}, synchronous. */
export const loopSetFdSync: (fd: number, backingFd: number) => void = setFd.immediate

const changeFd = ioctl({
  ioctl: 'LOOP_CHANGE_FD',
  name: 'loopChangeFd',
  encode: twoFds,
  decode: nothing,
  known: (_, backingFd) => ({ backingFd }),
})
/**
 * Gives a read-only device another backing file of the same visible size. Since about kernel 6.6 this shuts down an
 * ext4 or xfs that is mounted from the device.
 */
export const loopChangeFd: (fd: number, backingFd: number) => Promise<void> = changeFd.promised
/** {@link loopChangeFd}, synchronous. */
export const loopChangeFdSync: (fd: number, backingFd: number) => void = changeFd.immediate

const clrFd = ioctl({ ioctl: 'LOOP_CLR_FD', name: 'loopClrFd', encode: onlyFd, decode: nothing })
/**
 * Asks the kernel to detach. It may do so later: when the last user, which includes this descriptor, closes the device.
 */
export const loopClrFd: (fd: number) => Promise<void> = clrFd.promised
/** {@link loopClrFd}, synchronous. */
export const loopClrFdSync: (fd: number) => void = clrFd.immediate

const configure = ioctl({
  ioctl: 'LOOP_CONFIGURE',
  name: 'loopConfigure',
  encode: encodeConfigure,
  decode: nothing,
  known: (_, { fd, blockSize, info }) => ({ backingFd: fd, asked: { blockSize, flags: info?.flags } }),
})
/** Attaches a file and sets everything in one call; kernel 5.8 and later. */
export const loopConfigure: (fd: number, config: LoopConfig) => Promise<void> = configure.promised
/** {@link loopConfigure}, synchronous. */
export const loopConfigureSync: (fd: number, config: LoopConfig) => void = configure.immediate

const getStatus64 = ioctl({
  ioctl: 'LOOP_GET_STATUS64',
  name: 'loopGetStatus64',
  encode: (fd: number) => [checkDescriptor('fd', fd), newInfo()],
  decode: (_, [, bytes]) => decodeInfo(bytes as Uint8Array),
})
/** The settings of the device. */
export const loopGetStatus64: (fd: number) => Promise<LoopInfo64> = getStatus64.promised
/** {@link loopGetStatus64}, synchronous. */
export const loopGetStatus64Sync: (fd: number) => LoopInfo64 = getStatus64.immediate

const setStatus64 = ioctl({
  ioctl: 'LOOP_SET_STATUS64',
  name: 'loopSetStatus64',
  encode: (fd: number, info: Partial<LoopInfo64>) => [checkDescriptor('fd', fd), patchInfo(newInfo(), checkInfo(info))],
  decode: nothing,
})
/**
 * Sets offset, size limit, file name and flags; fields that you leave out become 0. Of the flags, the kernel sets
 * AUTOCLEAR and PARTSCAN and clears AUTOCLEAR; it ignores the others.
 */
export const loopSetStatus64: (fd: number, info: Partial<LoopInfo64>) => Promise<void> = setStatus64.promised
/** {@link loopSetStatus64}, synchronous. */
export const loopSetStatus64Sync: (fd: number, info: Partial<LoopInfo64>) => void = setStatus64.immediate

const setCapacity = ioctl({
  ioctl: 'LOOP_SET_CAPACITY',
  name: 'loopSetCapacity',
  encode: onlyFd,
  decode: nothing,
})
/** Gives the device the present size of its backing file. */
export const loopSetCapacity: (fd: number) => Promise<void> = setCapacity.promised
/** {@link loopSetCapacity}, synchronous. */
export const loopSetCapacitySync: (fd: number) => void = setCapacity.immediate

const setDirectIo = ioctl({
  ioctl: 'LOOP_SET_DIRECT_IO',
  name: 'loopSetDirectIo',
  encode: fdAndBoolean,
  decode: nothing,
})
/** Turns on or off direct I/O, which bypasses the page cache of the backing file; kernel 4.10 and later. */
export const loopSetDirectIo: (fd: number, enabled: boolean) => Promise<void> = setDirectIo.promised
/** {@link loopSetDirectIo}, synchronous. */
export const loopSetDirectIoSync: (fd: number, enabled: boolean) => void = setDirectIo.immediate

const setBlockSize = ioctl({
  ioctl: 'LOOP_SET_BLOCK_SIZE',
  name: 'loopSetBlockSize',
  // The kernel looks at 32 bits of it, older ones at 16.
  encode: (fd: number, bytes: number) => [checkDescriptor('fd', fd), checkBlockSize('bytes', bytes, 65_536)],
  decode: nothing,
  known: (_, blockSize) => ({ asked: { blockSize } }),
})
/**
 * Sets the logical block size, a power of two from 512 to the page size (newer kernels: 65 536); kernel 4.14 and later.
 */
export const loopSetBlockSize: (fd: number, bytes: number) => Promise<void> = setBlockSize.promised
/** {@link loopSetBlockSize}, synchronous. */
export const loopSetBlockSizeSync: (fd: number, bytes: number) => void = setBlockSize.immediate

const getSize64 = ioctl({
  ioctl: 'BLKGETSIZE64',
  name: 'blkGetSize64',
  encode: (fd: number) => [checkDescriptor('fd', fd), newU64()],
  decode: (_, [, bytes]) => decodeU64(bytes as Uint8Array),
})
/** The device's size in bytes. */
export const blkGetSize64: (fd: number) => Promise<bigint> = getSize64.promised
/** {@link blkGetSize64}, synchronous. */
export const blkGetSize64Sync: (fd: number) => bigint = getSize64.immediate

const getDiskSeq = ioctl({
  ioctl: 'BLKGETDISKSEQ',
  name: 'blkGetDiskSeq',
  encode: onlyFd,
  decode: BigInt,
})
/** The disk sequence number; kernel 5.15 and later. */
export const blkGetDiskSeq: (fd: number) => Promise<bigint> = getDiskSeq.promised
/** {@link blkGetDiskSeq}, synchronous. */
export const blkGetDiskSeqSync: (fd: number) => bigint = getDiskSeq.immediate

const sszGet = ioctl({ ioctl: 'BLKSSZGET', name: 'blkSszGet', encode: onlyFd, decode: theAnswer })
/** The logical block size in bytes. */
export const blkSszGet: (fd: number) => Promise<number> = sszGet.promised
/** {@link blkSszGet}, synchronous. */
export const blkSszGetSync: (fd: number) => number = sszGet.immediate

const roGet = ioctl({ ioctl: 'BLKROGET', name: 'blkRoGet', encode: onlyFd, decode: (answer) => answer !== 0 })
/** Whether the device is read-only. A free device shows the value of its last attachment. */
export const blkRoGet: (fd: number) => Promise<boolean> = roGet.promised
/** {@link blkRoGet}, synchronous. */
export const blkRoGetSync: (fd: number) => boolean = roGet.immediate

const roSet = ioctl({ ioctl: 'BLKROSET', name: 'blkRoSet', encode: fdAndBoolean, decode: nothing })
/** Makes the device read-only or writable. On kernel 5.12 and later the setting stays after the detach. */
export const blkRoSet: (fd: number, enabled: boolean) => Promise<void> = roSet.promised
/** {@link blkRoSet}, synchronous. */
export const blkRoSetSync: (fd: number, enabled: boolean) => void = roSet.immediate

const flsBuf = ioctl({ ioctl: 'BLKFLSBUF', name: 'blkFlsBuf', encode: onlyFd, decode: nothing })
/** Writes the device's page cache to the backing file, and drops the pages that are clean. */
export const blkFlsBuf: (fd: number) => Promise<void> = flsBuf.promised
/** {@link blkFlsBuf}, synchronous. */
export const blkFlsBufSync: (fd: number) => void = flsBuf.immediate

const rrPart = ioctl({ ioctl: 'BLKRRPART', name: 'blkRrPart', encode: onlyFd, decode: nothing })
/** Reads the partition table again; needs LO_FLAGS_PARTSCAN. */
export const blkRrPart: (fd: number) => Promise<void> = rrPart.promised
/** {@link blkRrPart}, synchronous. */
export const blkRrPartSync: (fd: number) => void = rrPart.immediate

const addPartition = ioctl({
  ioctl: 'BLKPG',
  name: 'blkPgAddPartition',
  encode: encodePartition,
  decode: nothing,
  known: askedPartition,
  role: 'BLKPG add',
})
/** Adds a partition to the kernel, whatever table is on the device. */
export const blkPgAddPartition: (fd: number, range: PartitionRange) => Promise<void> = addPartition.promised
/** {@link blkPgAddPartition}, synchronous. */
export const blkPgAddPartitionSync: (fd: number, range: PartitionRange) => void = addPartition.immediate

const resizePartition = ioctl({
  ioctl: 'BLKPG',
  name: 'blkPgResizePartition',
  encode: encodePartition,
  decode: nothing,
  known: askedPartition,
  role: 'BLKPG resize',
})
/** Changes the length of a partition in the kernel; its start stays. */
export const blkPgResizePartition: (fd: number, range: PartitionRange) => Promise<void> = resizePartition.promised
/** {@link blkPgResizePartition}, synchronous. */
export const blkPgResizePartitionSync: (fd: number, range: PartitionRange) => void = resizePartition.immediate

const delPartition = ioctl({
  ioctl: 'BLKPG',
  name: 'blkPgDelPartition',
  encode: (fd: number, number: number) => [checkDescriptor('fd', fd), checkInteger('number', number, 1, 0x7fff_ffff)],
  decode: nothing,
  known: (_, number) => ({ asked: { partition: { number } } }),
  role: 'BLKPG delete',
})
/** Removes a partition that nobody uses from the kernel. */
export const blkPgDelPartition: (fd: number, number: number) => Promise<void> = delPartition.promised
/** {@link blkPgDelPartition}, synchronous. */
export const blkPgDelPartitionSync: (fd: number, number: number) => void = delPartition.immediate
