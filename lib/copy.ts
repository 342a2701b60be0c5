/** The bytes that a device shows, into another file at the same place: by the cheapest way the filesystems allow. */

import { constants } from 'node:os'
import type { Extent } from './compare.ts'
import type { Deadline } from './deadline.ts'
import { refusal } from './errors.ts'
import type { Handle } from './handle.ts'
import { binding } from './kernel/binding.ts'
import * as files from './kernel/files.ts'
import { readBackingFile } from './kernel/sysfs.ts'
import type { LoopInfo64 } from './kernel/uapi.ts'
import { explain } from './reasons.ts'

const { EINVAL, ENOSYS, ENOTSUP, EXDEV, ENXIO } = constants.errno

/**
 * `reflink`: the blocks are shared; `copy_file_range`: copied in the kernel; `read-write`: read from the backing file,
 * between two filesystems; `device`: read from the device, where the backing file cannot be reached.
 */
export type CopyMethod = 'reflink' | 'copy_file_range' | 'read-write' | 'device'

export interface CopyResult {
  bytesCopied: number
  bytesSparse: number
  method: CopyMethod
}

/** Where the bytes are read from. */
export interface Source {
  fd: number
  path: string
  /** Where in it the device's window begins: a device shows nothing else. */
  start: bigint
  /** The backing file itself, which has holes and can be shared; else the device. */
  isFile: boolean
  /** Permission bits for the copy. */
  mode: number
  /** Bytes of the file. */
  size: bigint
  close(): Promise<void>
}

/** The part of the file that the device shows. */
export interface CopyWindow {
  start: bigint
  size: bigint
  sparse: boolean
}

/**
 * The backing file where its path leads to the very file, else the device: what that shows can be something else, since
 * a mounted ext4 changes bytes of the device's page cache that never reach a read-only file.
 */
export async function openSource(target: Handle, info: LoopInfo64): Promise<Source> {
  const path = await readBackingFile(target.number)
  const fd = path === undefined ? -1 : await openVeryFile(path, info)
  if (path === undefined || fd < 0) {
    const { descriptor, path: devicePath } = target
    return { fd: descriptor, path: devicePath, start: 0n, isFile: false, mode: 0o600, size: 0n, close: async () => {} }
  }
  const stat = await files.fstat(fd)
  const [mode, size] = typeof stat === 'number' ? [0o600, 0n] : [stat.mode & 0o777, stat.size]
  const close = async () => {
    await files.close(fd)
  }
  return { fd, path, start: info.offset, isFile: true, mode, size, close }
}

/** -1 where it is another file, none any more, or no regular one. */
async function openVeryFile(path: string, info: LoopInfo64): Promise<number> {
  const before = await files.stat(path)
  if (typeof before === 'number' || !before.isFile()) return -1
  const fd = await files.open(path, files.O_RDONLY | files.O_NONBLOCK)
  if (fd < 0) return -1
  const stat = await files.fstat(fd)
  if (typeof stat !== 'number' && stat.isFile() && stat.dev === info.device && stat.ino === info.inode) {
    // It may go back to the kernel.
    binding().fcntlSetFlSync(fd, 0)
    return fd
  }
  await files.close(fd)
  return -1
}

/**
 * @param onChunk called with the bytes of the window that are done, holes included
 * @throws `no-space`, `io`, the deadline's abort
 */
export async function copyWindow(
  source: Source,
  to: { fd: number; path: string },
  window: CopyWindow,
  deadline: Deadline,
  onChunk: (done: bigint) => void,
): Promise<CopyResult> {
  const { start, size, sparse } = window
  const end = start + size
  onChunk(0n)
  const extents = source.isFile && sparse ? await findExtents(source.fd, { start, end }) : [{ start, end }]
  const isWhole = start === 0n && source.size - size < 512n
  if (source.isFile && sparse && isWhole && (await binding().ficlone(to.fd, source.fd)) >= 0) {
    onChunk(size)
    return resultOf(sumOf(extents), size, 'reflink')
  }
  // A device tells nothing of its holes: there only the writing can find out.
  if (source.isFile || !sparse) await checkRoom(to.path, sumOf(extents))
  const sized = await files.truncate(to.fd, Number(end))
  if (sized < 0) throw explain({ call: 'ftruncate', errno: sized, path: to.path }, 'create destination')

  const copier = new Copier(source, to, window, deadline, onChunk)
  for (const extent of extents) await copier.copy(extent)
  onChunk(size)
  return resultOf(copier.copied, size, copier.method)
}

function sumOf(extents: Extent[]): bigint {
  return extents.reduce((sum, { start, end }) => sum + end - start, 0n)
}

function resultOf(copied: bigint, size: bigint, method: CopyMethod): CopyResult {
  return { bytesCopied: Number(copied), bytesSparse: Number(size - copied), method }
}

async function checkRoom(path: string, needed: bigint): Promise<void> {
  const room = await files.roomAt(path)
  if (typeof room === 'number' || room >= needed) return
  throw refusal('no-space', 'statfs', `needs ${needed} bytes, and ${room} are free`, { path })
}

/** The data of the window: SEEK_DATA and SEEK_HOLE. */
async function findExtents(fd: number, window: Extent): Promise<Extent[]> {
  const extents: Extent[] = []
  for (let at = window.start; at < window.end;) {
    const data = await binding().lseekData(fd, at)
    // Nothing but a hole up to the end
    if (data === -ENXIO) break
    const hole = data < 0 ? data : await binding().lseekHole(fd, BigInt(data))
    // A filesystem that cannot tell: all of it is data.
    if (hole < 0) return [window]
    const start = BigInt(data)
    if (start >= window.end) break
    const end = BigInt(hole) < window.end ? BigInt(hole) : window.end
    extents.push({ start, end })
    at = end
  }
  return extents
}

/**
 * What has to be compared, counted from where the window begins: all but what is a hole in both files. Of a device all
 * has to be read.
 */
export async function findComparable(source: Source, copyFd: number, { start, size }: CopyWindow): Promise<Extent[]> {
  const window = { start, end: start + size }
  if (!source.isFile) return [{ start: 0n, end: size }]
  const extents = [...(await findExtents(source.fd, window)), ...(await findExtents(copyFd, window))]
  const merged: Extent[] = []
  for (const extent of extents.toSorted((a, b) => (a.start < b.start ? -1 : 1))) {
    const last = merged.at(-1)
    if (last === undefined || extent.start > last.end) merged.push({ ...extent })
    else if (extent.end > last.end) last.end = extent.end
  }
  return merged.map((extent) => ({ start: extent.start - start, end: extent.end - start }))
}

const KERNEL_CHUNK = 8n << 20n
const CHUNK = 1 << 20
/** Zeros of a device are left out in pieces of this size. */
const BLOCK = 4096
const ZEROS = Buffer.alloc(BLOCK)

/** The window's place is the same in both files, so a position is all that is to be known. */
class Copier {
  method: CopyMethod
  copied = 0n
  readonly #source: Source
  readonly #to: { fd: number; path: string }
  readonly #window: CopyWindow
  readonly #deadline: Deadline
  readonly #onChunk: (done: bigint) => void
  readonly #buffer = files.newBuffer(CHUNK)

  constructor(
    source: Source,
    to: { fd: number; path: string },
    window: CopyWindow,
    deadline: Deadline,
    onChunk: (done: bigint) => void,
  ) {
    this.#source = source
    this.#to = to
    this.#window = window
    this.#deadline = deadline
    this.#onChunk = onChunk
    // Copied in the kernel, holes can stay holes: xfs and btrfs share them.
    this.method = !source.isFile ? 'device' : window.sparse ? 'copy_file_range' : 'read-write'
  }

  async copy({ start, end }: Extent): Promise<void> {
    for (let at = start; at < end;) {
      this.#deadline.throwIfAborted()
      at += this.method === 'copy_file_range' ? await this.#inKernel(at, end) : await this.#readAndWrite(at, end)
      this.#onChunk(at - this.#window.start)
    }
  }

  /** 0 where the kernel does not copy between these two: the method is another one then. */
  async #inKernel(at: bigint, end: bigint): Promise<bigint> {
    const length = end - at < KERNEL_CHUNK ? end - at : KERNEL_CHUNK
    const count = await binding().copyFileRange(this.#source.fd, this.#to.fd, at, length)
    if (count > 0) {
      this.copied += BigInt(count)
      return BigInt(count)
    }
    if (count === 0 || [-EXDEV, -EINVAL, -ENOSYS, -ENOTSUP].includes(count)) {
      this.method = 'read-write'
      return 0n
    }
    throw explain({ call: 'copy_file_range', errno: count, path: this.#to.path }, 'create destination')
  }

  async #readAndWrite(at: bigint, end: bigint): Promise<bigint> {
    const length = Number(end - at < CHUNK ? end - at : CHUNK)
    const position = at - this.#window.start + this.#source.start
    const count = await files.readAt(this.#source.fd, this.#buffer, length, position)
    if (count < 0) throw explain({ call: 'read', errno: count, path: this.#source.path })
    if (count === 0) throw refusal('io', 'read', `ends at byte ${position}`, { path: this.#source.path })
    const data = this.#buffer.subarray(0, count)
    if (this.method === 'device' && this.#window.sparse) await this.#writeWithoutZeros(data, Number(at))
    else await this.#write(data, Number(at))
    return BigInt(count)
  }

  async #writeWithoutZeros(data: Buffer, at: number): Promise<void> {
    for (let from = 0; from < data.length;) {
      while (from < data.length && isZero(data, from)) from += BLOCK
      let to = from
      while (to < data.length && !isZero(data, to)) to += BLOCK
      if (from < data.length) await this.#write(data.subarray(from, Math.min(to, data.length)), at + from)
      from = to
    }
  }

  async #write(data: Buffer, at: number): Promise<void> {
    for (let written = 0; written < data.length;) {
      const rest = data.subarray(written)
      const count = await files.writeAt(this.#to.fd, rest, rest.length, at + written)
      if (count < 0) throw explain({ call: 'write', errno: count, path: this.#to.path }, 'create destination')
      written += count
      this.copied += BigInt(count)
    }
  }
}

function isZero(data: Buffer, at: number): boolean {
  const end = Math.min(at + BLOCK, data.length)
  return data.compare(ZEROS, 0, end - at, at, end) === 0
}
