/** The other ends of a handle: release() keeps the device attached, dispose detaches what the handle owns and closes what it does not. */

import { LoopError } from '../errors/errors.ts'
import type { Handle } from '../handle/handle.ts'
import { clearAutoclear, detach, detachSync } from './detach.ts'

/** Keeps the attachment when this process ends, and closes the handle. Resolves to the device's path. */
export async function release(handle: Handle): Promise<string> {
  return handle.run(async () => {
    await clearAutoclear(handle)
    await handle.closeNow()
    return handle.path
  })
}

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
