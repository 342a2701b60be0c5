/** detachSync(), for exit handlers, where nothing can be waited for. */

import { constants } from 'node:os'
import { Deadline } from '../common/deadline.ts'
import type { Handle } from '../handle/handle.ts'
import { noteFree } from '../handle/free-devices.ts'
import { binding } from '../kernel/binding.ts'
import { fsyncSync } from '../kernel/files.ts'
import { removeUnusedSync } from '../partitions/blkpg.ts'
import { removeNodesOfGone } from '../partitions/nodes.ts'
import { attachmentOf, isStillAttached } from './confirm.ts'
import type { DetachResult } from './detach.ts'
import { Detaching, type Present, readPresent } from './detaching.ts'

const { EBADF, ENOTTY, ENXIO } = constants.errno

/** Never waits for users of the device. With an operation in flight that one keeps the descriptor until it ends. */
export function detachSync(handle: Handle): DetachResult {
  if (handle.isClosing) throw handle.closedError()
  const attachment = attachmentOf(handle.number, handle.ref.diskSeq)
  let present: Present | undefined
  try {
    present = requestDetach(handle)
  } catch (error) {
    // A detach in flight has asked for it already, and may have let go of it between our calls.
    if (!handle.isRunning || !isGone(handle)) throw error
  }
  const closed = handle.closeSync()
  removeNodesOfGone(handle.number, present?.partitions ?? [])
  if (!closed || isStillAttached(attachment)) return 'deferred'
  noteFree(handle.number)
  return 'detached'
}

/** Not attached any more; ENOTTY where the descriptor has been vacated. */
function isGone({ descriptor }: Handle): boolean {
  return [-ENXIO, -ENOTTY, -EBADF].includes(binding().loopGetFlagsSync(descriptor))
}

function requestDetach(handle: Handle): Present {
  const present = readPresent(handle)
  const work = new Detaching(handle, new Deadline(0), true)
  if (!work.isFlushed) work.noteFlush(fsyncSync(handle.descriptor))
  removeUnusedSync(handle.number, handle.descriptor, present.added)
  const answer = binding().loopClrFdSync(handle.descriptor)
  if (answer < 0) throw handle.explain('LOOP_CLR_FD', answer)
  return present
}
