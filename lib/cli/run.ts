/** `loopctl run FILE -- COMMAND`: a device for as long as a command runs. */

import type { AttachOptions } from '../attach/options.ts'
import { attach, type LoopDevice } from '../device.ts'
import { LoopError } from '../errors/errors.ts'
import { mountImage, type MountImageOptions } from '../mount/mount-image.ts'
import type { Mount } from '../mount/mount.ts'
import type { MountOptions } from '../mount/options.ts'
import { type Ended, runCommand } from './child.ts'
import { fileArgument } from './parse.ts'
import { printWarnings, warn } from './terminal.ts'

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
): Promise<Ended> {
  if (target !== undefined) return runWithMount(file, { ...options, ...mountOptions }, command, target)
  // Until the command runs, a signal ends this process, and autoclear takes the device down with it.
  const device = await attach(fileArgument(file), { ...options, autoclear: true })
  printWarnings(device.warnings)
  try {
    return await runCommand(command, { LOOP_DEVICE: device.path })
  } finally {
    await detachOrDefer(device)
  }
}

async function runWithMount(
  file: string,
  options: MountImageOptions,
  command: string[],
  target: string | null,
): Promise<Ended> {
  const mount = await mountImage(file, target, options)
  try {
    return await runCommand(command, { LOOP_DEVICE: mount.source, LOOP_MOUNT: mount.path })
  } finally {
    await unmountOrDefer(mount)
  }
}

/** What the command left running keeps the mount; the kernel unmounts it after that. */
async function unmountOrDefer(mount: Mount): Promise<void> {
  try {
    const result = await mount.unmount({ timeout: 1_000 })
    if (result === 'deferred') warn(`${mount.source} is still in use and is unmounted when that ends`)
  } catch (error) {
    if (!LoopError.is(error, 'in-use')) throw error
    warn(`${mount.path} is still in use and is unmounted when that ends: ${error.message}`)
    await mount.unmount({ lazy: true })
  }
}

/** What the command left mounted or open keeps the device; the kernel detaches it after that. */
async function detachOrDefer(device: LoopDevice): Promise<void> {
  // Borrowed: whoever attached it detaches it.
  if (!device.owned) return device.close()
  try {
    await device.detach({ timeout: 1_000 })
  } catch (error) {
    if (!LoopError.is(error, 'in-use')) throw error
    warn(`${device.path} is still in use and is detached when that ends: ${error.message}`)
    await device.detach({ lazy: true })
  }
}
