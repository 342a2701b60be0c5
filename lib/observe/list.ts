/** What is attached, read from sysfs: no privileges, and no device is opened (whoever detaches would see that). */

import { constants } from 'node:os'
import { checkBoolean, checkOptions } from '../common/arguments.ts'
import { checkDeadline, LOOKING, type Wait } from '../common/deadline.ts'
import { assertSupported, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { fromCaller } from '../errors/from-caller.ts'
import { type Bound, GivenUp, listUnanswering } from '../kernel/bounded.ts'
import { devicePath } from '../kernel/devnode.ts'
import * as files from '../kernel/files.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { type DeviceFiles, type Found, readDevices, readDevicesSync } from '../kernel/sysfs-batch.ts'
import { addLower } from './lower.ts'

/** A loop device, as sysfs shows it; plain data. */
export interface LoopInfo {
  /** The N of /dev/loopN. */
  number: number
  path: string
  /** `major:minor`. */
  device: string
  /** Disk sequence number; kernels 5.15 and later. */
  diskSeq?: number
  attached: boolean
  /**
   * The kernel's path of the backing file, as seen from this process's root, without ` (deleted)`. Null if the device
   * is free, or if the path has more than 4094 bytes, which sysfs cannot show.
   */
  backingFile: string | null
  /** Whether the file was deleted: the kernel shows ` (deleted)` after the path, and no file has that whole name. */
  backingDeleted: boolean
  /** Bytes. */
  offset: number
  /** Bytes; 0: up to the end of the file. */
  sizeLimit: number
  /** Size of the device in bytes: a multiple of 512. */
  size: number
  /** Logical block size in bytes; 512 if the kernel does not answer, because it is draining the queue of the device. */
  blockSize: number
  readOnly: boolean
  autoclear: boolean
  partscan: boolean
  directIO: boolean
  /** The number of the loop device that backs this one, if one does. */
  lower?: number
  /**
   * Only from `find()` with `unconfirmed: true`: the device may be one that you look for, but could not be asked, for
   * this reason.
   */
  unconfirmed?: 'permission' | 'timeout' | 'no-node'
}

export interface ListOptions extends Wait {
  /** Also returns the free devices. Default false. */
  all?: boolean | undefined
  /** Milliseconds; default 5 000. */
  timeout?: number | undefined
}

const DELETED = ' (deleted)'

/**
 * Returns the attached devices, ordered by number. Reads sysfs: needs no privileges and opens no device.
 *
 * @example
 * ```ts
 * for (const { path, backingFile } of await list()) console.log(path, backingFile)
 * ```
 */
export async function list(options?: ListOptions): Promise<LoopInfo[]> {
  const { all, ...wait } = checkOptions(options, ['all', 'signal', 'timeout'])
  const wantsAll = all === undefined ? false : checkBoolean('all', all)
  const deadline = checkDeadline(wait, LOOKING)
  assertSupported()
  deadline.throwIfAborted()
  return await fromCaller(readAll(wantsAll))
}

async function readAll(free: boolean): Promise<LoopInfo[]> {
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') throw explain({ call: 'scandir', errno: numbers, path: '/sys/block' }, 'read /sys')
  return readInfos(numbers, free)
}

/** One device; undefined where there is none of that number. */
export async function readInfo(number: number): Promise<LoopInfo | undefined> {
  const [info] = await readInfos([number], true)
  return info
}

/** So often a device is read again: one can be attached and detached in the time that reading takes, again and again. */
const TRIES = 64

/** By number. The files of a device are read one by one: those that were not of one moment are read again. */
export async function readInfos(numbers: readonly number[], free: boolean): Promise<LoopInfo[]> {
  const told: Promise<LoopInfo>[] = []
  let left = numbers
  for (let tries = TRIES; left.length > 0; tries--) {
    const found = await readFiles(left, free)
    if (typeof found === 'number') throw explain({ call: 'open', errno: found, path: '/sys/block' }, 'read /sys')
    const moved: number[] = []
    for (const [i, read] of found.entries()) {
      const number = left[i] ?? Number.NaN
      if (read?.moved && tries > 0) moved.push(number)
      else if (read && (free || read.backingFile !== null)) told.push(toInfo(number, read))
    }
    left = moved
  }
  const infos = await Promise.all(told)
  return addLower(infos.toSorted((a, b) => a.number - b.number))
}

/** Milliseconds that the block sizes of many devices may take, and then of each by itself, side by side. */
const TOGETHER: Bound = { left: 1_000 }
const APART: Bound = { left: 250 }

/**
 * The files of the devices. The kernel does not tell the block size of a device whose queue is being drained, which takes
 * as long as the filesystem of its file lets a read or a write wait: then the rest is told.
 */
async function readFiles(numbers: readonly number[], free: boolean): Promise<Found> {
  const unanswering = new Set(listUnanswering())
  const silent = numbers.filter((number) => unanswering.has(number))
  if (silent.length === 0) return readPatiently(numbers, free)
  const others = numbers.filter((number) => !unanswering.has(number))
  const [found, rest] = [await readPatiently(others, free), readDevicesSync(silent)]
  if (typeof found === 'number' || typeof rest === 'number') return typeof found === 'number' ? found : rest
  const byNumber = new Map([
    ...others.map((number, i) => [number, found[i]] as const),
    ...silent.map((number, i) => [number, rest[i]] as const),
  ])
  return numbers.map((number) => byNumber.get(number))
}

async function readPatiently(numbers: readonly number[], free: boolean): Promise<Found> {
  try {
    return await readDevices(numbers, free, TOGETHER)
  } catch (error) {
    if (!(error instanceof GivenUp)) throw error
  }
  const found = await Promise.all(numbers.map((number) => readOne(number, free)))
  return (
    found.find((each) => typeof each === 'number') ?? found.flatMap((each) => (typeof each === 'number' ? [] : each))
  )
}

async function readOne(number: number, free: boolean): Promise<Found> {
  try {
    return await readDevices([number], free, APART, number)
  } catch (error) {
    if (!(error instanceof GivenUp)) throw error
    return readDevicesSync([number])
  }
}

/** Of a file that is 0 or 1. */
const YES = '1\n'

/** What the files of a device say. */
export async function toInfo(number: number, { attributes, backingFile }: DeviceFiles): Promise<LoopInfo> {
  const attached = backingFile !== null
  const diskSeq = attributes.diskseq
  const file = await describeBackingFile(backingFile ?? null)
  return {
    number,
    path: devicePath(number),
    device: attributes.dev ?? '',
    ...(diskSeq !== undefined && { diskSeq: Number(diskSeq) }),
    attached,
    ...file,
    offset: Number(attributes.offset ?? 0),
    sizeLimit: Number(attributes.sizelimit ?? 0),
    size: Number(attributes.size ?? 0) * 512,
    blockSize: Number(attributes['queue/logical_block_size'] ?? 512),
    readOnly: attributes.ro === YES,
    autoclear: attributes.autoclear === YES,
    partscan: attributes.partscan === YES,
    directIO: attributes.dio === YES,
  }
}

/** Whether there is anything to be found out about it: see {@link describeBackingFile}. */
export function isMarkedDeleted(text: string | null | undefined): text is string {
  return text?.endsWith(DELETED) ?? false
}

/** A file can be named `x (deleted)`: only that nothing exists under the whole text tells. */
export async function describeBackingFile(
  text: string | null,
): Promise<Pick<LoopInfo, 'backingFile' | 'backingDeleted'>> {
  if (!isMarkedDeleted(text)) return { backingFile: text, backingDeleted: false }
  return (await exists(text))
    ? { backingFile: text, backingDeleted: false }
    : { backingFile: text.slice(0, -DELETED.length), backingDeleted: true }
}

/** Milliseconds for the look whether a file is there under the whole text. */
const LOOK_MS = 250

/** Where its filesystem does not answer, the kernel's word is taken: it is deleted. */
async function exists(path: string): Promise<boolean> {
  try {
    return typeof (await files.stat(path, { left: LOOK_MS })) !== 'number'
  } catch (error) {
    if (error instanceof GivenUp) return false
    throw error
  }
}

/** @throws `no-such-device`, `unsupported-platform` without sysfs */
export async function requireInfo(number: number): Promise<LoopInfo> {
  const info = await readInfo(number)
  if (info) return info
  if (!sysfs.isMounted())
    throw explain({ call: 'scandir', errno: -constants.errno.ENOENT, path: '/sys/block' }, 'read /sys')
  throw refusal('no-such-device', 'open', 'there is no such device', { path: devicePath(number) })
}
