/** Checks of what callers pass: a TypeError or RangeError with Node's codes, before any system call. */

import { fileURLToPath } from 'node:url'
import { LO_NAME_MAX, LOOP_NUMBER_MAX } from '../kernel/uapi.ts'

/** Bytes: 0 to Number.MAX_SAFE_INTEGER; anything else is a RangeError. */
export type Bytes = number | bigint

/**
 * The path of an image, a file URL, a descriptor, or an object with `fd` (a FileHandle). loopctl never closes a
 * descriptor that you give.
 */
export type BackingFile = string | Buffer | URL | number | { readonly fd: number }

type Code = 'ERR_INVALID_ARG_TYPE' | 'ERR_INVALID_ARG_VALUE' | 'ERR_OUT_OF_RANGE'

function coded<E extends Error>(error: E, code: Code): E {
  // As Node's own: the code is a property, and in the printed name.
  Object.defineProperty(error, 'code', { value: code, enumerable: true, configurable: true, writable: true })
  return error
}

export function wrongType(name: string, expected: string, actual: unknown): TypeError {
  return coded(new TypeError(`${name} must be ${expected}, not ${show(actual)}`), 'ERR_INVALID_ARG_TYPE')
}

export function wrongValue(name: string, problem: string): TypeError {
  return coded(new TypeError(`${name} ${problem}`), 'ERR_INVALID_ARG_VALUE')
}

export function outOfRange(name: string, range: string, actual: unknown): RangeError {
  return coded(new RangeError(`${name} must be ${range}, not ${show(actual)}`), 'ERR_OUT_OF_RANGE')
}

function show(value: unknown): string {
  if (value === null) return 'null'
  switch (typeof value) {
    case 'string':
      return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}...` : value)
    case 'number':
    case 'boolean':
    case 'undefined':
      return String(value)
    case 'bigint':
      return `${value}n`
    default:
      return `a value of type ${typeof value}`
  }
}

/** What has to be given; its members are for {@link checkOptions}. */
export function checkObject<T extends object>(name: string, value: T): T {
  if (typeof value !== 'object' || value === null) throw wrongType(name, 'an object', value)
  return value
}

/** An options object without the members that are undefined. Unknown names are refused: a typo must not be silent. */
export function checkOptions<T extends object>(value: T | undefined, known: readonly (keyof T & string)[]): T {
  if (value === undefined) return {} as T
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw wrongType('options', 'an object', value)
  }
  const present = Object.entries(value).filter(([, member]) => member !== undefined)
  for (const [name] of present) {
    if (!(known as readonly string[]).includes(name)) throw wrongValue('options', `has no member ${show(name)}`)
  }
  return Object.fromEntries(present) as T
}

export function checkBoolean(name: string, value: unknown): boolean {
  if (typeof value !== 'boolean') throw wrongType(name, 'a boolean', value)
  return value
}

export function checkInteger(name: string, value: unknown, min: number, max: number): number {
  if (typeof value !== 'number') throw wrongType(name, 'a number', value)
  if (!Number.isInteger(value) || value < min || value > max) {
    throw outOfRange(name, `a whole number from ${min} to ${max}`, value)
  }
  // -0 is 0
  return value + 0
}

/** Milliseconds; as much as a timer can wait. */
export function checkTimeout(value: unknown): number {
  return checkInteger('timeout', value, 0, 0x7fff_ffff)
}

export function checkDescriptor(name: string, value: unknown): number {
  return checkInteger(name, value, 0, 0x7fff_ffff)
}

export function checkLoopNumber(value: unknown): number {
  return checkInteger('number', value, 0, LOOP_NUMBER_MAX)
}

export function checkBytes(name: string, value: unknown): bigint {
  if (typeof value !== 'number' && typeof value !== 'bigint') throw wrongType(name, 'a number or bigint', value)
  if (value < 0 || value > Number.MAX_SAFE_INTEGER || (typeof value === 'number' && !Number.isInteger(value))) {
    throw outOfRange(name, 'a whole number of bytes from 0 to Number.MAX_SAFE_INTEGER', value)
  }
  return BigInt(value)
}

export function checkU64(name: string, value: unknown, max: bigint = 2n ** 64n - 1n): bigint {
  if (typeof value !== 'bigint') throw wrongType(name, 'a bigint', value)
  if (value < 0n || value > max) throw outOfRange(name, `from 0n to ${max}n`, value)
  return value
}

export function checkBlockSize(name: string, value: unknown, max: number): number {
  if (typeof value !== 'number') throw wrongType(name, 'a number', value)
  const isPowerOfTwo = Number.isInteger(value) && (value & (value - 1)) === 0
  if (value < 512 || value > max || !isPowerOfTwo) {
    throw outOfRange(name, `a power of two from 512 to ${max}`, value)
  }
  return value
}

/** A tag for lo_file_name. */
export function checkReference(value: unknown): string {
  if (typeof value !== 'string') throw wrongType('reference', 'a string', value)
  if (/\p{Surrogate}/u.test(value)) throw wrongValue('reference', 'must not contain half of a surrogate pair')
  if (value.includes('\0')) throw wrongValue('reference', 'must not contain a zero character')
  if (Buffer.byteLength(value) > LO_NAME_MAX) {
    throw outOfRange('reference', `at most ${LO_NAME_MAX} bytes long`, value)
  }
  return value
}

export function checkSignal(value: unknown): AbortSignal {
  // By what it can do: that of another realm is no instance of ours.
  const signal: Partial<AbortSignal> | null = typeof value === 'object' ? value : null
  const methods = [signal?.throwIfAborted, signal?.addEventListener, signal?.removeEventListener]
  if (methods.every((method) => typeof method === 'function')) return value as AbortSignal
  throw wrongType('signal', 'an AbortSignal', value)
}

export function checkFunction<F>(name: string, value: F): F {
  if (typeof value !== 'function') throw wrongType(name, 'a function', value)
  return value
}

/** A backing file as the workflows take it: a path, or a descriptor of the caller's. */
export type FileArgument = { readonly path: string | Buffer } | { readonly fd: number }

export function checkBackingFile(value: unknown): FileArgument {
  if (typeof value === 'number') return { fd: checkDescriptor('file', value) }
  if (typeof value === 'string') return { path: checkPath(value, value.includes('\0')) }
  if (Buffer.isBuffer(value)) return { path: checkPath(value, value.includes(0)) }
  if (value instanceof URL) return { path: checkPath(pathOfUrl(value), value.pathname.includes('%00')) }
  if (typeof value === 'object' && value !== null && 'fd' in value) return { fd: checkDescriptor('file.fd', value.fd) }
  throw wrongType('file', 'a path, a file URL, a descriptor or an object with one', value)
}

function pathOfUrl(url: URL): string {
  try {
    return fileURLToPath(url)
  } catch (error) {
    // decodeURIComponent's own, without a code
    if (error instanceof URIError) throw wrongValue('file', 'must be UTF-8 where it is percent-encoded')
    throw error
  }
}

function checkPath<P extends string | Buffer>(path: P, hasZero: boolean): P {
  if (path.length === 0) throw wrongValue('file', 'must not be empty')
  if (hasZero) throw wrongValue('file', 'must not contain a zero byte')
  return path
}
