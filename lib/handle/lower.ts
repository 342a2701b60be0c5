/** The lower device of a stack of two that attach() made with `swappable`. */

import { type Deadline, LOOKING } from '../common/deadline.ts'
import { cleaningUp } from '../errors/given-up.ts'
import { GivenUp } from '../kernel/bounded.ts'
import { askDevices } from './ask.ts'
import type { Handle } from './handle.ts'
import { openHandle } from './open.ts'

/** `lo_file_name` of a lower device: how every process knows a stack. */
export const LOWER_TAG = 'loopctl:lower'

/** The lower device of a stack made by this library; undefined: the device is not the upper one of such. */
export async function findSwappableLower({ lowerNumber, deadline }: Handle): Promise<number | undefined> {
  if (lowerNumber === undefined) return undefined
  const { answers } = await askDevices([lowerNumber], deadline.bound)
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
  const { left, signal } = handle.deadline.bound
  const lower = await openHandle(handle.lowerNumber, { timeout: Math.ceil(Math.min(left, LOOKING)), signal })
  return cleaningUp(
    async () => {
      const { info } = await runOn(lower, () => lower.readInfo(), handle.deadline)
      if (info.fileName !== LOWER_TAG) return operation(handle)
      await handle.readInfo()
      return runOn(lower, operation, handle.deadline)
    },
    () => lower.close(),
  )
}

/** What was given up on there keeps the place in the queue of the upper device too, which explains it. */
async function runOn<T>(lower: Handle, operation: (target: Handle) => Promise<T>, deadline: Deadline): Promise<T> {
  let givenUp: GivenUp | undefined
  const noting = async (): Promise<T> => {
    try {
      return await operation(lower)
    } catch (error) {
      if (error instanceof GivenUp) givenUp = error
      throw error
    }
  }
  try {
    return await lower.run(noting, deadline)
  } catch (error) {
    throw givenUp ?? error
  }
}
