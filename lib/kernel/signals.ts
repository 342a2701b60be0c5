/** Signals that this process gets. */

import { constants } from 'node:os'
import { binding } from './binding.ts'
import { readFileSync } from './files.ts'

/** From now on {@link isFromKernel} can tell who sent it. The process has a handler for it already. */
export function noteSender(signal: NodeJS.Signals): void {
  binding().signalSenderSync(constants.signals[signal])
}

/** Whether the kernel sent the last one, as it does for a terminal: Ctrl-C, Ctrl-\, a terminal that is closed. */
export function isFromKernel(signal: NodeJS.Signals): boolean {
  return binding().signalSenderSync(constants.signals[signal]) === 1
}

/** Whether this process leads its session: of all its processes it alone is told when the terminal is closed. */
export function isSessionLeader(): boolean {
  const text = readFileSync('/proc/self/stat')
  // pid (command) state ppid pgrp session: the command can hold anything
  const [, , , session] = typeof text === 'number' ? [] : (text.toString().split(') ').at(-1)?.split(' ') ?? [])
  return Number(session) === process.pid
}
