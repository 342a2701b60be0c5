/** Letting go of a device, and knowing whether it went: LOOP_CLR_FD answering 0 does not mean detached. */

import { checkBoolean } from '../common/arguments.ts'
import { checkDeadline, type Deadline, type Wait } from '../common/deadline.ts'
import { runPhases } from '../common/phases.ts'
import { LoopError } from '../errors/errors.ts'
import type { Handle } from '../handle/handle.ts'
import { attachmentOf, confirmGone, isStillAttached, lowerOf } from './confirm.ts'
import { Detaching } from './detaching.ts'
import { ClearLazilyPhase, ClearPhase, ExclusivePhase, FlushPhase, PresentPhase, VacatePhase } from './phases.ts'
import { takingBackLate } from './take-back.ts'
import { countUnderWay } from './under-way.ts'

export interface DetachOptions extends Wait {
  /**
   * If the device is in use, the kernel detaches it when its last user closes it. Default false: rejects with `in-use`.
   */
  lazy?: boolean | undefined
  /**
   * Detaches even if the last writes cannot be flushed because the server of the file is dead; there is then a warning
   * `data-lost`. Default false: rejects with `io`.
   */
  force?: boolean | undefined
  /** Milliseconds to wait for users that may finish by themselves, such as udev; 0: one try. Default 4 000. */
  timeout?: number | undefined
  /** When it is aborted, the call rejects with the signal's reason, and the device stays attached. */
  signal?: AbortSignal | undefined
}

/** `deferred`: somebody still uses the device; the kernel detaches it when the last of them has closed it. */
export type DetachResult = 'detached' | 'deferred'

/**
 * Detaches and closes the handle. When it rejects, the handle stays open and the attachment as it was.
 *
 * @param given the library's own, or checked by checkOptions()
 */
export async function detach(handle: Handle, given: DetachOptions): Promise<DetachResult> {
  const lazy = given.lazy === undefined ? false : checkBoolean('lazy', given.lazy)
  const force = given.force === undefined ? false : checkBoolean('force', given.force)
  const deadline = checkDeadline(given, 4_000)
  if (handle.isDetached) return 'detached'
  const operation = () => (lazy ? detachLazily(handle, deadline) : detachStrictly(handle, deadline, force))
  try {
    return await countUnderWay(() => handle.run(operation, deadline))
  } catch (error) {
    // The one before it, that was given up on, has succeeded while this one waited for its turn.
    if (LoopError.is(error, 'closed') && handle.isDetached) return 'detached'
    // detachSync() came in between: what this one has met is only that the device is going.
    const isGoing = LoopError.is(error, 'detaching') || LoopError.is(error, 'not-attached')
    if (isGoing && handle.isClosing) throw handle.closedError()
    throw error
  }
}

async function detachStrictly(handle: Handle, deadline: Deadline, force: boolean): Promise<DetachResult> {
  deadline.throwIfAborted()
  const attachments = [
    attachmentOf(handle.number, handle.ref.diskSeq),
    ...(handle.lowerNumber === undefined ? [] : await lowerOf(handle)),
  ]
  const work = new Detaching(handle, deadline, force)
  const phases = [
    new PresentPhase(work),
    new ExclusivePhase(work),
    new FlushPhase(work),
    new ClearPhase(work),
    new VacatePhase(work),
  ]
  await takingBackLate(work, () => runPhases(phases, deadline, handle.number))
  if (work.isGone && attachments.length === 1) return 'detached'
  return (await confirmGone(attachments, deadline)) ? 'detached' : 'deferred'
}

async function detachLazily(handle: Handle, deadline: Deadline): Promise<DetachResult> {
  const attachment = attachmentOf(handle.number, handle.ref.diskSeq)
  const work = new Detaching(handle, deadline, true)
  const phases = [new PresentPhase(work), new FlushPhase(work), new ClearLazilyPhase(work), new VacatePhase(work)]
  await takingBackLate(work, () => runPhases(phases, deadline, handle.number))
  return work.isGone || !isStillAttached(attachment) ? 'detached' : 'deferred'
}
