/** Whether two descriptors show the same bytes. */

import type { Deadline } from '../common/deadline.ts'
import { type LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { type Asked, within } from '../kernel/bounded.ts'
import { compareExtents, LOOK_FOR_HOLES } from '../kernel/extents.ts'
import { assertNotOver } from './progress.ts'

/** Milliseconds in native code between two looks at the signal. */
export const BATCH = 20

/** Where to read: `path` for messages, `start` in bytes, and who answers for it. */
export interface Window {
  fd: number
  path: string
  asked: Asked
  start: bigint
}

/**
 * Compares `size` bytes from where the windows begin. What is a hole in both files is not read; with `everything` all is.
 *
 * @param onBatch called with the place that the comparison has come to
 * @throws `content-differs` with the first place that does, `replaced` where a device ends early, `io`, `timeout`, the signal's reason
 */
export async function compareContents(
  left: Window,
  right: Window,
  { size, everything }: { size: bigint; everything: boolean },
  deadline: Deadline,
  onBatch: (compared: bigint) => void,
): Promise<void> {
  const flags = everything ? 0 : LOOK_FOR_HOLES
  const calls = within(deadline.bound, left.asked)
  for (let at = 0n; at < size;) {
    assertNotOver(deadline, right.path)
    const [fds, starts] = [[left.fd, right.fd] as const, [left.start, right.start] as const]
    const step = await compareExtents(calls, fds, starts, { at, end: size, flags }, BATCH)
    if (step.fault === 'differs') throw differs(left, right, step.at)
    const side = step.side === 0 ? left : right
    if (step.fault === 'ends') throw endsEarly(side, side.start + step.at)
    if (step.fault) throw explain({ call: 'read', errno: step.error, path: side.path })
    at = step.at
    onBatch(at)
  }
}

/** A device has its size for as long as nobody changes what it shows, even if they change it back. */
export function endsEarly({ path, asked }: Pick<Window, 'path' | 'asked'>, near: bigint): LoopError {
  if (typeof asked !== 'number') return refusal('io', 'read', `ends near byte ${near}, before all was read`, { path })
  return refusal('replaced', 'read', `ended near byte ${near}: somebody changed what it shows meanwhile`, {
    path,
    hint: 'try again with the device as it is now',
  })
}

function differs(left: Window, right: Window, at: bigint): LoopError {
  return refusal('content-differs', 'read', `differs from ${left.path} at byte ${at} of the device`, {
    path: right.path,
    backingFile: right.path,
  })
}
