/** How the command speaks: results on stdout, everything else on stderr, one voice for all errors, exit statuses, signals. */

import { CommanderError } from 'commander'
import type { Wait } from '../common/deadline.ts'
import type { Warning } from '../common/warnings.ts'
import { errnoDescription, LoopError } from '../errors/errors.ts'
import { translate, translateArgument, translateHint, translateMember } from './words.ts'
import { HOW_TO_RUN, UsageError } from './parse.ts'
import { printable, toJson } from './text.ts'

export const EXIT_FAILED = 1
export const EXIT_USAGE = 2
export const EXIT_INTERRUPTED = 130

/** Commands that change nothing: when their reader goes away, as of `| head`, there is nothing to tell. */
const LOOKING = new Set(['list', 'status', 'partitions', 'free', 'watch', 'doctor', 'completion'])

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
    process.stdout.write(text, (error) => (error ? reject(cannotPrint(error)) : resolve()))
  })
}

/** For commander, which does not wait. */
export function printHelp(text: string): void {
  print(text).catch((error: unknown) => {
    // It is written in several pieces.
    if (!isBrokenPipe(error) && !process.exitCode) fail(error, false)
  })
}

/** Node's own says neither what it wrote to, nor of a pipe why it could not. */
function cannotPrint(error: NodeJS.ErrnoException): Error {
  const { code = 'EIO', errno = 0 } = error
  const why = code === 'EPIPE' ? 'nobody reads it any more' : errnoDescription(errno)
  return Object.assign(new Error(`${code}: write stdout: ${why}`, { cause: error }), { code, errno, syscall: 'write' })
}

/** Whether it is what {@link print} rejects with where the reader went away. */
function isBrokenPipe(error: unknown): boolean {
  return error instanceof Error && 'code' in error && error.code === 'EPIPE'
}

export function printJson(value: unknown): Promise<void> {
  return print(`${toJson(value, (key, member) => translateMember(key, member, COMMAND))}\n`)
}

/** Whether sizes are for people: on a terminal, unless bytes are asked for. */
export function isForPeople(bytes: true | undefined): boolean {
  return bytes === undefined && process.stdout.isTTY
}

/** What stderr has lines of; in JSON the name of the one member that a line has. */
type Kind = 'error' | 'warning' | 'note'

/** Its sentences are in the words of the command; other members are for JSON alone. */
interface Said {
  message: string
  hint?: string
  [member: string]: unknown
}

/** Says something on stderr, in one form for all: a line, and a line with the hint. */
function say(kind: Kind, said: Said, json: boolean | undefined): void {
  if (json) {
    process.stderr.write(`${toJson({ [kind]: said })}\n`)
    return
  }
  const { message, hint } = said
  const lines = [`loopctl: ${kind === 'warning' ? 'warning: ' : ''}${message}`, ...(hint ? [`hint: ${hint}`] : [])]
  process.stderr.write(lines.map((line) => `${printable(line)}\n`).join(''))
}

/** A note beside the results. */
export function note(message: string, json: true | undefined): void {
  say('note', { message }, json)
}

/** What is odd and allowed. */
export function printWarnings(warnings: readonly Warning[], json: true | undefined): void {
  for (const { code, message, hint } of warnings) {
    const advice = hint === undefined ? {} : { hint: translateHint(hint, COMMAND) }
    say('warning', { code, message: translate(message), ...advice }, json)
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
  // What could not be printed has been told before the end of the command.
  process.exitCode = report(error, json) || process.exitCode
}

/** The exit status that goes with the error, which is written to stderr. */
export function report(thrown: unknown, json: boolean): number {
  if (thrown instanceof Exit) return thrown.status
  if (thrown instanceof Interrupted) return EXIT_INTERRUPTED
  // The help or the version was asked for, and has been written.
  if (thrown instanceof CommanderError && thrown.exitCode === 0) return 0
  if (isBrokenPipe(thrown) && LOOKING.has(COMMAND ?? '')) return 0
  const error = thrown instanceof CommanderError ? usageErrorOf(thrown) : thrown
  say('error', describe(error), json)
  return isWrongArgument(error) ? EXIT_USAGE : EXIT_FAILED
}

const MISSING = /^option '[^']*?(--[\w-]+)[^']*' argument missing$/
const OF_OPTION = /^option '[^']*?(--[\w-]+)[^']*' argument (.*) is invalid\. (.*)$/s
const OF_ARGUMENT = /^command-argument value (.*) is (invalid) for argument '[^']*'(\. .*)$/s

/** Commander's words: `error: unknown option '--al'`, and in a second line `(Did you mean --all?)`. */
function usageErrorOf({ code, message }: CommanderError): UsageError {
  // It has written the help.
  if (code === 'commander.help') return new UsageError('a command is missing')
  const [, problem = message, suggestion] = /^error: (.*?)(?:\n\(Did you mean (.*)\?\))?$/s.exec(message) ?? []
  if (suggestion !== undefined) return new UsageError(problem, `did you mean ${suggestion}?`)
  const isUnknown = COMMAND === undefined || COMMAND.startsWith('-') || code === 'commander.unknownCommand'
  const text = problem
    .replace(MISSING, 'argument of $1 is missing')
    .replace(OF_OPTION, 'argument $2 of $1 is invalid. $3')
    .replace(OF_ARGUMENT, 'argument $1 is $2$3')
  if (COMMAND === 'run' && !process.argv.includes('--')) return new UsageError(text, HOW_TO_RUN)
  return new UsageError(text, `loopctl ${isUnknown ? '' : `${COMMAND} `}--help shows how it is used`)
}

/** The members of the error, its sentences in the command's words. */
function describe(error: unknown): Said {
  if (!(error instanceof Error)) return { message: String(error) }
  const members = { ...Object.fromEntries(Object.entries(error)), name: error.name, message: sentenceOf(error) }
  if (!LoopError.is(error) || error.hint === undefined) return members
  return { ...members, hint: translateHint(error.hint, COMMAND, namesIn(error)) }
}

/** What the error says, in the command's words. */
export function sentenceOf(error: Error): string {
  if (error instanceof UsageError) return error.message
  if (LoopError.is(error)) return translate(error.message, namesIn(error))
  return isWrongArgument(error) ? translateArgument(error.message) : translate(error.message)
}

function namesIn({ path, backingFile }: LoopError): (string | undefined)[] {
  return [path, backingFile]
}

function isWrongArgument(error: unknown): boolean {
  if (error instanceof UsageError) return true
  const isOfKind = error instanceof TypeError || error instanceof RangeError
  return isOfKind && 'code' in error && String(error.code).startsWith('ERR_')
}
