/** The partition table of an open file or device. */

import { explain } from '../errors/explain.ts'
import type { Handle } from '../handle/handle.ts'
import { readBlockSize, readSize } from '../handle/size.ts'
import type { Bound } from '../kernel/bounded.ts'
import { readAt } from '../kernel/files.ts'
import { type BlockReader, type FoundTable } from './disk.ts'
import { findTable } from './table.ts'

/** The bytes of a file that a device shows, or would show. */
export interface Window {
  /** Open for reading. */
  fd: number
  /** Where in the file it begins. */
  offset: bigint
  /** Bytes. */
  size: bigint
  /** For errors. */
  path: string
  /** How long a read may take. */
  bound?: Bound | undefined
}

/** A GPT of 128 entries has its primary copy in the first 24 KiB, and its backup in the last ones. */
const AHEAD = 32n << 10n

/**
 * Reads what a table is looked for in. The beginning and the end are read as a whole, for each read is a hop to a thread;
 * what cannot be read so, because of a bad sector that nobody asked for, is read piece by piece.
 */
export function readerOf({ fd, offset, size, path, bound }: Window): BlockReader {
  const kept = new Map<bigint, Promise<Uint8Array | undefined>>()
  const pieceAt = async (from: bigint, length: number): Promise<Uint8Array | number> => {
    const bytes = new Uint8Array(length)
    const count = await readAt(fd, bytes, length, offset + from, bound)
    return count < 0 ? count : bytes.subarray(0, count)
  }
  const wholeAt = (from: bigint): Promise<Uint8Array | undefined> => {
    const known = kept.get(from)
    if (known) return known
    const length = size - from < AHEAD ? size - from : AHEAD
    const read = pieceAt(from, Number(length)).then((piece) => (typeof piece === 'number' ? undefined : piece))
    kept.set(from, read)
    return read
  }
  return async (position, length) => {
    const tail = size > AHEAD ? size - AHEAD : 0n
    const end = position + BigInt(length)
    const from = end <= AHEAD ? 0n : position >= tail ? tail : undefined
    if (from !== undefined) {
      const whole = await wholeAt(from)
      const at = Number(position - from)
      if (whole && whole.length >= at + length) return whole.subarray(at, at + length)
    }
    const piece = await pieceAt(position, length)
    if (typeof piece === 'number') throw explain({ call: 'read', errno: piece, path, backingFile: path })
    return piece
  }
}

/** @throws `bad-partition-table`, `io` */
export async function findTableIn(window: Window, blockSize: number): Promise<FoundTable | undefined> {
  return findTable(readerOf(window), window.size, blockSize, window.path)
}

/** That of an attached device. @throws `bad-partition-table`, `io` */
export async function findTableOf(handle: Handle): Promise<FoundTable | undefined> {
  const { descriptor, path, bound } = handle
  const size = readSize(handle)
  const blockSize = readBlockSize(handle)
  // The rest of a block cannot be read.
  const whole = size - (size % BigInt(blockSize))
  return findTableIn({ fd: descriptor, offset: 0n, size: whole, path, bound }, blockSize)
}
