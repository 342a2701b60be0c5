/** Data of files, copied and compared extent by extent, many of them in one call: native/extents.cc. */

import type { Bounded } from './bounded.ts'
import { little } from './uapi.ts'

/** What is a hole is skipped. */
export const LOOK_FOR_HOLES = 1
/** copy_file_range(2), else pread(2) and pwrite(2). */
export const IN_KERNEL = 2
/** Zeros are not written, as the target is a hole there. */
export const LEAVE_OUT_ZEROS = 4
/** Nothing is copied: how much data there is. */
export const COUNT_ONLY = 8

export type Fault = 'read' | 'write' | 'copy_file_range' | 'ends' | 'differs'

/** As native/extents.cc numbers them. */
const FAULTS: readonly (Fault | undefined)[] = [undefined, 'read', 'write', 'copy_file_range', 'ends', 'differs']

const SIZE = 48

/** What one call did: on to `at`, where the fault is, if there is one. */
export interface Step {
  at: bigint
  fault: Fault | undefined
  /** The negative errno of the call that failed; 0 where none did. */
  error: number
}

export interface CopyStep extends Step {
  /** Bytes of data. */
  copied: bigint
}

/** Copies from `at` on, for that long. `shift` is from a place in the target to the one in the source. */
export async function copyExtents(
  calls: Bounded,
  from: number,
  to: number,
  { at, end, shift, flags }: { at: bigint; end: bigint; shift: bigint; flags: number },
  milliseconds: number,
): Promise<CopyStep> {
  const bytes = new Uint8Array(SIZE)
  const data = new DataView(bytes.buffer)
  data.setBigUint64(0, at, little)
  data.setBigUint64(8, end, little)
  data.setBigInt64(16, shift, little)
  data.setUint32(32, milliseconds, little)
  data.setUint32(36, flags, little)
  const answer = await calls.copyExtents(from, to, bytes)
  if (answer < 0) return { at, copied: 0n, fault: 'read', error: answer }
  return {
    at: data.getBigUint64(0, little),
    copied: data.getBigUint64(24, little),
    fault: FAULTS[data.getInt32(40, little)],
    error: data.getInt32(44, little),
  }
}

export interface ComparisonStep extends Step {
  /** Which of the two the fault is of: 0 left, 1 right. */
  side: number
}

/** Compares from `at` on, counted from both starts, for that long. */
export async function compareExtents(
  calls: Bounded,
  fds: readonly [left: number, right: number],
  starts: readonly [left: bigint, right: bigint],
  { at, end, flags }: { at: bigint; end: bigint; flags: number },
  milliseconds: number,
): Promise<ComparisonStep> {
  const bytes = new Uint8Array(SIZE)
  const data = new DataView(bytes.buffer)
  data.setBigUint64(0, at, little)
  data.setBigUint64(8, end, little)
  data.setBigUint64(16, starts[0], little)
  data.setBigUint64(24, starts[1], little)
  data.setUint32(32, milliseconds, little)
  data.setUint32(36, flags, little)
  const answer = await calls.compareExtents(...fds, bytes)
  if (answer < 0) return { at, side: 0, fault: 'read', error: answer }
  return {
    at: data.getBigUint64(0, little),
    fault: FAULTS[data.getInt16(40, little)],
    side: data.getInt16(42, little),
    error: data.getInt32(44, little),
  }
}

const SYNC_FILE_RANGE_WRITE = 2
const SYNC_FILE_RANGE_WRITE_AND_WAIT = 7

/** For the row of sync_file_range(2); a length of 0 is all the rest. */
function encodeRange(start: bigint, length: bigint): Uint8Array {
  const bytes = new Uint8Array(16)
  const data = new DataView(bytes.buffer)
  data.setBigUint64(0, start, little)
  data.setBigUint64(8, length, little)
  return bytes
}

/** What the row takes to write out the whole file, as {@link writeOut} does. */
export const WHOLE_FILE: readonly [range: Uint8Array, flags: number] = [
  encodeRange(0n, 0n),
  SYNC_FILE_RANGE_WRITE_AND_WAIT,
]

/** Sends what was written there on its way to the medium, without waiting for it: sync_file_range(2). */
export function startWriting(calls: Bounded, fd: number, start: bigint, end: bigint): Promise<number> {
  return calls.syncFileRange(fd, encodeRange(start, end - start), SYNC_FILE_RANGE_WRITE)
}

/** The same, and waits; what the filesystem itself notes about the file is for fsync(2). Not every filesystem can. */
export function writeOut(calls: Bounded, fd: number, start: bigint, end: bigint): Promise<number> {
  return calls.syncFileRange(fd, encodeRange(start, end - start), SYNC_FILE_RANGE_WRITE_AND_WAIT)
}
