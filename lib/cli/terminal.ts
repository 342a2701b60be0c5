/** What the command reads and writes: sizes, tables, JSON, errors, exit codes, signals. */

import { CommanderError, InvalidArgumentError } from 'commander'
import type { Wait } from '../common/deadline.ts'
import type { Warning } from '../common/warnings.ts'
import { LoopError } from '../errors/errors.ts'
import { numberOfNodeSync } from '../kernel/devnode.ts'
import { readFileSync } from '../kernel/files.ts'

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

/** Options whose value is optional, and is one only after `=`: commander would take the next word for it. */
const OPTIONAL_VALUES = new Set(['--direct-io', '--partscan', '--mount'])

/** What is for this command: the words up to `--`. */
export function ownWords(words: string[]): string[] {
  const end = words.indexOf('--')
  return end < 0 ? words : words.slice(0, end)
}

/** `--direct-io FILE` becomes `--direct-io=true FILE`, and so does `-P`, alone or as in `-rP`; nothing after `--` does. */
export function splitOptionalValues(words: string[]): string[] {
  // `set --direct-io on` has a value always
  if (words[0] === 'set') return words
  const own = ownWords(words)
  return [...own.flatMap(splitOptionalValue), ...words.slice(own.length)]
}

function splitOptionalValue(word: string): string[] {
  if (OPTIONAL_VALUES.has(word)) return [`${word}=true`]
  const [, flags, value = 'true', rest] = /^-(r*Pr*)(?:=(.*)|([osbn].*))?$/.exec(word) ?? []
  if (flags === undefined) return [word]
  return [...(flags.includes('r') ? ['-r'] : []), `--partscan=${value}`, ...(rest === undefined ? [] : [`-${rest}`])]
}

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
  return print(`${JSON.stringify(value)}\n`)
}

export function warn(text: string): void {
  process.stderr.write(`loopctl: ${printable(text)}\n`)
}

/** What is odd and allowed, on stderr. */
export function printWarnings(warnings: readonly Warning[]): void {
  for (const { message, hint } of warnings) warn(`warning: ${message}${hint === undefined ? '' : ` (${hint})`}`)
}

/** A file name can hold anything; a terminal must not obey it. */
export function printable(text: string): string {
  return text.replaceAll(/\p{Cc}/gu, (character) => `\\x${character.charCodeAt(0).toString(16).padStart(2, '0')}`)
}

/** Columns as wide as their widest cell; numbers to the right. */
export function table(head: string[], rows: (string | number)[][]): string {
  const widths = head.map((title, i) => Math.max(title.length, ...rows.map((row) => String(row[i]).length)))
  const line = (cells: (string | number)[]) =>
    cells
      .map((cell, i) => {
        const numeric = typeof rows[0]?.[i] === 'number'
        const width = widths[i] ?? 0
        return numeric ? String(cell).padStart(width) : String(cell).padEnd(width)
      })
      .join('  ')
      .trimEnd()
  return [head, ...rows].map((cells) => `${line(cells)}\n`).join('')
}

const UNITS = ['K', 'M', 'G', 'T', 'P']

/** `4096`, `1M` and `1MiB` (powers of 1024), `1MB` (of 1000): bytes. */
export function parseSize(text: string): number {
  const match = /^(\d+)(?:([KMGTP])(iB|B)?)?$/i.exec(text)
  if (!match) throw new InvalidArgumentError('A size is a whole number of bytes, or one with K, M, G, T or P.')
  const [, digits = '', unit, suffix] = match
  const power = unit === undefined ? 0 : UNITS.indexOf(unit.toUpperCase()) + 1
  const base = suffix?.toLowerCase() === 'b' ? 1000 : 1024
  const bytes = Number(digits) * base ** power
  if (!Number.isSafeInteger(bytes)) throw new InvalidArgumentError('That is more than a file can have.')
  return bytes
}

export function parseWholeNumber(text: string): number {
  if (!/^\d+$/.test(text)) throw new InvalidArgumentError('A whole number is wanted.')
  return Number(text)
}

/** `7`, `loop7`, `/dev/loop7`, or the path of a link to it. */
export function parseDevice(text: string): number {
  const digits = /^(?:(?:\/dev\/)?loop)?(\d+)$/.exec(text)?.[1]
  if (digits !== undefined) return Number(digits)
  const whole = /^(?:\/dev\/)?(loop\d+)p\d+$/.exec(text)?.[1]
  if (whole !== undefined) throw new InvalidArgumentError(`${text} is a partition: name its device, /dev/${whole}.`)
  if (!text.includes('/'))
    throw new InvalidArgumentError('A device is 7, loop7, /dev/loop7 or the path of a link to it.')
  const found = numberOfNodeSync(text)
  if (typeof found === 'number') return found
  throw new InvalidArgumentError(`A device is 7, loop7, /dev/loop7 or the path of a link to it; ${text} is ${found}.`)
}

/** A device, or a path: that of a file, or of a link to a device, which only its filesystem can tell. */
export function parseDeviceOrFile(text: string): number | string {
  return /^(?:loop)?\d+$/.test(text) || /^\/dev\/loop\d+/.test(text) ? parseDevice(text) : text
}

/**
 * A file name as it was given. Node decodes the words as UTF-8, and puts U+FFFD in place of bytes that are none: the
 * kernel has the words themselves.
 */
export function fileArgument(text: string): string | Buffer {
  if (!text.includes('\uFFFD')) return text
  const words = readFileSync('/proc/self/cmdline')
  if (typeof words === 'number') return text
  for (let start = 0, end = words.indexOf(0); end >= 0; start = end + 1, end = words.indexOf(0, start)) {
    const word = words.subarray(start, end)
    if (word.toString() === text) return word
    // --file=NAME
    const value = word.subarray(word.indexOf('=') + 1)
    if (value.toString() === text) return value
  }
  return text
}

export function parseDevices(text: string, before: number[] = []): number[] {
  return [...before, parseDevice(text)]
}

export function parseSwitch(text: string): boolean {
  if (text !== 'on' && text !== 'off') throw new InvalidArgumentError('It is on or off.')
  return text === 'on'
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
export function report(error: unknown, json: boolean): number {
  if (error instanceof Exit) return error.status
  if (error instanceof Interrupted) return EXIT_INTERRUPTED
  // Commander has written the message, or the help that was asked for.
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : EXIT_USAGE
  if (json) {
    process.stderr.write(`${JSON.stringify({ error: describe(error) })}\n`)
  } else {
    warn(error instanceof Error ? error.message : String(error))
    if (LoopError.is(error) && error.hint !== undefined) process.stderr.write(`hint: ${printable(error.hint)}\n`)
  }
  return isWrongArgument(error) ? EXIT_USAGE : EXIT_FAILED
}

function describe(error: unknown): object {
  if (!(error instanceof Error)) return { message: String(error) }
  return { ...Object.fromEntries(Object.entries(error)), name: error.name, message: error.message }
}

function isWrongArgument(error: unknown): boolean {
  return (
    (error instanceof TypeError || error instanceof RangeError) &&
    'code' in error &&
    String(error.code).startsWith('ERR_')
  )
}
