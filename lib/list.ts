/** What is attached, read from sysfs: no privileges, and no device is opened (whoever detaches would see that). */

import { constants } from 'node:os'
import {
  type BackingFile,
  checkBackingFile,
  checkBoolean,
  checkOptions,
  checkReference,
  type FileArgument,
} from './arguments.ts'
import { assertSupported, refusal } from './errors.ts'
import { askDevice, devicePath } from './handle.ts'
import { fstat, stat } from './kernel/files.ts'
import * as sysfs from './kernel/sysfs.ts'
import type { LoopInfo64 } from './kernel/uapi.ts'
import { explain } from './reasons.ts'

/** A loop device as sysfs shows it; plain data. */
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
   * The kernel's path of the backing file as this process's root sees it, without ` (deleted)`; null when free, and
   * for a path of more than 4094 bytes, which sysfs cannot show.
   */
  backingFile: string | null
  /** The file was deleted: the kernel says so, and nothing exists under the whole text. */
  backingDeleted: boolean
  /** Bytes. */
  offset: number
  /** Bytes; 0: to the end of the file. */
  sizeLimit: number
  /** What the device shows, in bytes: a multiple of 512. */
  size: number
  /** Logical block size in bytes. */
  blockSize: number
  readOnly: boolean
  autoclear: boolean
  partscan: boolean
  directIO: boolean
  /** Backed by this other loop device. */
  lower?: number
}

export interface ListOptions {
  /** The free devices too. Default false. */
  all?: boolean | undefined
}

const DELETED = ' (deleted)'

/** The attached devices, by number. */
export async function list(options?: ListOptions): Promise<LoopInfo[]> {
  const { all } = checkOptions(options, ['all'])
  const wantsAll = all === undefined ? false : checkBoolean('all', all)
  assertSupported()
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') throw explain({ call: 'scandir', errno: numbers, path: '/sys/block' }, 'read /sys')
  return readInfos(numbers, wantsAll)
}

/** One device; undefined where there is none of that number. */
export async function readInfo(number: number): Promise<LoopInfo | undefined> {
  const [info] = await readInfos([number], true)
  return info
}

/** By number. The files of a device are read one by one: those that were not of one moment are read again. */
async function readInfos(numbers: readonly number[], free: boolean): Promise<LoopInfo[]> {
  const told: Promise<LoopInfo>[] = []
  let left = numbers
  for (let tries = 8; left.length > 0; tries--) {
    const found = await sysfs.readDevices(left, free)
    if (typeof found === 'number') throw explain({ call: 'open', errno: found, path: '/sys/block' }, 'read /sys')
    const moved: number[] = []
    for (const [i, files] of found.entries()) {
      const number = left[i] ?? Number.NaN
      if (files?.moved && tries > 0) moved.push(number)
      else if (files && (free || files.backingFile !== null)) told.push(toInfo(number, files))
    }
    left = moved
  }
  const infos = await Promise.all(told)
  return infos.toSorted((a, b) => a.number - b.number)
}

/** Of a file that is 0 or 1. */
const YES = '1\n'

/** What the files of a device say. */
export async function toInfo(number: number, { attributes, backingFile }: sysfs.DeviceFiles): Promise<LoopInfo> {
  const attached = backingFile !== null
  const diskSeq = attributes.diskseq
  const file = await describeBackingFile(backingFile ?? null)
  const lower = /^\/dev\/loop(\d+)$/.exec(file.backingFile ?? '')?.[1]
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
    ...(lower !== undefined && { lower: Number(lower) }),
  }
}

/** A file can be named `x (deleted)`: only that nothing exists under the whole text tells. */
export async function describeBackingFile(
  text: string | null,
): Promise<Pick<LoopInfo, 'backingFile' | 'backingDeleted'>> {
  if (text === null || !text.endsWith(DELETED)) return { backingFile: text, backingDeleted: false }
  const exists = typeof (await stat(text)) !== 'number'
  return exists
    ? { backingFile: text, backingDeleted: false }
    : { backingFile: text.slice(0, -DELETED.length), backingDeleted: true }
}

/**
 * The devices attached to this very file, by device and inode: links, other paths and bind mounts are the same file.
 * Or those that carry the tag.
 */
export async function find(what: BackingFile | { reference: string }): Promise<LoopInfo[]> {
  if (typeof what === 'object' && what !== null && 'reference' in what) {
    const reference = checkReference(what.reference)
    assertSupported()
    return filter(await list(), ({ number }) => matchesDevice(number, (info) => info.fileName === reference))
  }
  const argument = checkBackingFile(what)
  assertSupported()
  const wanted = await identityOf(argument)
  return filter(await list(), (info) => isAttachedTo(info, wanted))
}

interface FileIdentity {
  dev: bigint
  ino: bigint
}

async function identityOf(argument: FileArgument): Promise<FileIdentity> {
  const found = 'fd' in argument ? await fstat(argument.fd) : await stat(argument.path)
  if (typeof found !== 'number') return found
  const path = 'fd' in argument ? `descriptor ${argument.fd}` : argument.path.toString()
  throw explain({ call: 'stat', errno: found, path, backingFile: path }, 'open backing file')
}

/** Asks the device itself only where the path does not tell: deleted, unreachable from here, or another file by now. */
async function isAttachedTo(info: LoopInfo, wanted: FileIdentity): Promise<boolean> {
  if (info.backingFile !== null && !info.backingDeleted) {
    const atPath = await stat(info.backingFile)
    if (typeof atPath !== 'number' && atPath.dev === wanted.dev && atPath.ino === wanted.ino) return true
  }
  return matchesDevice(info.number, ({ device, inode }) => device === wanted.dev && inode === wanted.ino)
}

async function matchesDevice(number: number, matches: (info: LoopInfo64) => boolean): Promise<boolean> {
  return (await askDevice(number, matches)) ?? false
}

async function filter(infos: LoopInfo[], matches: (info: LoopInfo) => Promise<boolean>): Promise<LoopInfo[]> {
  const found: LoopInfo[] = []
  for (const info of infos) if (await matches(info)) found.push(info)
  return found
}

/** @throws `no-such-device`, `unsupported-platform` without sysfs */
export async function requireInfo(number: number): Promise<LoopInfo> {
  const info = await readInfo(number)
  if (info) return info
  if (!sysfs.isMounted())
    throw explain({ call: 'scandir', errno: -constants.errno.ENOENT, path: '/sys/block' }, 'read /sys')
  throw refusal('no-such-device', 'open', 'there is no such device', { path: devicePath(number) })
}
