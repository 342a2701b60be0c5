/** How programs get a device: they attach a file, or open a device that is there. */

import type { AttachOptions } from './attach/options.ts'
import { attachPlainOrStack } from './attach/stack.ts'
import type { BackingFile } from './common/arguments.ts'
import { fromCaller } from './errors/from-caller.ts'
import { type DeviceRef, openHandle, type OpenOptions } from './handle/open.ts'
import { createDevice, type LoopDevice } from './loop-device.ts'

export { LoopDevice } from './loop-device.ts'

/**
 * Attaches a file to a loop device: finds or makes a free device, configures it with one LOOP_CONFIGURE (kernel 5.8;
 * before, with LOOP_SET_FD and LOOP_SET_STATUS64), and reads back which settings are in effect. If another process
 * takes the device first, `attach` tries another one. With `autoclear`, the default, the kernel detaches the device
 * when this process ends, however it ends.
 *
 * If you give a descriptor, it has to stay open until `attach` resolves. loopctl does not close it.
 *
 * @throws LoopError `no-such-file`, `not-a-file-or-block-device`, `backing-not-writable`, `permission`,
 *   `no-loop-driver`, `already-attached` (the `number` that you gave), `detaching`, `in-use`, `contention`, `overlap`,
 *   `direct-io-unavailable`, `backed-by-itself`, `backing-loop-not-attached`, `node-missing`, `resources`,
 *   `unsupported-platform`
 *
 * @example
 * ```ts
 * await using device = await attach('disk.img', { readOnly: true })
 * console.log(device.path) // /dev/loop0
 * ```
 */
export async function attach(file: BackingFile, options?: AttachOptions): Promise<LoopDevice> {
  return createDevice(await fromCaller(attachPlainOrStack(file, options)))
}

/**
 * Opens a device that another program attached, or a free one. If you give a `ref` with a disk sequence number and the
 * device has been attached anew since, rejects with `replaced`.
 *
 * @throws LoopError `no-such-device`, `node-missing`, `replaced`, `detaching`, `permission`, `unsupported-platform`
 *
 * @example
 * ```ts
 * await using owner = await attach('disk.img')
 * await using device = await open(owner.ref)
 * console.log((await device.status()).backingFile)
 * ```
 */
export async function open(device: DeviceRef, options?: OpenOptions): Promise<LoopDevice> {
  return createDevice(await fromCaller(openHandle(device, options)))
}
