/** The events of watch(), and how two readings of a device in sysfs become events. */

import type { LoopInfo } from './list.ts'

/** What happened to a device, and the device as it was then. */
export type LoopEvent =
  | {
      /**
       * `info` is the device as it is now; for `detach`, as it was when it was last seen attached. `resize`: its size
       * changed. `change`: anything else about it changed, such as the backing file by LOOP_CHANGE_FD.
       */
      type: 'attach' | 'detach' | 'change' | 'resize' | 'add'
      number: number
      info: LoopInfo
    }
  | { type: 'remove'; number: number }
  | {
      /**
       * Events were lost: `devices` are all devices, free ones too, as they are now. `overrun`: more happened than the
       * kernel or the reader could keep up with. `no-netlink`, the first event: the kernel sends no uevents here, so
       * the devices are polled about once a second.
       */
      type: 'resync'
      cause: 'overrun' | 'no-netlink'
      devices: LoopInfo[]
    }

/**
 * What the uevents of a device said since the last look at it began: the disk sequence numbers that it had when it was
 * removed or detached. By the number it is known whether that was before what the look has seen.
 */
export interface Hint {
  removed: readonly number[]
  detached: readonly number[]
}

export const NO_HINT: Hint = { removed: [], detached: [] }

/** What is known of a device. */
export interface Known {
  info: LoopInfo
  /** Free, and with the disk sequence number of what was attached: the kernel is about to give it a new one. */
  going: boolean
  /** False where the block size has not been read yet, and is a guess. */
  hasBlockSize: boolean
}

/** What is known of a device after a look at it. */
export function know(before: Known | undefined, now: LoopInfo): Known {
  const wasThere = before !== undefined && (before.info.attached || before.going)
  const going = wasThere && !now.attached && now.diskSeq === before.info.diskSeq
  return { info: now, going, hasBlockSize: true }
}

/** What must have happened between two looks. */
export function compare(
  number: number,
  before: Known | undefined,
  now: LoopInfo | undefined,
  hint: Hint = NO_HINT,
): LoopEvent[] {
  const was = before?.info
  if (was === undefined) return now === undefined ? [] : [{ type: 'add', number, info: now }, ...attaching(now)]
  const moved = was.diskSeq !== now?.diskSeq
  if (now === undefined) return [...detaching(was), { type: 'remove', number }]
  // Not by the hint alone: it can come after the look that saw what it is about, or be of what no look has seen yet.
  const isBetween = (diskSeq: number): boolean => (was.diskSeq ?? 0) <= diskSeq && diskSeq < (now.diskSeq ?? 0)
  if (moved && hint.removed.some(isBetween)) {
    return [...detaching(was), { type: 'remove', number }, { type: 'add', number, info: now }, ...attaching(now)]
  }
  if (was.attached && now.attached) {
    if (moved && (hint.detached.some(isBetween) || !canBeChangedFile(was, now)))
      return [...detaching(was), ...attaching(now)]
    return changes(was, now)
  }
  if (was.attached !== now.attached) return [...detaching(was), ...attaching(now)]
  // Free both times. In between it was attached, or it is another one; but a detach ends with a new number itself.
  return moved && !before?.going ? [{ type: 'change', number, info: now }] : []
}

function attaching(info: LoopInfo): LoopEvent[] {
  return info.attached ? [{ type: 'attach', number: info.number, info }] : []
}

function detaching(info: LoopInfo): LoopEvent[] {
  return info.attached ? [{ type: 'detach', number: info.number, info }] : []
}

/** LOOP_CHANGE_FD gives a new number too, and leaves all but the file as it is, of a read-only device. */
function canBeChangedFile(was: LoopInfo, now: LoopInfo): boolean {
  const { diskSeq: _, backingFile: _file, backingDeleted: _deleted, lower: _lower, ...rest } = was
  return was.readOnly && Object.entries(rest).every(([name, value]) => now[name as keyof typeof rest] === value)
}

function changes(was: LoopInfo, now: LoopInfo): LoopEvent[] {
  const names = [...new Set([...Object.keys(was), ...Object.keys(now)])] as (keyof LoopInfo)[]
  const differing = names.filter((name) => was[name] !== now[name])
  const { number } = now
  return [
    ...(differing.some((name) => name !== 'size') ? [{ type: 'change' as const, number, info: now }] : []),
    ...(differing.includes('size') ? [{ type: 'resize' as const, number, info: now }] : []),
  ]
}
