/**
 * The loop driver's ioctls as functions. They take descriptors, and their arguments and results are the kernel's;
 * 64-bit fields are bigint. If the kernel refuses a call, they fail with a LoopError. They do not retry, wait for other
 * programs, or undo anything: the functions of `loopctl` do that.
 *
 * Each function exists twice: one returns a promise (the call runs on a thread of the addon), and `...Sync` is
 * synchronous. All of them refuse a descriptor that does not belong to a whole loop device, with reason
 * `not-a-loop-device` (LOOP_CLR_FD on a partition would detach the whole device), and a descriptor that is not open,
 * with `closed`.
 *
 * @module loopctl/ioctl
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
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * const number = await loopCtlAdd(control, -1)
 * await loopCtlRemove(control, number)
 * closeSync(control)
 * ```
 */
export function loopCtlAdd(fd: number, number: number): Promise<number> {
  return ctlAdd.promised(fd, number)
}

/**
 * {@link loopCtlAdd}, synchronous.
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * const number = loopCtlAddSync(control, -1)
 * loopCtlRemoveSync(control, number)
 * closeSync(control)
 * ```
 */
export function loopCtlAddSync(fd: number, number: number): number {
  return ctlAdd.immediate(fd, number)
}

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

/**
 * Removes a free device that nobody has open. Returns its number up to kernel 5.11, and 0 from 5.12 on.
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * const number = await loopCtlAdd(control, -1)
 * await loopCtlRemove(control, number)
 * closeSync(control)
 * ```
 */
export function loopCtlRemove(fd: number, number: number): Promise<number> {
  return ctlRemove.promised(fd, number)
}

/**
 * {@link loopCtlRemove}, synchronous; takes some 45 ms.
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * const number = loopCtlAddSync(control, -1)
 * loopCtlRemoveSync(control, number)
 * closeSync(control)
 * ```
 */
export function loopCtlRemoveSync(fd: number, number: number): number {
  return ctlRemove.immediate(fd, number)
}

const ctlGetFree = ioctl({
  ioctl: 'LOOP_CTL_GET_FREE',
  name: 'loopCtlGetFree',
  encode: onlyFd,
  decode: theAnswer,
})

/**
 * The number of a free device, which is made if there is none. Another program can take it before you do.
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * console.log(`/dev/loop${await loopCtlGetFree(control)}`)
 * closeSync(control)
 * ```
 */
export function loopCtlGetFree(fd: number): Promise<number> {
  return ctlGetFree.promised(fd)
}

/**
 * {@link loopCtlGetFree}, synchronous.
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * console.log(`/dev/loop${loopCtlGetFreeSync(control)}`)
 * closeSync(control)
 * ```
 */
export function loopCtlGetFreeSync(fd: number): number {
  return ctlGetFree.immediate(fd)
}

const setFd = ioctl({
  ioctl: 'LOOP_SET_FD',
  name: 'loopSetFd',
  encode: twoFds,
  decode: nothing,
  known: (_, backingFd) => ({ backingFd }),
})

/**
 * Attaches a file. The device is read-only if one of the two descriptors is.
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * const fd = openSync(`/dev/loop${await loopCtlGetFree(control)}`, 'r+')
 * const file = openSync('disk.img', 'r+')
 * await loopSetFd(fd, file)
 * await loopClrFd(fd)
 * for (const each of [file, fd, control]) closeSync(each)
 * ```
 */
export function loopSetFd(fd: number, backingFd: number): Promise<void> {
  return setFd.promised(fd, backingFd)
}

/**
 * {@link loopSetFd}, synchronous.
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * const fd = openSync(`/dev/loop${loopCtlGetFreeSync(control)}`, 'r+')
 * const file = openSync('disk.img', 'r+')
 * loopSetFdSync(fd, file)
 * loopClrFdSync(fd)
 * for (const each of [file, fd, control]) closeSync(each)
 * ```
 */
export function loopSetFdSync(fd: number, backingFd: number): void {
  return setFd.immediate(fd, backingFd)
}

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
 *
 * @example
 * ```ts
 * import { closeSync, copyFileSync, openSync } from 'node:fs'
 *
 * copyFileSync('disk.img', 'copy.img')
 * await using device = await attach('disk.img', { readOnly: true })
 * const copy = openSync('copy.img', 'r')
 * await loopChangeFd(device.fd, copy)
 * closeSync(copy)
 * ```
 */
export function loopChangeFd(fd: number, backingFd: number): Promise<void> {
  return changeFd.promised(fd, backingFd)
}

/**
 * {@link loopChangeFd}, synchronous.
 *
 * @example
 * ```ts
 * import { closeSync, copyFileSync, openSync } from 'node:fs'
 *
 * copyFileSync('disk.img', 'copy.img')
 * await using device = await attach('disk.img', { readOnly: true })
 * const copy = openSync('copy.img', 'r')
 * loopChangeFdSync(device.fd, copy)
 * closeSync(copy)
 * ```
 */
export function loopChangeFdSync(fd: number, backingFd: number): void {
  return changeFd.immediate(fd, backingFd)
}

const clrFd = ioctl({ ioctl: 'LOOP_CLR_FD', name: 'loopClrFd', encode: onlyFd, decode: nothing })
/**
 * Asks the kernel to detach the device. The kernel does so when the last user closes the device, and this descriptor
 * counts as a user.
 *
 * @example
 * ```ts
 * const device = await attach('disk.img')
 * await loopClrFd(device.fd)
 * await device.close() // the last close detaches
 * ```
 */
export function loopClrFd(fd: number): Promise<void> {
  return clrFd.promised(fd)
}

/**
 * {@link loopClrFd}, synchronous.
 *
 * @example
 * ```ts
 * const device = await attach('disk.img')
 * loopClrFdSync(device.fd)
 * await device.close() // the last close detaches
 * ```
 */
export function loopClrFdSync(fd: number): void {
  return clrFd.immediate(fd)
}

const configure = ioctl({
  ioctl: 'LOOP_CONFIGURE',
  name: 'loopConfigure',
  encode: encodeConfigure,
  decode: nothing,
  known: (_, { fd, blockSize, info }) => ({ backingFd: fd, asked: { blockSize, flags: info?.flags } }),
})

/**
 * Attaches a file and sets everything in one call; kernel 5.8 and later.
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * const fd = openSync(`/dev/loop${await loopCtlGetFree(control)}`, 'r+')
 * const file = openSync('disk.img', 'r+')
 * await loopConfigure(fd, { fd: file, blockSize: 4096, info: { flags: LO_FLAGS_AUTOCLEAR } })
 * for (const each of [file, fd, control]) closeSync(each)
 * ```
 */
export function loopConfigure(fd: number, config: LoopConfig): Promise<void> {
  return configure.promised(fd, config)
}

/**
 * {@link loopConfigure}, synchronous.
 *
 * @example
 * ```ts
 * import { closeSync, openSync } from 'node:fs'
 *
 * const control = openSync('/dev/loop-control', 'r+')
 * const fd = openSync(`/dev/loop${loopCtlGetFreeSync(control)}`, 'r+')
 * const file = openSync('disk.img', 'r+')
 * loopConfigureSync(fd, { fd: file, blockSize: 4096, info: { flags: LO_FLAGS_AUTOCLEAR } })
 * for (const each of [file, fd, control]) closeSync(each)
 * ```
 */
export function loopConfigureSync(fd: number, config: LoopConfig): void {
  return configure.immediate(fd, config)
}

const getStatus64 = ioctl({
  ioctl: 'LOOP_GET_STATUS64',
  name: 'loopGetStatus64',
  encode: (fd: number) => [checkDescriptor('fd', fd), newInfo()],
  decode: (_, [, bytes]) => decodeInfo(bytes as Uint8Array),
})

/**
 * The settings of the device.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * const { offset, flags } = await loopGetStatus64(device.fd)
 * console.log(offset, (flags & LO_FLAGS_AUTOCLEAR) !== 0)
 * ```
 */
export function loopGetStatus64(fd: number): Promise<LoopInfo64> {
  return getStatus64.promised(fd)
}

/**
 * {@link loopGetStatus64}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * const { offset, flags } = loopGetStatus64Sync(device.fd)
 * console.log(offset, (flags & LO_FLAGS_AUTOCLEAR) !== 0)
 * ```
 */
export function loopGetStatus64Sync(fd: number): LoopInfo64 {
  return getStatus64.immediate(fd)
}

const setStatus64 = ioctl({
  ioctl: 'LOOP_SET_STATUS64',
  name: 'loopSetStatus64',
  encode: (fd: number, info: Partial<LoopInfo64>) => [checkDescriptor('fd', fd), patchInfo(newInfo(), checkInfo(info))],
  decode: nothing,
})

/**
 * Sets offset, size limit, file name and flags; fields that you leave out become 0. Of the flags, the kernel sets
 * AUTOCLEAR and PARTSCAN and clears AUTOCLEAR; it ignores the others.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * const info = await loopGetStatus64(device.fd)
 * await loopSetStatus64(device.fd, { ...info, fileName: 'backup' })
 * ```
 */
export function loopSetStatus64(fd: number, info: Partial<LoopInfo64>): Promise<void> {
  return setStatus64.promised(fd, info)
}

/**
 * {@link loopSetStatus64}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * const info = loopGetStatus64Sync(device.fd)
 * loopSetStatus64Sync(device.fd, { ...info, fileName: 'backup' })
 * ```
 */
export function loopSetStatus64Sync(fd: number, info: Partial<LoopInfo64>): void {
  return setStatus64.immediate(fd, info)
}

const setCapacity = ioctl({
  ioctl: 'LOOP_SET_CAPACITY',
  name: 'loopSetCapacity',
  encode: onlyFd,
  decode: nothing,
})

/**
 * Gives the device the present size of its backing file.
 *
 * @example
 * ```ts
 * import { truncateSync } from 'node:fs'
 *
 * await using device = await attach('disk.img')
 * truncateSync('disk.img', 128 << 20)
 * await loopSetCapacity(device.fd)
 * ```
 */
export function loopSetCapacity(fd: number): Promise<void> {
  return setCapacity.promised(fd)
}

/**
 * {@link loopSetCapacity}, synchronous.
 *
 * @example
 * ```ts
 * import { truncateSync } from 'node:fs'
 *
 * await using device = await attach('disk.img')
 * truncateSync('disk.img', 128 << 20)
 * loopSetCapacitySync(device.fd)
 * ```
 */
export function loopSetCapacitySync(fd: number): void {
  return setCapacity.immediate(fd)
}

const setDirectIo = ioctl({
  ioctl: 'LOOP_SET_DIRECT_IO',
  name: 'loopSetDirectIo',
  encode: fdAndBoolean,
  decode: nothing,
})

/**
 * Turns on or off direct I/O, which bypasses the page cache of the backing file; kernel 4.10 and later.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * await loopSetDirectIo(device.fd, false)
 * ```
 */
export function loopSetDirectIo(fd: number, enabled: boolean): Promise<void> {
  return setDirectIo.promised(fd, enabled)
}

/**
 * {@link loopSetDirectIo}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * loopSetDirectIoSync(device.fd, false)
 * ```
 */
export function loopSetDirectIoSync(fd: number, enabled: boolean): void {
  return setDirectIo.immediate(fd, enabled)
}

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
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * await loopSetBlockSize(device.fd, 4096)
 * ```
 */
export function loopSetBlockSize(fd: number, bytes: number): Promise<void> {
  return setBlockSize.promised(fd, bytes)
}

/**
 * {@link loopSetBlockSize}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * loopSetBlockSizeSync(device.fd, 4096)
 * ```
 */
export function loopSetBlockSizeSync(fd: number, bytes: number): void {
  return setBlockSize.immediate(fd, bytes)
}

const getSize64 = ioctl({
  ioctl: 'BLKGETSIZE64',
  name: 'blkGetSize64',
  encode: (fd: number) => [checkDescriptor('fd', fd), newU64()],
  decode: (_, [, bytes]) => decodeU64(bytes as Uint8Array),
})

/**
 * The device's size in bytes.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * console.log(await blkGetSize64(device.fd)) // 67108864n
 * ```
 */
export function blkGetSize64(fd: number): Promise<bigint> {
  return getSize64.promised(fd)
}

/**
 * {@link blkGetSize64}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * console.log(blkGetSize64Sync(device.fd)) // 67108864n
 * ```
 */
export function blkGetSize64Sync(fd: number): bigint {
  return getSize64.immediate(fd)
}

const getDiskSeq = ioctl({
  ioctl: 'BLKGETDISKSEQ',
  name: 'blkGetDiskSeq',
  encode: onlyFd,
  decode: BigInt,
})

/**
 * The disk sequence number; kernel 5.15 and later.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * console.log(await blkGetDiskSeq(device.fd))
 * ```
 */
export function blkGetDiskSeq(fd: number): Promise<bigint> {
  return getDiskSeq.promised(fd)
}

/**
 * {@link blkGetDiskSeq}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * console.log(blkGetDiskSeqSync(device.fd))
 * ```
 */
export function blkGetDiskSeqSync(fd: number): bigint {
  return getDiskSeq.immediate(fd)
}

const sszGet = ioctl({ ioctl: 'BLKSSZGET', name: 'blkSszGet', encode: onlyFd, decode: theAnswer })
/**
 * The logical block size in bytes.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * console.log(await blkSszGet(device.fd)) // 512
 * ```
 */
export function blkSszGet(fd: number): Promise<number> {
  return sszGet.promised(fd)
}

/**
 * {@link blkSszGet}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * console.log(blkSszGetSync(device.fd)) // 512
 * ```
 */
export function blkSszGetSync(fd: number): number {
  return sszGet.immediate(fd)
}

const roGet = ioctl({ ioctl: 'BLKROGET', name: 'blkRoGet', encode: onlyFd, decode: (answer) => answer !== 0 })
/**
 * Whether the device is read-only. A free device shows the value of its last attachment.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * console.log(await blkRoGet(device.fd)) // false
 * ```
 */
export function blkRoGet(fd: number): Promise<boolean> {
  return roGet.promised(fd)
}

/**
 * {@link blkRoGet}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * console.log(blkRoGetSync(device.fd)) // false
 * ```
 */
export function blkRoGetSync(fd: number): boolean {
  return roGet.immediate(fd)
}

const roSet = ioctl({ ioctl: 'BLKROSET', name: 'blkRoSet', encode: fdAndBoolean, decode: nothing })
/**
 * Makes the device read-only or writable. On kernel 5.12 and later the setting stays after the detach.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * await blkRoSet(device.fd, true)
 * await blkRoSet(device.fd, false)
 * ```
 */
export function blkRoSet(fd: number, enabled: boolean): Promise<void> {
  return roSet.promised(fd, enabled)
}

/**
 * {@link blkRoSet}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * blkRoSetSync(device.fd, true)
 * blkRoSetSync(device.fd, false)
 * ```
 */
export function blkRoSetSync(fd: number, enabled: boolean): void {
  return roSet.immediate(fd, enabled)
}

const flsBuf = ioctl({ ioctl: 'BLKFLSBUF', name: 'blkFlsBuf', encode: onlyFd, decode: nothing })
/**
 * Writes the device's page cache to the backing file, and drops the pages that are clean.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * await blkFlsBuf(device.fd)
 * ```
 */
export function blkFlsBuf(fd: number): Promise<void> {
  return flsBuf.promised(fd)
}

/**
 * {@link blkFlsBuf}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * blkFlsBufSync(device.fd)
 * ```
 */
export function blkFlsBufSync(fd: number): void {
  return flsBuf.immediate(fd)
}

const rrPart = ioctl({ ioctl: 'BLKRRPART', name: 'blkRrPart', encode: onlyFd, decode: nothing })
/**
 * Reads the partition table again; needs LO_FLAGS_PARTSCAN.
 *
 * @example
 * ```ts
 * await using device = await attach('sdcard.img', { partscan: true })
 * await blkRrPart(device.fd)
 * ```
 */
export function blkRrPart(fd: number): Promise<void> {
  return rrPart.promised(fd)
}

/**
 * {@link blkRrPart}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('sdcard.img', { partscan: true })
 * blkRrPartSync(device.fd)
 * ```
 */
export function blkRrPartSync(fd: number): void {
  return rrPart.immediate(fd)
}

const addPartition = ioctl({
  ioctl: 'BLKPG',
  name: 'blkPgAddPartition',
  encode: encodePartition,
  decode: nothing,
  known: askedPartition,
  role: 'BLKPG add',
})

/**
 * Adds a partition to the kernel, whatever table is on the device.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * await blkPgAddPartition(device.fd, { number: 1, start: 1n << 20n, length: 8n << 20n })
 * await blkPgDelPartition(device.fd, 1)
 * ```
 */
export function blkPgAddPartition(fd: number, range: PartitionRange): Promise<void> {
  return addPartition.promised(fd, range)
}

/**
 * {@link blkPgAddPartition}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * blkPgAddPartitionSync(device.fd, { number: 1, start: 1n << 20n, length: 8n << 20n })
 * blkPgDelPartitionSync(device.fd, 1)
 * ```
 */
export function blkPgAddPartitionSync(fd: number, range: PartitionRange): void {
  return addPartition.immediate(fd, range)
}

const resizePartition = ioctl({
  ioctl: 'BLKPG',
  name: 'blkPgResizePartition',
  encode: encodePartition,
  decode: nothing,
  known: askedPartition,
  role: 'BLKPG resize',
})

/**
 * Changes the length of a partition in the kernel; its start stays.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * await blkPgAddPartition(device.fd, { number: 1, start: 1n << 20n, length: 8n << 20n })
 * await blkPgResizePartition(device.fd, { number: 1, start: 1n << 20n, length: 16n << 20n })
 * await blkPgDelPartition(device.fd, 1)
 * ```
 */
export function blkPgResizePartition(fd: number, range: PartitionRange): Promise<void> {
  return resizePartition.promised(fd, range)
}

/**
 * {@link blkPgResizePartition}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * blkPgAddPartitionSync(device.fd, { number: 1, start: 1n << 20n, length: 8n << 20n })
 * blkPgResizePartitionSync(device.fd, { number: 1, start: 1n << 20n, length: 16n << 20n })
 * blkPgDelPartitionSync(device.fd, 1)
 * ```
 */
export function blkPgResizePartitionSync(fd: number, range: PartitionRange): void {
  return resizePartition.immediate(fd, range)
}

const delPartition = ioctl({
  ioctl: 'BLKPG',
  name: 'blkPgDelPartition',
  encode: (fd: number, number: number) => [checkDescriptor('fd', fd), checkInteger('number', number, 1, 0x7fff_ffff)],
  decode: nothing,
  known: (_, number) => ({ asked: { partition: { number } } }),
  role: 'BLKPG delete',
})

/**
 * Removes a partition that nobody uses from the kernel.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * await blkPgAddPartition(device.fd, { number: 1, start: 1n << 20n, length: 8n << 20n })
 * await blkPgDelPartition(device.fd, 1)
 * ```
 */
export function blkPgDelPartition(fd: number, number: number): Promise<void> {
  return delPartition.promised(fd, number)
}

/**
 * {@link blkPgDelPartition}, synchronous.
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img')
 * blkPgAddPartitionSync(device.fd, { number: 1, start: 1n << 20n, length: 8n << 20n })
 * blkPgDelPartitionSync(device.fd, 1)
 * ```
 */
export function blkPgDelPartitionSync(fd: number, number: number): void {
  return delPartition.immediate(fd, number)
}
