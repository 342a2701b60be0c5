/** The structs and constants of <linux/loop.h>, encoded and decoded at this one edge. */

import { endianness } from 'node:os'

export const LO_FLAGS_READ_ONLY = 1
export const LO_FLAGS_AUTOCLEAR = 4
export const LO_FLAGS_PARTSCAN = 8
export const LO_FLAGS_DIRECT_IO = 16

/** LO_NAME_SIZE less the terminating zero: the longest `lo_file_name`, in bytes. */
export const LO_NAME_MAX = 63

/** Of the block devices that are whole loop devices, and with max_part of their partitions too. */
export const LOOP_MAJOR = 7

/** The highest loop device number: minors have 20 bits. */
export const LOOP_NUMBER_MAX = 0xf_ffff

/** struct loop_info64, with bytes and device numbers as the kernel has them. */
export interface LoopInfo64 {
  /** `st_dev` of the backing file (read only). */
  device: bigint
  /** `st_ino` of the backing file (read only). */
  inode: bigint
  /** `st_rdev` of the backing file, if it is a block device (read only). */
  rdevice: bigint
  /** The byte of the backing file at which the device begins. */
  offset: bigint
  /** How many bytes of the file the device shows at most; 0: up to the end. */
  sizeLimit: bigint
  /** The N of /dev/loopN (read only). */
  number: number
  /** LO_FLAGS_*. */
  flags: number
  /** `lo_file_name`: a text of at most 63 bytes, chosen at the attach. */
  fileName: string
}

export const INFO_SIZE = 232
export const CONFIG_SIZE = 304
const INFO_IN_CONFIG = 8

// Offsets in struct loop_info64
const DEVICE = 0
const INODE = 8
const RDEVICE = 16
const OFFSET = 24
const SIZE_LIMIT = 32
const NUMBER = 40
const FLAGS = 52
const FILE_NAME = 56
const FILE_NAME_SIZE = 64

/** Of this machine's integers. */
export const little: boolean = endianness() === 'LE'
// A tag can begin with what would be a byte order mark elsewhere.
const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
const encoder = new TextEncoder()

function view(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

/** Where in a buffer something is. */
export interface Place {
  readonly data: DataView
  readonly at: number
}

/** A struct: an array of its own, or a place. */
export type Struct = Uint8Array | Place

export function placeOf(struct: Struct): Place {
  return struct instanceof Uint8Array ? { data: view(struct), at: 0 } : struct
}

/** A zeroed struct loop_info64 for the kernel to fill. */
export function newInfo(): Uint8Array {
  return new Uint8Array(INFO_SIZE)
}

export function decodeInfo(info: Struct): LoopInfo64 {
  const { data, at } = placeOf(info)
  return {
    device: data.getBigUint64(at + DEVICE, little),
    inode: data.getBigUint64(at + INODE, little),
    rdevice: data.getBigUint64(at + RDEVICE, little),
    offset: data.getBigUint64(at + OFFSET, little),
    sizeLimit: data.getBigUint64(at + SIZE_LIMIT, little),
    number: data.getUint32(at + NUMBER, little),
    flags: data.getUint32(at + FLAGS, little),
    fileName: data.getUint8(at + FILE_NAME) === 0 ? '' : decodeFileName(data, at + FILE_NAME),
  }
}

function decodeFileName({ buffer, byteOffset }: DataView, at: number): string {
  const name = new Uint8Array(buffer, byteOffset + at, FILE_NAME_SIZE)
  const end = name.indexOf(0)
  return decoder.decode(end < 0 ? name : name.subarray(0, end))
}

/** Writes the named fields into `bytes` and leaves every other bit of the struct as it is. */
export function patchInfo(bytes: Uint8Array, change: Partial<LoopInfo64>): Uint8Array {
  writeInfo(view(bytes), 0, change)
  return bytes
}

function writeInfo(data: DataView, at: number, change: Partial<LoopInfo64>): void {
  if (change.device !== undefined) data.setBigUint64(at + DEVICE, change.device, little)
  if (change.inode !== undefined) data.setBigUint64(at + INODE, change.inode, little)
  if (change.rdevice !== undefined) data.setBigUint64(at + RDEVICE, change.rdevice, little)
  if (change.offset !== undefined) data.setBigUint64(at + OFFSET, change.offset, little)
  if (change.sizeLimit !== undefined) data.setBigUint64(at + SIZE_LIMIT, change.sizeLimit, little)
  if (change.number !== undefined) data.setUint32(at + NUMBER, change.number, little)
  if (change.flags !== undefined) data.setUint32(at + FLAGS, change.flags, little)
  if (change.fileName !== undefined) writeFileName(data, at + FILE_NAME, change.fileName)
}

function writeFileName(data: DataView, at: number, name: string): void {
  for (let i = 0; i < FILE_NAME_SIZE; i += 4) data.setUint32(at + i, 0)
  if (name !== '') encoder.encodeInto(name, new Uint8Array(data.buffer, data.byteOffset + at, LO_NAME_MAX))
}

/** struct loop_config, but for the descriptor. A block size of 0 leaves the choice to the kernel. */
export function encodeConfig(blockSize: number, info: Partial<LoopInfo64>): Uint8Array {
  const bytes = newConfig()
  writeConfig(placeOf(bytes), blockSize, info)
  return bytes
}

/** A zeroed struct loop_config. */
export function newConfig(): Uint8Array {
  return new Uint8Array(CONFIG_SIZE)
}

/** The same, into a zeroed struct. */
export function writeConfig({ data, at }: Place, blockSize: number, info: Partial<LoopInfo64>): void {
  data.setUint32(at + 4, blockSize, little)
  writeInfo(data, at + INFO_IN_CONFIG, info)
}

/** struct loop_config as {@link encodeConfig} makes it. */
export function decodeConfig(bytes: Uint8Array): LoopInfo64 & { blockSize: number } {
  const blockSize = view(bytes).getUint32(4, little)
  return { blockSize, ...decodeInfo(bytes.subarray(INFO_IN_CONFIG, INFO_IN_CONFIG + INFO_SIZE)) }
}

/** A path as the addon takes it. */
export function encodePath(path: string | Buffer): Uint8Array {
  return Buffer.concat([typeof path === 'string' ? encoder.encode(path) : path, END])
}

const END = new Uint8Array(1)

export const U64_SIZE = 8

/** A zeroed __u64 for the kernel to fill. */
export function newU64(): Uint8Array {
  return new Uint8Array(U64_SIZE)
}

export function decodeU64(value: Struct): bigint {
  const { data, at } = placeOf(value)
  return data.getBigUint64(at, little)
}

/** `major:minor` of a dev_t as stat(2) and LOOP_GET_STATUS64 give it. */
export function formatDevice(device: bigint): string {
  return `${majorOf(device)}:${minorOf(device)}`
}

/** A dev_t as stat(2) has it: {@link majorOf} and {@link minorOf} undone. */
export function makeDevice(major: number, minor: number): bigint {
  const [high, low] = [BigInt(major), BigInt(minor)]
  return ((high & 0xffff_f000n) << 32n) | ((high & 0xfffn) << 8n) | ((low & 0xffff_ff00n) << 12n) | (low & 0xffn)
}

/** {@link makeDevice} of a `major:minor`. */
export function makeDeviceOf(numbers: string): bigint {
  const [major = 0, minor = 0] = numbers.split(':').map(Number)
  return makeDevice(major, minor)
}

/** Device numbers of that size need no bigints: majors up to 4095, that is. */
const SMALL = 0xffff_ffffn

export function majorOf(device: bigint): number {
  if (device <= SMALL) return (Number(device) >>> 8) & 0xfff
  return Number(((device >> 8n) & 0xfffn) | ((device >> 32n) & 0xffff_f000n))
}

export function minorOf(device: bigint): number {
  if (device <= SMALL) return (Number(device) & 0xff) | ((Number(device) >>> 12) & 0xf_ff00)
  return Number((device & 0xffn) | ((device >> 12n) & 0xffff_ff00n))
}

/** What is of use of struct statx. */
export interface Stat {
  /** File type and permissions, `st_mode`. */
  mode: number
  /** As `st_dev` of stat(2) has it. */
  device: bigint
  inode: bigint
  size: bigint
  user: number
  group: number
  /** `major:minor` of the device that a device node stands for. */
  rdevice: string
}

export const STATX_SIZE = 256

/** A zeroed struct statx for the kernel to fill. */
export function newStat(): Uint8Array {
  return new Uint8Array(STATX_SIZE)
}

export function decodeStat(stat: Struct): Stat {
  const { data, at } = placeOf(stat)
  return {
    mode: data.getUint16(at + 28, little),
    device: makeDevice(data.getUint32(at + 136, little), data.getUint32(at + 140, little)),
    inode: data.getBigUint64(at + 32, little),
    size: data.getBigUint64(at + 40, little),
    user: data.getUint32(at + 20, little),
    group: data.getUint32(at + 24, little),
    rdevice: `${data.getUint32(at + 128, little)}:${data.getUint32(at + 132, little)}`,
  }
}

/** What is of use of struct statx about the mount that a path is on. */
export interface MountStat extends Stat {
  /** Of the owner. */
  uid: number
  /** `major:minor` of the filesystem, as mountinfo has it. */
  filesystem: string
  /** Undefined before kernel 5.8. */
  mountId: bigint | undefined
}

// Bits of stx_mask: STATX_MNT_ID, STATX_MNT_ID_UNIQUE
const HAS_MOUNT_ID = 0x1000 | 0x4000

export function decodeMountStat(bytes: Uint8Array): MountStat {
  const data = view(bytes)
  return {
    ...decodeStat(bytes),
    uid: data.getUint32(20, little),
    filesystem: `${data.getUint32(136, little)}:${data.getUint32(140, little)}`,
    mountId: (data.getUint32(0, little) & HAS_MOUNT_ID) === 0 ? undefined : data.getBigUint64(144, little),
  }
}

/** What a device over these bytes shows: whole sectors of 512. */
export function visibleSize(fileSize: bigint, offset: bigint, sizeLimit: bigint): bigint {
  const rest = fileSize > offset ? fileSize - offset : 0n
  const shown = sizeLimit > 0n && sizeLimit < rest ? sizeLimit : rest
  return (shown / 512n) * 512n
}
