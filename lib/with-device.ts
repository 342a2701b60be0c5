/** A device for as long as a function runs. */

import type { AttachOptions } from './attach/options.ts'
import { type BackingFile, checkFunction } from './common/arguments.ts'
import { attach, type LoopDevice } from './device.ts'

/**
 * Attaches a file for as long as `use` runs, and detaches it then, whatever comes of it: what `use` throws wins over what
 * detaching does. A device that was there before (`overlap: 'reuse'`) is closed and stays. Where somebody still uses the
 * device then, rejects with `in-use`, and the kernel detaches it when that ends.
 *
 * @throws LoopError those of {@link attach} and of `device.detach()`, and whatever `use` throws
 */
export function withDevice<T>(file: BackingFile, use: (device: LoopDevice) => T | Promise<T>): Promise<T>
export function withDevice<T>(
  file: BackingFile,
  options: AttachOptions | undefined,
  use: (device: LoopDevice) => T | Promise<T>,
): Promise<T>
export async function withDevice<T>(
  file: BackingFile,
  ...rest:
    | [use: (device: LoopDevice) => T | Promise<T>]
    | [options: AttachOptions | undefined, use: (device: LoopDevice) => T | Promise<T>]
): Promise<T> {
  const [options, use] = rest.length === 1 ? [undefined, rest[0]] : rest
  checkFunction('use', use)
  const device = await attach(file, options)
  let result: T
  try {
    result = await use(device)
  } catch (error) {
    try {
      await device[Symbol.asyncDispose]()
    } catch {
      // What went wrong first is what the caller has to know.
    }
    throw error
  }
  try {
    if (device.fd >= 0) await (device.owned ? device.detach() : device.close())
  } finally {
    await device[Symbol.asyncDispose]()
  }
  return result
}
