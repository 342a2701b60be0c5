/** A device that a command has opened, and closes when it is done with it and has told what is odd about it. */

import type { LoopDevice } from '../device.ts'
import { printWarnings } from './terminal.ts'

/** Milliseconds for the end of a handle whose operation was given up on: the end of this process is its end too. */
const CLOSING_MS = 100

export async function closing<T>(device: LoopDevice, json: true | undefined, operation: () => Promise<T>): Promise<T> {
  try {
    const result = await operation()
    printWarnings(device.warnings, json)
    return result
  } finally {
    await device.close({ timeout: CLOSING_MS })
  }
}
