/** `loopctl run FILE -- COMMAND`: a device for as long as a command runs. */

import type { AttachOptions } from '../attach/options.ts'
import { attach, type LoopDevice } from '../device.ts'
import { LoopError } from '../errors/errors.ts'
import { mountImage, type MountImageOptions } from '../mount/mount-image.ts'
import type { Mount } from '../mount/mount.ts'
import type { MountOptions } from '../mount/options.ts'
import { type Ended, runCommand } from './child.ts'
import { fileArgument } from './parse.ts'
import { note, printWarnings, sentenceOf } from './terminal.ts'

/**
 * Resolves to how the command ended, when the device is detached. With a target, or null for a private mount, the image
 * is mounted too.
 */
export async function runWithDevice(
  file: string,
  options: AttachOptions,
  command: string[],
  target: string | null | undefined,
  mountOptions: Pick<MountOptions, 'options'>,
  json: true | undefined,
): Promise<Ended> {
  if (target !== undefined) return runWithMount(file, { ...options, ...mountOptions }, command, target, json)
  // Until the command runs, a signal ends this process, and autoclear takes the device down with it.
  const device = await attach(fileArgument(file), { ...options, autoclear: true })
  printWarnings(device.warnings, json)
  try {
    return await runCommand(command, { LOOP_DEVICE: device.path }, json)
  } finally {
    await detachOrDefer(device, json)
  }
}

async function runWithMount(
  file: string,
  options: MountImageOptions,
  command: string[],
  target: string | null,
  json: true | undefined,
): Promise<Ended> {
  const mount = await mountImage(file, target, options)
  printWarnings(mount.warnings, json)
  try {
    return await runCommand(command, { LOOP_DEVICE: mount.source, LOOP_MOUNT: mount.path }, json)
  } finally {
    await unmountOrDefer(mount, json)
  }
}

/** What the command left running keeps the mount; the kernel unmounts it after that. */
async function unmountOrDefer(mount: Mount, json: true | undefined): Promise<void> {
  try {
    const result = await mount.unmount({ timeout: 1_000 })
    if (result === 'deferred') note(`${mount.source} is still in use and is unmounted when that ends`, json)
  } catch (error) {
    if (!LoopError.is(error, 'in-use')) throw error
    note(`${mount.path} is still in use and is unmounted when that ends: ${sentenceOf(error)}`, json)
    await mount.unmount({ lazy: true })
  }
}

/** What the command left mounted or open keeps the device; the kernel detaches it after that. */
async function detachOrDefer(device: LoopDevice, json: true | undefined): Promise<void> {
  // Borrowed: whoever attached it detaches it.
  if (!device.owned) return device.close()
  try {
    await device.detach({ timeout: 1_000 })
  } catch (error) {
    if (!LoopError.is(error, 'in-use')) throw error
    note(`${device.path} is still in use and is detached when that ends: ${sentenceOf(error)}`, json)
    await device.detach({ lazy: true })
  }
}
