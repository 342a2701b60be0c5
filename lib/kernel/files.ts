/**
 * Files, in the manner of the addon: a value, or the negative errno. What can wait for a filesystem runs on a thread of
 * the addon, with an end where there is a bound (bounded.ts). Descriptors are plain numbers of the addon's: exit handlers
 * must be able to close them, and what an environment has open is closed when it ends. So whatever is opened here must
 * be closed here. What is left to node:fs is looked at at once, in sysfs, procfs and /dev, where nothing hangs.
 */

import type { BigIntStats } from 'node:fs'
import { constants } from 'node:os'
import { binding } from './binding.ts'
import { type Bound, GivenUp, leaveToThread, UNDOING, within } from './bounded.ts'
import { observed } from './observe-calls.ts'
import { decodeStat, encodePath, makeDeviceOf, newStat, type Stat } from './uapi.ts'

// An import would read all that node:fs exports, and so load its streams: a millisecond of every start.
const fs = process.getBuiltinModule('node:fs')

const { ENOENT } = constants.errno

type PathLike = string | Buffer

export const O_CREAT: number = fs.constants.O_CREAT
export const O_RDONLY: number = fs.constants.O_RDONLY
export const O_RDWR: number = fs.constants.O_RDWR
export const O_WRONLY: number = fs.constants.O_WRONLY
export const O_EXCL: number = fs.constants.O_EXCL
export const O_NONBLOCK: number = fs.constants.O_NONBLOCK
export const O_APPEND: number = fs.constants.O_APPEND
export const O_ACCMODE = 3
/** Not in node:fs. The same on all of Linux's architectures. */
export const O_PATH = 0o10000000

function errnoOf(error: NodeJS.ErrnoException): number {
  return error.errno ?? -5
}

function answerSync<T>(name: string, path: PathLike, call: (path: PathLike) => T): T | number {
  try {
    return observed(name, call)(path)
  } catch (error) {
    return errnoOf(error as NodeJS.ErrnoException)
  }
}

/** open(2). Of those that make a file only `O_CREAT | O_EXCL`, with the mode. */
export function open(path: PathLike, flags: number, mode = 0o600, bound?: Bound): Promise<number> {
  const calls = within(bound, nameOf(path))
  const creates = (flags & O_CREAT) !== 0
  return creates ? calls.create(encodePath(path), flags, mode) : calls.open(encodePath(path), flags)
}

export function openSync(path: PathLike, flags: number): number {
  return binding().openSync(encodePath(path), flags)
}

/**
 * The descriptor is gone whatever the answer is: where a call that was given up on uses it, it is left to the thread of
 * that. Closing a loop device can be what detaches it, and may take long.
 */
export async function close(fd: number, bound?: Bound): Promise<number> {
  return leaveToThread(fd) ? 0 : within(bound).close(fd)
}

/** Closes it, where there is one; what takes longer than a second, as a server may be asked, is left to its thread. */
export async function closeSoon(fd: number): Promise<void> {
  if (fd < 0) return
  try {
    await close(fd, UNDOING)
  } catch (error) {
    if (!(error instanceof GivenUp)) throw error
    // No thread was to be had for it so far.
    if (!error.hasBegun) void close(fd)
  }
}

export function closeSync(fd: number): number {
  return leaveToThread(fd) ? 0 : binding().closeSync(fd)
}

export function fsync(fd: number, bound?: Bound): Promise<number> {
  return within(bound).fsync(fd)
}

export function stat(path: PathLike, bound?: Bound): Promise<FileStat | number> {
  return statBy((bytes) => within(bound, nameOf(path)).statxPath(encodePath(path), bytes))
}

/** Of a link itself. */
export function lstat(path: PathLike, bound?: Bound): Promise<FileStat | number> {
  return statBy((bytes) => within(bound, nameOf(path)).statxLink(encodePath(path), bytes))
}

export function fstat(fd: number, bound?: Bound): Promise<FileStat | number> {
  return statBy((bytes) => within(bound).statx(fd, bytes))
}

async function statBy(call: (bytes: Uint8Array) => Promise<number>): Promise<FileStat | number> {
  const bytes = newStat()
  const answer = await call(bytes)
  return answer < 0 ? answer : new FileStat(decodeStat(bytes))
}

/** The type of a file, in `st_mode`. */
const TYPE = 0o170000

/** What stat(2) says, by its names. */
export class FileStat {
  readonly mode: number
  readonly dev: bigint
  readonly ino: bigint
  readonly size: bigint
  /** Of the device that a device node stands for. */
  readonly rdev: bigint

  constructor({ mode, device, inode, size, rdevice }: Stat) {
    this.mode = mode
    this.dev = device
    this.ino = inode
    this.size = size
    this.rdev = makeDeviceOf(rdevice)
  }

  isFile(): boolean {
    return (this.mode & TYPE) === 0o100000
  }

  isBlockDevice(): boolean {
    return (this.mode & TYPE) === 0o060000
  }

  isDirectory(): boolean {
    return (this.mode & TYPE) === 0o040000
  }

  isSymbolicLink(): boolean {
    return (this.mode & TYPE) === 0o120000
  }

  isFIFO(): boolean {
    return (this.mode & TYPE) === 0o010000
  }
}

function nameOf(path: PathLike): string {
  return path.toString()
}

/** An exception costs ten times as much as the look. */
const QUIETLY = { bigint: true, throwIfNoEntry: false } as const

export function statSync(path: PathLike): BigIntStats | number {
  return answerSync('statSync', path, (it) => fs.statSync(it, QUIETLY) ?? -ENOENT)
}

export function lstatSync(path: PathLike): BigIntStats | number {
  return answerSync('lstatSync', path, (it) => fs.lstatSync(it, QUIETLY) ?? -ENOENT)
}

export function unlinkSync(path: string): number {
  return answerSync('unlinkSync', path, (it) => (fs.unlinkSync(it), 0))
}

export function existsSync(path: string): boolean {
  return observed('existsSync', fs.existsSync)(path)
}

/** Whether the caller may read, write or (0) see the path. */
export function access(path: PathLike, mode: number, bound?: Bound): Promise<number> {
  return within(bound, nameOf(path)).access(encodePath(path), mode)
}

export function readAt(
  fd: number,
  buffer: Uint8Array,
  length: number,
  position: number | bigint,
  bound?: Bound,
): Promise<number> {
  return within(bound).pread(fd, buffer.subarray(0, length), BigInt(position))
}

export function writeAt(
  fd: number,
  buffer: Uint8Array,
  length: number,
  position: number,
  bound?: Bound,
): Promise<number> {
  return within(bound).pwrite(fd, buffer.subarray(0, length), BigInt(position))
}

export function truncate(fd: number, size: number, bound?: Bound): Promise<number> {
  return within(bound).ftruncate(fd, BigInt(size))
}

export function link(existing: string, path: string, bound?: Bound): Promise<number> {
  return within(bound, path).link(encodePath(existing), encodePath(path))
}

export function rename(from: string, to: string, bound?: Bound): Promise<number> {
  return within(bound, to).rename(encodePath(from), encodePath(to))
}

export function unlink(path: string, bound?: Bound): Promise<number> {
  return within(bound, path).unlink(encodePath(path))
}

/** A small file, whole. */
export function readFile(path: string, bound?: Bound): Promise<Buffer | number> {
  return within(bound, path).readWhole(encodePath(path))
}

export function readFileSync(path: string): Buffer | number {
  return answerSync('readFileSync', path, (it) => fs.readFileSync(it))
}

/** Names that are no UTF-8 are not told rightly. */
export async function readDirectory(path: string, bound?: Bound): Promise<string[] | number> {
  const names = await within(bound, path).readNames(encodePath(path))
  return typeof names === 'number' ? names : names.toString().split('\0').slice(0, -1)
}

export function readDirectorySync(path: string): string[] | number {
  return answerSync('readDirectorySync', path, (it) => fs.readdirSync(it))
}

/** Through all links; the path of a file that is there. */
export async function realPath(path: PathLike, bound?: Bound): Promise<string | number> {
  const fd = await open(path, O_PATH, 0, bound)
  if (fd < 0) return fd
  try {
    return readLinkSync(`/proc/self/fd/${fd}`)
  } finally {
    closeSync(fd)
  }
}

export function readLinkSync(path: string): string | number {
  return answerSync('readLinkSync', path, (it) => fs.readlinkSync(it))
}
