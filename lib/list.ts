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
import { askDevices } from './handle.ts'
import { devicePath } from './kernel/devnode.ts'
import * as files from './kernel/files.ts'
import { inBatches } from './kernel/batches.ts'
import { Sequence } from './kernel/sequence.ts'
import * as sysfs from './kernel/sysfs.ts'
import { decodeStat, encodePath, type LoopInfo64, newStat, type Stat } from './kernel/uapi.ts'
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

/** So often a device is read again: one can be attached and detached in the time that reading takes, again and again. */
const TRIES = 64

/** By number. The files of a device are read one by one: those that were not of one moment are read again. */
async function readInfos(numbers: readonly number[], free: boolean): Promise<LoopInfo[]> {
  const told: Promise<LoopInfo>[] = []
  let left = numbers
  for (let tries = TRIES; left.length > 0; tries--) {
    const found = await sysfs.readDevices(left, free)
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
  const exists = typeof (await files.stat(text)) !== 'number'
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
    return findByInfo([...(await readAttached()).keys()], (info) => info.fileName === reference)
  }
  const argument = checkBackingFile(what)
  assertSupported()
  const { dev, ino } = await identityOf(argument)
  const attached = await readAttached()
  const byPath = await findByPath(attached, (stat) => stat.device === dev && stat.inode === ino)
  // Their path does not tell: deleted, not to be reached from here, or another file by now.
  const others = [...attached.keys()].filter((number) => !byPath.some((info) => info.number === number))
  const byDevice = await findByInfo(others, (info) => info.device === dev && info.inode === ino)
  return [...byPath, ...byDevice].toSorted((a, b) => a.number - b.number)
}

/** The path of the backing file by the device's number, null where it is too long to be shown. */
async function readAttached(): Promise<Map<number, string | null>> {
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') throw explain({ call: 'scandir', errno: numbers, path: '/sys/block' }, 'read /sys')
  const found = await sysfs.readBackingFiles(numbers)
  if (typeof found === 'number') throw explain({ call: 'open', errno: found, path: '/sys/block' }, 'read /sys')
  return found
}

/** Those whose path is there and is the wanted file; no device is opened. */
async function findByPath(
  attached: ReadonlyMap<number, string | null>,
  isWanted: (stat: Stat) => boolean,
): Promise<LoopInfo[]> {
  const readable = [...attached].filter((entry): entry is [number, string] => entry[1] !== null)
  const wanted = (await inBatches(readable, (batch) => filterByStat(batch, isWanted))).flat()
  const infos = await readInfos(
    wanted.map(([number]) => number),
    false,
  )
  // Detached or changed meanwhile, it is another file's.
  return infos.filter(({ number, backingFile }) => backingFile === attached.get(number))
}

async function filterByStat<Entry extends readonly [number, string]>(
  entries: readonly Entry[],
  isWanted: (stat: Stat) => boolean,
): Promise<Entry[]> {
  const sequence = new Sequence()
  const statted = entries.map((entry) => {
    const bytes = newStat()
    return { entry, bytes, step: sequence.try('statxPath', encodePath(entry[1]), bytes) }
  })
  await sequence.run()
  return statted.filter(({ step, bytes }) => step.answer === 0 && isWanted(decodeStat(bytes))).map(({ entry }) => entry)
}

async function findByInfo(numbers: readonly number[], isWanted: (info: LoopInfo64) => boolean): Promise<LoopInfo[]> {
  const wanted = (await askDevices(numbers)).filter(({ info }) => isWanted(info))
  const infos = await readInfos(
    wanted.map(({ number }) => number),
    false,
  )
  return infos.filter((info) =>
    wanted.some(({ number, diskSeq }) => number === info.number && diskSeq === info.diskSeq),
  )
}

interface FileIdentity {
  dev: bigint
  ino: bigint
}

async function identityOf(argument: FileArgument): Promise<FileIdentity> {
  const found = 'fd' in argument ? await files.fstat(argument.fd) : await files.stat(argument.path)
  if (typeof found !== 'number') return found
  const path = 'fd' in argument ? `descriptor ${argument.fd}` : argument.path.toString()
  throw explain({ call: 'stat', errno: found, path, backingFile: path }, 'open backing file')
}

/** @throws `no-such-device`, `unsupported-platform` without sysfs */
export async function requireInfo(number: number): Promise<LoopInfo> {
  const info = await readInfo(number)
  if (info) return info
  if (!sysfs.isMounted())
    throw explain({ call: 'scandir', errno: -constants.errno.ENOENT, path: '/sys/block' }, 'read /sys')
  throw refusal('no-such-device', 'open', 'there is no such device', { path: devicePath(number) })
}
