/** Whether two descriptors show the same bytes. */

import { constants } from 'node:os'
import type { Deadline } from './deadline.ts'
import { LoopError, refusal } from './errors.ts'
import { newBuffer, readAt } from './kernel/files.ts'
import { explain } from './reasons.ts'

const CHUNK = 1 << 20

/** Where to read: `path` for messages, `start` in bytes. */
export interface Window {
  fd: number
  path: string
  start: bigint
}

/** From `start` to before `end`, in bytes. */
export interface Extent {
  start: bigint
  end: bigint
}

/**
 * Compares the extents, which are counted from where the windows begin.
 *
 * @param onChunk called with the place that the comparison has come to
 * @throws `content-differs` with the first place that does, `io`, the deadline's abort
 */
export async function compareContents(
  left: Window,
  right: Window,
  extents: readonly Extent[],
  deadline: Deadline,
  onChunk: (compared: bigint) => void,
): Promise<void> {
  const buffers = [newBuffer(CHUNK), newBuffer(CHUNK)] as const
  for (const { start, end } of extents) {
    for (let at = start; at < end;) {
      deadline.throwIfAborted()
      const length = Number(end - at < CHUNK ? end - at : CHUNK)
      const [a, b] = await both(
        readFully(left, buffers[0].subarray(0, length), at),
        readFully(right, buffers[1].subarray(0, length), at),
      )
      if (!a.equals(b)) throw differs(left, right, at + BigInt(firstDifference(a, b)))
      at += BigInt(length)
      onChunk(at)
    }
  }
}

/** Ends when both have: a read that goes on would use a descriptor that the caller closes. */
async function both<T>(left: Promise<T>, right: Promise<T>): Promise<[T, T]> {
  await Promise.allSettled([left, right])
  return [await left, await right]
}

async function readFully(window: Window, buffer: Buffer, at: bigint): Promise<Buffer> {
  for (let filled = 0; filled < buffer.length;) {
    const position = window.start + at + BigInt(filled)
    const count = await readAt(window.fd, buffer.subarray(filled), buffer.length - filled, position)
    if (count < 0) throw explain({ call: 'read', errno: count, path: window.path })
    if (count === 0) {
      throw new LoopError({
        reason: 'io',
        errno: -constants.errno.EIO,
        syscall: 'read',
        path: window.path,
        detail: `ends at byte ${position}, in the middle of what is to be compared`,
      })
    }
    filled += count
  }
  return buffer
}

function firstDifference(a: Buffer, b: Buffer): number {
  return a.findIndex((byte, i) => byte !== b[i])
}

function differs(left: Window, right: Window, at: bigint): LoopError {
  return refusal('content-differs', 'read', `differs from ${left.path} at byte ${at} of the device`, {
    path: right.path,
    backingFile: right.path,
  })
}
