/** The bytes that a device shows, into another file at the same place: by the cheapest way the filesystems allow. */

import { constants } from 'node:os'
import type { Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Handle } from '../handle/handle.ts'
import { type Asked, type Bounded, within } from '../kernel/bounded.ts'
import {
  COUNT_ONLY,
  copyExtents,
  type CopyStep,
  IN_KERNEL,
  LEAVE_OUT_ZEROS,
  LOOK_FOR_HOLES,
  startWriting,
} from '../kernel/extents.ts'
import { closeSoon } from '../kernel/files.ts'
import * as folder from '../kernel/folder.ts'
import { readBackingFile } from '../kernel/sysfs.ts'
import type { LoopInfo64 } from '../kernel/uapi.ts'
import { BATCH, endsEarly } from './compare.ts'
import { assertNotOver } from './progress.ts'

const { EINVAL, ENOSYS, ENOTSUP, EXDEV } = constants.errno

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

/** For the copy, once the device is backed by it. */
export interface Owner {
  /** Undefined: stays that of this process. */
  user: number | undefined
  group: number
  /** Permission bits. */
  mode: number
}

/** Where the bytes are read from. */
export interface Source {
  fd: number
  path: string
  /** Who answers for it. */
  asked: Asked
  /** Where in it the device's window begins: a device shows nothing else. */
  start: bigint
  /** The backing file itself, which has holes and can be shared; else the device. */
  isFile: boolean
  /** Undefined: only the device is left of it, and what it was cannot be told. */
  owner: Owner | undefined
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
  const source = path === undefined ? undefined : await openFile(path, info, within(target.bound, path))
  if (source !== undefined) return source
  const { descriptor: fd, path: devicePath, number: asked } = target
  return { fd, path: devicePath, asked, start: 0n, isFile: false, owner: undefined, size: 0n, close: keep }
}

/** Undefined where the path does not lead to the file. */
async function openFile(path: string, info: LoopInfo64, calls: Bounded): Promise<Source | undefined> {
  const file = await folder.openRegularFile(calls, path)
  if (typeof file === 'number') return undefined
  const { fd, stat } = file
  const close = () => closeSoon(fd)
  try {
    if (folder.isSameFile(stat, info)) {
      const owner = await ownerOf(calls, file)
      return { fd, path, asked: path, start: info.offset, isFile: true, owner, size: stat.size, close }
    }
  } catch (error) {
    await close()
    throw error
  }
  await close()
  return undefined
}

/** The descriptor is the handle's. */
async function keep(): Promise<void> {}

/** On a read-only filesystem the owner cannot write, and must not be able to write the copy either. */
async function ownerOf(calls: Bounded, { fd, stat }: folder.OpenFile): Promise<Owner> {
  const filesystem = await folder.statFilesystem(calls, fd)
  const isWritable = typeof filesystem !== 'number' && !filesystem.readOnly
  return { user: isWritable ? stat.user : undefined, group: stat.group, mode: stat.mode & 0o777 }
}

/**
 * @param onBatch called with the bytes of the window that are done, holes included
 * @throws `no-space`, `replaced` where the device ends early, `io`, `timeout`, the signal's reason
 */
export async function copyWindow(
  source: Source,
  to: { fd: number; path: string },
  window: CopyWindow,
  deadline: Deadline,
  onBatch: (done: bigint) => void,
): Promise<CopyResult> {
  onBatch(0n)
  const { start, size, sparse } = window
  const copier = new Copier(source, to, window, deadline, onBatch)
  const calls = within(deadline.bound, to.path)
  const isWhole = start === 0n && source.size - size < 512n
  if (source.isFile && sparse && isWhole && (await calls.ficlone(to.fd, source.fd)) >= 0) {
    const data = await copier.count()
    onBatch(size)
    return resultOf(data, size, 'reflink')
  }
  await copier.checkRoom()
  const sized = await calls.ftruncate(to.fd, start + size)
  if (sized < 0) throw explain({ call: 'ftruncate', errno: sized, path: to.path }, 'create destination')
  await copier.copy()
  onBatch(size)
  return resultOf(copier.copied, size, copier.method)
}

function resultOf(copied: bigint, size: bigint, method: CopyMethod): CopyResult {
  return { bytesCopied: Number(copied), bytesSparse: Number(size - copied), method }
}

/** Answers of copy_file_range(2) after which the bytes have to go through this process. */
const NOT_IN_KERNEL = new Set([0, -EXDEV, -EINVAL, -ENOSYS, -ENOTSUP])

/** Bytes of data; in smaller pieces the medium would be slower. */
const SENT_AT_ONCE = 16n << 20n

/** The window's place is the same in both files, so a position is all that is to be known. */
class Copier {
  method: CopyMethod
  copied = 0n
  /** Copied and not yet on its way to the medium, in bytes of data, and where that begins. */
  #unsent = 0n
  #sentTo = 0n
  readonly #source: Source
  readonly #to: { fd: number; path: string }
  readonly #window: CopyWindow
  readonly #deadline: Deadline
  readonly #onBatch: (done: bigint) => void
  readonly #calls: { source: Bounded; to: Bounded }

  constructor(
    source: Source,
    to: { fd: number; path: string },
    window: CopyWindow,
    deadline: Deadline,
    onBatch: (done: bigint) => void,
  ) {
    this.#source = source
    this.#to = to
    this.#window = window
    this.#deadline = deadline
    this.#onBatch = onBatch
    this.#calls = { source: within(deadline.bound, source.asked), to: within(deadline.bound, to.path) }
    // Copied in the kernel, holes can stay holes: xfs and btrfs share them.
    this.method = !source.isFile ? 'device' : window.sparse ? 'copy_file_range' : 'read-write'
  }

  async copy(): Promise<void> {
    const { start, size } = this.#window
    for (let at = start; at < start + size;) {
      const step = await this.#step(at, this.#flags)
      this.copied += step.copied
      await this.#startWriting(step)
      at = step.at
      this.#onBatch(at - start)
      if (step.fault === 'copy_file_range' && NOT_IN_KERNEL.has(step.error)) this.method = 'read-write'
      else if (step.fault) throw this.#failure(step)
    }
  }

  /** While the rest is copied, the medium is at work already: the flush is the shorter. */
  async #startWriting({ at, copied }: CopyStep): Promise<void> {
    this.#unsent += copied
    if (this.#unsent < SENT_AT_ONCE) return
    await startWriting(this.#calls.to, this.#to.fd, this.#sentTo, at)
    this.#unsent = 0n
    this.#sentTo = at
  }

  /** Bytes of data in the window. */
  async count(): Promise<bigint> {
    const { start, size } = this.#window
    let data = 0n
    for (let at = start; at < start + size;) {
      const step = await this.#step(at, LOOK_FOR_HOLES | COUNT_ONLY)
      data += step.copied
      at = step.at
    }
    return data
  }

  /** Holes need no room; they are looked for only where there is not enough for all. Of a device only copying tells. */
  async checkRoom(): Promise<void> {
    const filesystem = await folder.statFilesystem(this.#calls.to, this.#to.fd)
    const room = typeof filesystem === 'number' ? undefined : filesystem.room
    const { size, sparse } = this.#window
    if (room === undefined || room >= size || (!this.#source.isFile && sparse)) return
    const needed = sparse ? await this.count() : size
    if (room >= needed) return
    throw refusal('no-space', 'statfs', `needs ${needed} bytes, and ${room} are free`, { path: this.#to.path })
  }

  async #step(at: bigint, flags: number): Promise<CopyStep> {
    assertNotOver(this.#deadline, this.#to.path)
    const { start, size } = this.#window
    return copyExtents(
      this.#calls.source,
      this.#source.fd,
      this.#to.fd,
      { at, end: start + size, shift: this.#source.start - start, flags },
      BATCH,
    )
  }

  get #flags(): number {
    const { sparse } = this.#window
    if (this.method === 'device') return sparse ? LEAVE_OUT_ZEROS : 0
    return (sparse ? LOOK_FOR_HOLES : 0) | (this.method === 'copy_file_range' ? IN_KERNEL : 0)
  }

  #failure({ fault, error, at }: CopyStep): Error {
    const { path, start } = this.#source
    if (fault === 'ends') return endsEarly(this.#source, at - this.#window.start + start)
    if (fault === 'read') return explain({ call: 'read', errno: error, path })
    return explain({ call: fault ?? 'write', errno: error, path: this.#to.path }, 'create destination')
  }
}
