/** Who else has the files that are changed: other loop devices, and swap. */

import { type BackingIdentity, conflicts, findAttachments, overlapError } from '../attach/overlap.ts'
import { refusal } from '../errors/errors.ts'
import type { Handle } from '../handle/handle.ts'
import type { Bound } from '../kernel/bounded.ts'
import { isSameFile, type OpenFile, statCached } from '../kernel/folder.ts'
import { readFile } from '../kernel/files.ts'
import { unescapeOctal } from '../kernel/mountinfo.ts'
import type { LoopInfo64, Stat } from '../kernel/uapi.ts'

/** The call that all of this is about, for errors. */
export const CHANGE = 'LOOP_CHANGE_FD'

/** The file must not be written through another device. */
export async function refuseOverlap(
  handle: Handle,
  backing: BackingIdentity,
  { offset, sizeLimit }: LoopInfo64,
): Promise<void> {
  const claim = { offset, sizeLimit, readOnly: true }
  const others = (await findAttachments(backing, handle.deadline.bound)).filter(
    ({ number }) => number !== handle.number,
  )
  const other = others.find((candidate) => conflicts(candidate, claim))
  if (other) throw overlapError(CHANGE, handle.path, backing, other)
}

/** What the device is backed by now, for the question who else has it attached. */
export function presentBacking({ device, inode, rdevice }: LoopInfo64): BackingIdentity {
  return {
    path: 'the present backing file',
    device,
    inode,
    rdevice: rdevice === 0n ? undefined : rdevice,
    opened: false,
    fd: -1,
  }
}

/** A file that is to be replaced: who uses it would go on with one that has no name any more. */
export async function refuseAttachedOrSwap(path: string, { fd, stat }: OpenFile, bound: Bound): Promise<void> {
  const [other] = await findAttachments({ path, fd, ...stat, rdevice: undefined, opened: fd >= 0 }, bound)
  if (other) throw overlapError(CHANGE, path, { path, fd, ...stat, rdevice: undefined, opened: false }, other)
  if (!(await isSwapFile(stat, bound))) return
  throw refusal('overlap', 'ioctl', 'is in use as swap', {
    path,
    backingFile: path,
    ioctl: CHANGE,
    hint: `swapoff ${path} first`,
  })
}

async function isSwapFile(file: Stat, bound: Bound): Promise<boolean> {
  const text = await readFile('/proc/swaps')
  if (typeof text === 'number') return false
  for (const line of text.toString().split('\n').slice(1)) {
    const [path, type] = line.split(/\s+/, 2)
    if (path === undefined || type !== 'file') continue
    const stat = await statCached(unescapeOctal(path), bound)
    if (typeof stat !== 'number' && isSameFile(stat, file)) return true
  }
  return false
}
