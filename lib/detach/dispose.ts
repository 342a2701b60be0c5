/** Dispose: what the handle owns is detached, what it only opened is closed. */

import { LoopError } from '../errors/errors.ts'
import type { Handle } from '../handle/handle.ts'
import { detach } from './detach.ts'
import { detachSync } from './sync.ts'

/** Never waits: what was attached by the handle is detached, lazily where it is held; what was opened is closed. */
export async function dispose(handle: Handle): Promise<void> {
  if (handle.owned) {
    try {
      await detach(handle, { lazy: true })
    } catch (error) {
      if (!isNothingLeft(error)) throw error
    } finally {
      await handle.close()
    }
  }
  await handle.close()
}

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
