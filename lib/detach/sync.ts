/** detachSync(), for exit handlers: it waits for the kernel for at most a second, and never for users of the device. */

import { constants } from 'node:os'
import { Deadline } from '../common/deadline.ts'
import { type Handle, SYNC_MS } from '../handle/handle.ts'
import { noteFree } from '../handle/free-devices.ts'
import { GivenUp } from '../kernel/bounded.ts'
import { callWithinSync } from '../kernel/bounded-sync.ts'
import { Sequence, type Step } from '../kernel/sequence.ts'
import { removeUnusedSync } from '../partitions/blkpg.ts'
import { removeNodesOfGone } from '../partitions/nodes.ts'
import { attachmentOf, isStillAttached } from './confirm.ts'
import type { DetachResult } from './detach.ts'
import { Detaching, type Present, readPresent } from './detaching.ts'

const { EBADF, ENOTTY, ENXIO, ETIMEDOUT } = constants.errno

/** Milliseconds of {@link SYNC_MS} that the flush may take, and the removal of partitions after it. */
const FLUSH_MS = 750
const PARTITIONS_MS = 100

/**
 * With an operation in flight that one keeps the descriptor until it ends. A call that does not come back in time is left
 * to its thread: the device goes when it has.
 */
export function detachSync(handle: Handle): DetachResult {
  if (handle.isClosing) throw handle.closedError()
  const attachment = attachmentOf(handle.number, handle.ref.diskSeq)
  const deadline = new Deadline(SYNC_MS)
  let present: Present | undefined
  try {
    present = requestDetach(handle, deadline)
  } catch (error) {
    // A detach in flight has asked for it already, and may have let go of it between our calls.
    if (!handle.isRunning || !isGone(handle, deadline)) throw error
  }
  const closed = handle.closeSync(deadline.left)
  removeNodesOfGone(handle.number, present?.partitions ?? [])
  if (!closed || isStillAttached(attachment)) return 'deferred'
  noteFree(handle.number)
  return 'detached'
}

/** Not attached any more; ENOTTY where the descriptor has been vacated. */
function isGone({ number, descriptor }: Handle, { left }: Deadline): boolean {
  const answer = callWithinSync(left, number, 'loopGetFlags', descriptor)
  return answer !== undefined && [-ENXIO, -ENOTTY, -EBADF].includes(answer)
}

function requestDetach(handle: Handle, deadline: Deadline): Present {
  const present = readPresent(handle)
  const work = new Detaching(handle, deadline, true)
  if (!work.isFlushed) work.noteFlush(flush(handle))
  removeUnusedSync(handle, present.added, PARTITIONS_MS)
  const cleared = clear(handle, deadline.left)
  if (cleared.answer !== undefined && cleared.answer < 0) throw handle.explain('LOOP_CLR_FD', cleared.answer)
  return present
}

/**
 * The answer of fsync(2); ETIMEDOUT where there is none. The filesystem is asked for something else before: that call
 * ends with the process, while a process that is in fsync(2) of a device whose server is silent cannot end.
 */
function flush({ number, descriptor }: Handle): number {
  const sequence = new Sequence(true)
  sequence.try('loopGetFlags', descriptor)
  const flushed = sequence.call('fsync', descriptor)
  return runWithin(sequence, FLUSH_MS, number) ? (flushed.answer ?? 0) : -ETIMEDOUT
}

/** LOOP_CLR_FD, which has no answer where it does not come back; and the last close, but for an operation in flight. */
function clear({ number, descriptor, isRunning, ref: { diskSeq } }: Handle, ms: number): Step {
  const sequence = new Sequence(true)
  const cleared = sequence.call('loopClrFd', descriptor)
  if (!isRunning) sequence.try('vacate', descriptor)
  // Its thread had not come to LOOP_CLR_FD, on a busy machine: as long as it is the same attachment, it is detached then.
  if (diskSeq !== undefined) {
    sequence.undoing()
    sequence.expect(diskSeq, 'blkGetDiskSeq', descriptor)
    sequence.call('loopClrFd', descriptor)
  }
  runWithin(sequence, ms, number)
  return cleared
}

function runWithin(sequence: Sequence, ms: number, number: number): boolean {
  try {
    sequence.runWithinSync(ms, number)
    return true
  } catch (error) {
    if (error instanceof GivenUp) return false
    throw error
  }
}
