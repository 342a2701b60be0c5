/** Dispose: what the handle owns is detached, what it only opened is closed. */

import { Deadline } from '../common/deadline.ts'
import { LoopError } from '../errors/errors.ts'
import type { Handle } from '../handle/handle.ts'
import { attachmentOf, confirmGone } from './confirm.ts'
import { detach } from './detach.ts'
import { detachSync } from './sync.ts'

/**
 * Milliseconds to wait for one who passes by: an attach that has opened the device because it was free, or a program that
 * looks at all devices. Whoever attaches the same file next would else find it attached.
 */
const PASSING_MS = 100

/** Milliseconds to wait for a detach that was given up on: its thread closes the descriptor. */
const CLOSING_MS = 100

/**
 * What was attached by the handle is detached, lazily where it is held: it waits for no user of the device longer than a
 * moment. What was opened is closed.
 */
export async function dispose(handle: Handle): Promise<void> {
  if (handle.owned) {
    try {
      const attachment = attachmentOf(handle.number, handle.ref.diskSeq)
      const result = await detach(handle, { lazy: true })
      if (result === 'deferred') await confirmGone([attachment], new Deadline(PASSING_MS))
    } catch (error) {
      if (!isNothingLeft(error)) throw error
    } finally {
      await handle.close(new Deadline(CLOSING_MS))
    }
  }
  await handle.close()
}

/** At once: it waits for no user of the device, and at most a second for the kernel. */
export function disposeSync(handle: Handle): void {
  if (handle.owned && !handle.isClosing) {
    try {
      detachSync(handle)
    } catch (error) {
      if (!isNothingLeft(error)) throw error
    } finally {
      handle.closeSync()
    }
  }
  handle.closeSync()
}

/** Detached, released or taken by another already: nothing of ours is left to be disposed. */
function isNothingLeft(error: unknown): boolean {
  return LoopError.is(error) && ['closed', 'not-attached', 'detaching', 'replaced'].includes(error.reason)
}
