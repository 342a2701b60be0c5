/** The lower device of a stack of two that attach() made with `swappable`. */

import { askDevices } from './ask.ts'
import type { Handle } from './handle.ts'
import { openHandle } from './open.ts'

/** `lo_file_name` of a lower device: how every process knows a stack. */
export const LOWER_TAG = 'loopctl:lower'

/** The lower device of a stack made by this library; undefined: the device is not the upper one of such. */
export async function findSwappableLower({ lowerNumber, bound }: Handle): Promise<number | undefined> {
  if (lowerNumber === undefined) return undefined
  const { answers } = await askDevices([lowerNumber], bound)
  const [lower] = answers
  return lower?.info.fileName === LOWER_TAG ? lowerNumber : undefined
}

/**
 * Runs the operation on the device whose backing file is the real one: the lower one of a stack, else the device
 * itself. A change of the upper one would succeed, and break the stack.
 */
export async function onBackingDevice<T>(handle: Handle, operation: (target: Handle) => Promise<T>): Promise<T> {
  if (handle.lowerNumber === undefined) return operation(handle)
  // Opened, so that it cannot go, before it is asked what it is; where it cannot be opened there is no guessing.
  const lower = await openHandle(handle.lowerNumber)
  try {
    const { info } = await lower.readInfo()
    if (info.fileName !== LOWER_TAG) return await operation(handle)
    await handle.readInfo()
    return await lower.run(() => operation(lower), handle.deadline)
  } finally {
    await lower.close()
  }
}
