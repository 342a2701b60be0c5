/**
 * What the diagnosis of a failure reads. Nothing here changes anything, and nothing waits for a filesystem: sysfs,
 * procfs, and what the kernel knows of an open file without asking its server. The exception is LOOP_GET_STATUS64,
 * which is given 50 ms on a thread.
 */

import { constants } from 'node:os'
import { binding } from '../kernel/binding.ts'
import { callWithin } from '../kernel/bounded.ts'
import { describeNode } from '../kernel/devnode.ts'
import { numberOfMinor, pageSize } from '../kernel/features.ts'
import { O_PATH, readFileSync } from '../kernel/files.ts'
import { mountOf, readMountsSync } from '../kernel/mountinfo.ts'
import {
  canAdministrate,
  CAP_DAC_OVERRIDE,
  CAP_MKNOD,
  hasCapability,
  type Privileges,
  readPrivileges,
} from '../kernel/process.ts'
import * as sysfs from '../kernel/sysfs.ts'
import {
  decodeInfo,
  decodeStat,
  LO_FLAGS_PARTSCAN,
  LOOP_MAJOR,
  type LoopInfo64,
  newInfo,
  newStat,
  type Stat,
  visibleSize,
} from '../kernel/uapi.ts'
import type { LoopErrorReason } from './errors.ts'
import type { Holder } from './holders.ts'

const { ENXIO } = constants.errno
/** The longest that the diagnosis of a failure may take. */
export const DIAGNOSIS_MS = 50

/** A failed call and what is known of its circumstances. */
export interface Failure {
  /** An ioctl's name (`LOOP_CHANGE_FD`) or a system call's (`open`). */
  call: string
  /** Negative. */
  errno: number
  /** What the call was given, for the message. */
  path?: string | undefined
  /** The loop device's number, and an open descriptor of it. */
  number?: number | undefined
  fd?: number | undefined
  /** The backing file: its path for the message, its descriptor where it is open. */
  backingFile?: string | undefined
  backingFd?: number | undefined
  /** `major:minor` of the node that there has to be at the path, where that is not the device's. */
  node?: string | undefined
  /** The numbers that the call was given. */
  asked?: Asked | undefined
  /** LOOP_GET_STATUS64: null where it answered that nothing is attached, undefined where it was not asked. */
  status?: LoopInfo64 | null | undefined
  holders?: Holder[] | undefined
  /** What was tried before giving up, for the message. */
  effort?: string | undefined
}

export interface Asked {
  blockSize?: number | undefined
  flags?: number | undefined
  offset?: bigint | undefined
  sizeLimit?: bigint | undefined
  /** Whether encryption was asked for, which newer kernels do not have. */
  encryption?: boolean | undefined
  partition?: { number: number; start?: bigint; length?: bigint } | undefined
}

/** One possible cause of a failure. */
export interface Cause {
  reason: LoopErrorReason
  /** The reading that tells it from the causes after it; without one it always applies. */
  when?: (failure: Failure) => boolean
  detail?: Text
  hint?: Text
}

export type Text = string | ((failure: Failure) => string | undefined)

/** LOOP_GET_STATUS64 of the device. It asks the filesystem of the backing file, which may never answer. */
export async function askStatus({ fd, number }: Failure): Promise<LoopInfo64 | null | undefined> {
  if (fd === undefined) return undefined
  const bytes = newInfo()
  const answer = await callWithin(DIAGNOSIS_MS, number, 'loopGetStatus64', fd, bytes)
  if (answer === -ENXIO) return null
  return answer === undefined || answer < 0 ? undefined : decodeInfo(bytes)
}

// The device

/** It has a backing file; where LOOP_GET_STATUS64 was not asked, as far as sysfs tells, also while it is going. */
export function isAttached({ status, number }: Failure): boolean {
  return status === undefined ? isGoing({ number }) : status !== null
}

/** Still attached in sysfs: where the kernel denies that it is, it is going. */
export function isGoing({ number }: Pick<Failure, 'number'>): boolean {
  return number !== undefined && sysfs.isBound(number)
}

export function isThere({ number }: Failure): boolean {
  return number !== undefined && sysfs.deviceExists(number)
}

export function backingFileOf({ number }: Failure): string {
  return (number === undefined ? undefined : sysfs.readBackingFileSync(number)) ?? 'another file'
}

export function nodeNumbersOf({ number, node }: Failure): string {
  const numbers = node ?? (number === undefined ? undefined : sysfs.readDeviceNumbers(number))
  return (numbers ?? `7:${number}`).replace(':', ' ')
}

/** What there is where the node should be. */
export function describeNodeOf({ path }: Failure): string {
  return `there is ${path === undefined ? 'something else' : describeNode(path)} in place of the node`
}

export function canMakeNodes(): boolean {
  return hasCapability(readPrivileges(), CAP_MKNOD)
}

/** What LOOP_SET_DIRECT_IO looks at. */
export function describeAlignment({ fd, number }: Failure): string {
  const blockSize = fd === undefined ? -1 : binding().blkSszGetSync(fd)
  const offset = number === undefined ? undefined : sysfs.readOffsetSync(number)
  return `logical block size ${blockSize > 0 ? blockSize : 'unknown'}, offset ${offset ?? 'unknown'}`
}

/** Whether the kernel looks for partitions. */
export function isScanned({ status, number }: Failure): boolean {
  if (status) return (status.flags & LO_FLAGS_PARTSCAN) !== 0
  return number !== undefined && sysfs.isScannedSync(number)
}

/** Whether writes are refused, by LO_FLAGS_READ_ONLY or by BLKROSET. */
export function isReadOnly({ fd }: Failure): boolean {
  return fd === undefined || binding().blkRoGetSync(fd) !== 0
}

export function deviceIsClosed({ fd }: Failure): boolean {
  return fd !== undefined && statOf(fd) === undefined
}

export function describeBlockSize({ asked }: Failure): string {
  const wanted =
    asked?.blockSize === undefined ? 'that logical block size' : `a logical block size of ${asked.blockSize}`
  return `this kernel does not take ${wanted}: powers of two from 512 to ${pageSize()}`
}

export function isImpossibleBlockSize({ asked }: Failure): boolean {
  const size = asked?.blockSize ?? 0
  return size !== 0 && (size < 512 || size > pageSize() || (size & (size - 1)) !== 0)
}

export function isSysfsMounted(): boolean {
  return sysfs.isMounted()
}

/** The driver is there, whatever /dev has. */
export function isDriverLoaded(): boolean {
  return sysfs.isControlThere()
}

// The backing file

type Opened = Pick<Failure, 'backingFd'>

function statOf(fd: number | undefined): Stat | undefined {
  if (fd === undefined) return undefined
  const bytes = newStat()
  return binding().statxCachedSync(fd, bytes) < 0 ? undefined : decodeStat(bytes)
}

export function backingIsOpen({ backingFd }: Opened): boolean {
  return statOf(backingFd) !== undefined
}

/** O_PATH: names the file without opening it. */
export function backingIsPathOnly({ backingFd }: Opened): boolean {
  return backingFd !== undefined && (binding().fcntlGetFlSync(backingFd) & O_PATH) !== 0 && backingIsOpen({ backingFd })
}

const TYPES: Record<number, string> = {
  0o01: 'a FIFO',
  0o02: 'a character device',
  0o04: 'a directory',
  0o06: 'a block device',
  0o10: 'a file',
  0o14: 'a socket',
}

function typeOf({ backingFd }: Opened): string | undefined {
  const stat = statOf(backingFd)
  return stat && (TYPES[stat.mode >> 12] ?? 'an anonymous inode')
}

export function isNeitherFileNorBlockDevice(failure: Opened): boolean {
  const type = typeOf(failure)
  return type !== undefined && type !== 'a file' && type !== 'a block device'
}

export function describeType(failure: Opened): string {
  return `the backing file is ${typeOf(failure) ?? 'nothing that can be looked at'}, not a file or a block device`
}

/** The type of the filesystem that an open file is on. */
export function filesystemOf({ backingFd }: Opened): string | undefined {
  const text = readFileSync(`/proc/self/fdinfo/${backingFd}`)
  const id = typeof text === 'number' ? undefined : /^mnt_id:\s*(\d+)$/m.exec(text.toString())?.[1]
  return readMountsSync().find((mount) => mount.id === Number(id))?.fsType
}

/** The loop device in the chain under the backing file that is backed by nothing. */
export function freeLoopUnder({ backingFd }: Opened): string | undefined {
  if (!sysfs.isMounted()) return undefined
  let device = statOf(backingFd)?.rdevice
  const seen = new Set<string>()
  while (device !== undefined && !seen.has(device)) {
    seen.add(device)
    const [major, minor] = device.split(':').map(Number)
    if (major !== LOOP_MAJOR || minor === undefined) return undefined
    const number = numberOfMinor(minor)
    if (!sysfs.isBound(number)) return `/dev/loop${number}`
    const below = sysfs.readBackingFileSync(number)?.match(/^\/dev\/loop(\d+)$/)?.[1]
    device = below === undefined ? undefined : sysfs.readDeviceNumbers(Number(below))
  }
  return undefined
}

export function isLoopDevice({ backingFd }: Opened): boolean {
  return statOf(backingFd)?.rdevice.startsWith(`${LOOP_MAJOR}:`) ?? false
}

/** Bytes that the device shows, and would show over the new file. */
export function compareSizes({ fd, number, backingFd }: Failure): { now: bigint; next: bigint } | undefined {
  const stat = statOf(backingFd)
  if (stat === undefined || fd === undefined || number === undefined) return undefined
  const now = sysfs.readSizeSync(number)
  const offset = sysfs.readOffsetSync(number)
  const limit = sysfs.readSizeLimitSync(number)
  if (now === undefined || offset === undefined || limit === undefined) return undefined
  const size = stat.mode >> 12 === 0o06 ? sysfs.readBlockDeviceSizeSync(stat.rdevice) : stat.size
  return { now, next: visibleSize(size, offset, limit) }
}

/** `new backing file is 4096 bytes larger (10240, must be 6144)`. */
export function sizeDifference(now: bigint, then: bigint): string {
  const difference = then > now ? `${then - now} bytes larger` : `${now - then} bytes smaller`
  return `new backing file is ${difference} (${then}, must be ${now})`
}

// Partitions

/** What is wrong with a partition given to BLKPG, by what the device is; undefined: nothing that can be seen. */
export function partitionFault({ asked, number, fd }: Failure): string | undefined {
  const { partition } = asked ?? {}
  if (partition === undefined || number === undefined || fd === undefined) return undefined
  if (partition.number > 255) return `partition ${partition.number} is beyond the 255 that a device can have`
  const { start, length } = partition
  if (start === undefined || length === undefined) return undefined
  const blockSize = BigInt(Math.max(512, binding().blkSszGetSync(fd)))
  if (length === 0n) return 'the partition is empty'
  if (start % blockSize !== 0n || length % blockSize !== 0n) {
    return `start ${start} and length ${length} must be multiples of the logical block size, ${blockSize}`
  }
  const size = sysfs.readSizeSync(number) ?? 0n
  if (start + length > size) return `the partition ends at ${start + length}, the device at ${size}`
  return undefined
}

export function partitionIsThere({ asked, number }: Failure): boolean {
  return number !== undefined && asked?.partition !== undefined && sysfs.partitionExists(number, asked.partition.number)
}

export function partitionPath({ asked, number }: Failure): string {
  return `/dev/loop${number}p${asked?.partition?.number}`
}

// This process and its surroundings

/** The mount of the node, where that forbids devices. */
export function nodevMount({ path }: Failure): string | undefined {
  const mount = path === undefined ? undefined : mountOf(path, readMountsSync())
  return mount?.options.includes('nodev') ? mount.mountPoint : undefined
}

export function inUserNamespace(): boolean {
  return readPrivileges().inUserNamespace
}

export function isAdministrator(): boolean {
  return canAdministrate()
}

export function overridesModes(): boolean {
  return hasCapability(readPrivileges(), CAP_DAC_OVERRIDE)
}

/** `this process is user 65534, without CAP_SYS_ADMIN`. */
export function describePrivileges(): string {
  const privileges: Privileges = readPrivileges()
  const lacks = [
    canAdministrate(privileges) ? [] : 'CAP_SYS_ADMIN',
    hasCapability(privileges, CAP_DAC_OVERRIDE) ? [] : 'CAP_DAC_OVERRIDE',
  ].flat()
  return `this process is user ${privileges.uid}${lacks.length > 0 ? `, without ${lacks.join(' and ')}` : ''}`
}

/** What can keep a process with all rights from a call. */
export function describeSandbox(): string {
  return readPrivileges().filtered
    ? 'a sandbox denies it: a seccomp filter is in effect'
    : 'a sandbox denies it: a security module (AppArmor, SELinux) or the like'
}
