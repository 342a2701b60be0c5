/** A device that a command has opened, and closes when it is done with it. */

import type { LoopDevice } from '../device.ts'

/** Milliseconds for the end of a handle whose operation was given up on: the end of this process is its end too. */
const CLOSING_MS = 100

export async function closing<T>(device: LoopDevice, operation: () => Promise<T>): Promise<T> {
  try {
    return await operation()
  } finally {
    await device.close({ timeout: CLOSING_MS })
  }
}
