/** How the command speaks: results on stdout, everything else on stderr, one voice for all errors, exit statuses, signals. */

import { CommanderError } from 'commander'
import type { Wait } from '../common/deadline.ts'
import type { Warning } from '../common/warnings.ts'
import { LoopError } from '../errors/errors.ts'
import { translateArgument, translateHint, translateMember } from './hints.ts'
import { UsageError } from './parse.ts'
import { printable, toJson } from './text.ts'

export const EXIT_FAILED = 1
export const EXIT_USAGE = 2
export const EXIT_INTERRUPTED = 130

/** Thrown where everything has been said already. */
export class Exit extends Error {
  readonly status: number

  constructor(status: number) {
    super(`exit ${status}`)
    this.status = status
  }
}

/** Ctrl-C or a request to end. */
class Interrupted extends Error {}

/** The first word: hints name what this command can do. */
const [, , COMMAND] = process.argv

// A reader that went away is told to whoever writes; it must not end the process before that has undone its work.
process.stdout.on('error', () => {})
process.stderr.on('error', () => {})

/** Resolves when the text has been written; rejects where nobody reads it. */
export function print(text: string): Promise<void> {
  return new Promise((resolve, reject) => {
    process.stdout.write(text, (error) => (error ? reject(error) : resolve()))
  })
}

/** Whether it is what {@link print} rejects with where the reader went away. */
export function isBrokenPipe(error: unknown): boolean {
  return error instanceof Error && 'code' in error && error.code === 'EPIPE'
}

export function printJson(value: unknown): Promise<void> {
  return print(`${jsonOf(value)}\n`)
}

function jsonOf(value: unknown): string {
  return toJson(value, (key, member) => translateMember(key, member, COMMAND))
}

/** Whether sizes are for people: on a terminal, unless bytes are asked for. */
export function isForPeople(bytes: true | undefined): boolean {
  return bytes === undefined && process.stdout.isTTY
}

export function warn(text: string): void {
  process.stderr.write(`loopctl: ${printable(text)}\n`)
}

function warnHint(text: string): void {
  process.stderr.write(`hint: ${printable(text)}\n`)
}

/** A note beside the results, which is JSON where they are. */
export function note(message: string, json: true | undefined): void {
  if (json) process.stderr.write(`${jsonOf({ note: { message } })}\n`)
  else warn(message)
}

/** What is odd and allowed, on stderr. */
export function printWarnings(warnings: readonly Warning[]): void {
  for (const { message, hint } of warnings) {
    warn(`warning: ${message}${hint === undefined ? '' : ` (${translateHint(hint, COMMAND)})`}`)
  }
}

/** Options of most commands. */
export interface Common {
  json?: true
  /** Milliseconds for the whole of it. */
  timeout?: number
}

/** What ends each call of a command: what is left of its time, where it has been given one, and the signal. */
export function boundOf(timeout: number | undefined, signal: AbortSignal): () => Wait {
  if (timeout === undefined) return () => ({ signal })
  const end = performance.now() + timeout
  return () => ({ signal, timeout: timeout === 0 ? 0 : Math.max(1, Math.ceil(end - performance.now())) })
}

/** Runs with a signal that Ctrl-C, SIGTERM and SIGHUP abort; a second one ends the process at once. */
export async function interruptible<T>(operation: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController()
  const interrupt = () => {
    if (controller.signal.aborted) process.exit(EXIT_INTERRUPTED)
    controller.abort(new Interrupted())
  }
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
  for (const signal of signals) process.on(signal, interrupt)
  try {
    return await operation(controller.signal)
  } finally {
    for (const signal of signals) process.off(signal, interrupt)
  }
}

/** Says what went wrong in one line, and what to do about it in another; sets the exit status. */
export function fail(error: unknown, json: boolean): void {
  process.exitCode = report(error, json)
}

/** The exit status that goes with the error, which is written to stderr. */
export function report(thrown: unknown, json: boolean): number {
  if (thrown instanceof Exit) return thrown.status
  if (thrown instanceof Interrupted) return EXIT_INTERRUPTED
  // The help or the version was asked for, and has been written.
  if (thrown instanceof CommanderError && thrown.exitCode === 0) return 0
  const error = thrown instanceof CommanderError ? usageErrorOf(thrown) : thrown
  const isUsage = isWrongArgument(error)
  if (json) {
    process.stderr.write(`${jsonOf({ error: describe(error) })}\n`)
  } else {
    warn(messageOf(error))
    const hint = LoopError.is(error) || error instanceof UsageError ? error.hint : undefined
    if (hint !== undefined) warnHint(translateHint(hint, COMMAND))
  }
  return isUsage ? EXIT_USAGE : EXIT_FAILED
}

function messageOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error)
  return isWrongArgument(error) && !(error instanceof UsageError) ? translateArgument(error.message) : error.message
}

/** Commander's words: `error: unknown option '--al'`, and in a second line `(Did you mean --all?)`. */
function usageErrorOf({ code, message }: CommanderError): UsageError {
  // It has written the help.
  if (code === 'commander.help') return new UsageError('a command is missing')
  const [, problem = message, suggestion] = /^error: (.*?)(?:\n\(Did you mean (.*)\?\))?$/s.exec(message) ?? []
  if (suggestion !== undefined) return new UsageError(problem, `did you mean ${suggestion}?`)
  const argument = /^command-argument value (.*) is invalid for argument '[^']*'\. (.*)$/s.exec(problem)
  const isUnknown = COMMAND === undefined || COMMAND.startsWith('-') || code === 'commander.unknownCommand'
  const text = argument === null ? problem : `argument ${argument[1]} is invalid. ${argument[2]}`
  return new UsageError(text, `loopctl ${isUnknown ? '' : `${COMMAND} `}--help shows how it is used`)
}

function describe(error: unknown): object {
  if (!(error instanceof Error)) return { message: String(error) }
  return { ...Object.fromEntries(Object.entries(error)), name: error.name, message: messageOf(error) }
}

function isWrongArgument(error: unknown): boolean {
  if (error instanceof UsageError) return true
  const isOfKind = error instanceof TypeError || error instanceof RangeError
  return isOfKind && 'code' in error && String(error.code).startsWith('ERR_')
}
