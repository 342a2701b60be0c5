/** A device for as long as a function runs. */

import type { AttachOptions } from './attach/options.ts'
import { type BackingFile, checkFunction } from './common/arguments.ts'
import { attach, type LoopDevice } from './device.ts'
import { fromCaller } from './errors/from-caller.ts'

/**
 * Attaches a file, calls `use` with the device, and detaches the device when `use` returns or throws. If both `use` and
 * the detach fail, rejects with the error of `use`. A device that was attached before (`overlap: 'reuse'`) stays
 * attached. If somebody still uses the device after `use`, rejects with `in-use`, and the kernel detaches it when that
 * use ends.
 *
 * @throws LoopError the errors of {@link attach} and of `device.detach()`, and whatever `use` throws
 *
 * @example
 * ```ts
 * const size = await withDevice('disk.img', { readOnly: true }, async (device) => {
 *   return (await device.status()).size
 * })
 * ```
 */
export function withDevice<T>(file: BackingFile, use: (device: LoopDevice) => T | Promise<T>): Promise<T>
export function withDevice<T>(
  file: BackingFile,
  options: AttachOptions | undefined,
  use: (device: LoopDevice) => T | Promise<T>,
): Promise<T>
export function withDevice<T>(file: BackingFile, ...rest: Rest<T>): Promise<T> {
  return fromCaller(attachAndUse(file, rest))
}

type Rest<T> =
  | [use: (device: LoopDevice) => T | Promise<T>]
  | [options: AttachOptions | undefined, use: (device: LoopDevice) => T | Promise<T>]

async function attachAndUse<T>(file: BackingFile, rest: Rest<T>): Promise<T> {
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
