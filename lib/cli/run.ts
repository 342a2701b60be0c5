/** `loopctl run FILE -- COMMAND`: a device for as long as a command runs. */

import { spawn } from 'node:child_process'
import { constants } from 'node:os'
import type { AttachOptions } from '../attach/options.ts'
import { attach, type LoopDevice } from '../device.ts'
import { LoopError } from '../errors/errors.ts'
import { mountImage, type MountImageOptions } from '../mount/mount-image.ts'
import type { Mount } from '../mount/mount.ts'
import type { MountOptions } from '../mount/options.ts'
import { fileArgument, printWarnings, warn } from './terminal.ts'

const PASSED_ON = ['SIGINT', 'SIGQUIT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'] as const

/**
 * Resolves to the command's exit status: 128 and the signal's number where one ended it, as in a shell. With a target, or
 * null for a private mount, the image is mounted too.
 */
export async function runWithDevice(
  file: string,
  options: AttachOptions,
  command: string[],
  target: string | null | undefined,
  mountOptions: Pick<MountOptions, 'options'>,
): Promise<number> {
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
): Promise<number> {
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

function runCommand([program = '', ...words]: string[], added: NodeJS.ProcessEnv): Promise<number> {
  return new Promise((resolve) => {
    // Before the command exists: a signal that comes first must not end this process alone.
    const early: NodeJS.Signals[] = []
    let pass = (signal: NodeJS.Signals): unknown => early.push(signal)
    const handler = (signal: NodeJS.Signals) => {
      // From a terminal the command has it already, being of the same process group.
      const fromTerminal = process.stdin.isTTY && (signal === 'SIGINT' || signal === 'SIGQUIT')
      if (!fromTerminal) pass(signal)
    }
    for (const signal of PASSED_ON) process.on(signal, handler)
    const end = (status: number) => {
      for (const signal of PASSED_ON) process.off(signal, handler)
      resolve(status)
    }
    const child = spawn(program, words, { stdio: 'inherit', env: { ...process.env, ...added } })
    child.once('error', (error: NodeJS.ErrnoException) => {
      warn(`${program}: ${error.message}`)
      end(error.code === 'ENOENT' ? 127 : 126)
    })
    child.once('exit', (code, signal) => end(signal === null ? (code ?? 0) : 128 + constants.signals[signal]))
    pass = (signal) => child.kill(signal)
    for (const signal of early) pass(signal)
  })
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
