/** What the command is given: its words, sizes, devices, files. */

import { InvalidArgumentError } from 'commander'
import { readFileSync, statSync } from '../kernel/files.ts'
import { numberOfNodeSync } from '../kernel/devnode.ts'
import { checkPartitionRef, type PartitionRef } from '../partitions/ref.ts'
import { shellWord } from './text.ts'
import { translateArgument } from './words.ts'

/** The command was called in a way that it does not know. */
export class UsageError extends Error {
  readonly code = 'ERR_USAGE'
  readonly hint?: string

  constructor(message: string, hint?: string) {
    super(message)
    this.name = 'UsageError'
    if (hint !== undefined) this.hint = hint
  }
}

/** Options whose value is optional, and is one only after `=`: commander would take the next word for it. */
const OPTIONAL_VALUES = new Set(['--direct-io', '--partscan', '--mount'])

/** Without `--`, options of the command of `run` would be taken for those of loopctl. */
export const HOW_TO_RUN = 'write -- before the command: loopctl run FILE -- COMMAND...'

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

const FORMS = 'A device is 7, loop7, /dev/loop7 or the path of a link to it'
const MOST = 1_048_575

/** `7`, `loop7`, `/dev/loop7`, or the path of a link to it. */
export function parseDevice(text: string): number {
  const digits = /^(?:(?:\/dev\/)?loop)?(\d+)$/.exec(text)?.[1]
  if (digits !== undefined) {
    if (Number(digits) > MOST) throw new InvalidArgumentError(`The number of a device is from 0 to ${MOST}.`)
    return Number(digits)
  }
  const whole = /^(?:\/dev\/)?(loop\d+)p\d+$/.exec(text)?.[1]
  if (whole !== undefined) throw new InvalidArgumentError(`${text} is a partition: name its device, /dev/${whole}.`)
  const found = text.includes('/') ? numberOfNodeSync(text) : undefined
  if (typeof found === 'number') return found
  if (isFile(text)) throw new UsageError(`${text} is a file, not a device`, adviseFile(text))
  throw new InvalidArgumentError(found === undefined ? `${FORMS}.` : `${FORMS}; ${text} is ${found}.`)
}

function isFile(path: string): boolean {
  const found = statSync(path)
  return typeof found !== 'number' && found.isFile()
}

/** What the command can do with a file in place of a device. */
function adviseFile(file: string): string {
  const [command = ''] = process.argv.slice(2)
  const word = shellWord(file)
  if (command === 'detach') return `loopctl detach --file ${word} detaches the devices that are attached to it`
  return `loopctl list ${word} shows the devices that are attached to it`
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

export function parseMount(text: string): true | string {
  if (text === '') throw new InvalidArgumentError('With a value it is --mount=DIR.')
  return text === 'true' ? true : text
}

export function parseDirectIO(text: string): true | 'prefer' {
  if (text === 'true') return true
  if (text === 'prefer') return text
  throw new InvalidArgumentError('With a value it is --direct-io=prefer.')
}

export function parsePartscan(text: string): true | 'kernel' | 'user' {
  if (text === 'true') return true
  if (text === 'kernel' || text === 'user') return text
  throw new InvalidArgumentError('With a value it is --partscan=kernel or --partscan=user.')
}

/** `2`, `UUID=...`, `TYPE=...`, `LABEL=...`, or a label as it is: where a label is digits, `LABEL=` tells. */
export function parsePartition(text: string): PartitionRef {
  const [, name, value = ''] = /^(LABEL|UUID|TYPE)=(.*)$/is.exec(text) ?? []
  try {
    if (name !== undefined) return checkPartitionRef({ [name.toLowerCase()]: value })
    return checkPartitionRef(/^\d+$/.test(text) ? Number(text) : { label: text })
  } catch (error) {
    throw new InvalidArgumentError(error instanceof Error ? `${translateArgument(error.message)}.` : String(error))
  }
}

export function parseBlockSize(text: string): number | 'auto' {
  return text === 'auto' ? text : parseSize(text)
}
