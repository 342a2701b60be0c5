/** `loopctl run FILE -- COMMAND`: a device for as long as a command runs. */

import { spawn } from 'node:child_process'
import { constants } from 'node:os'
import type { AttachOptions } from '../attach/options.ts'
import { attach, type LoopDevice } from '../device.ts'
import { LoopError } from '../errors/errors.ts'
import { fileArgument, printWarnings, warn } from './terminal.ts'

const PASSED_ON = ['SIGINT', 'SIGQUIT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'] as const

/** Resolves to the command's exit status: 128 and the signal's number where one ended it, as in a shell. */
export async function runWithDevice(file: string, options: AttachOptions, command: string[]): Promise<number> {
  // Until the command runs, a signal ends this process, and autoclear takes the device down with it.
  const device = await attach(fileArgument(file), { ...options, autoclear: true })
  printWarnings(device.warnings)
  try {
    return await runCommand(command, device.path)
  } finally {
    await detachOrDefer(device)
  }
}

function runCommand([program = '', ...words]: string[], devicePath: string): Promise<number> {
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
    const child = spawn(program, words, { stdio: 'inherit', env: { ...process.env, LOOP_DEVICE: devicePath } })
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
  try {
    await device.detach({ timeout: 1_000 })
  } catch (error) {
    if (!LoopError.is(error, 'in-use')) throw error
    warn(`${device.path} is still in use and is detached when that ends: ${error.message}`)
    await device.detach({ lazy: true })
  }
}
