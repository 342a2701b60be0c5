/** The devices that a file, or a reference, is attached to. */

import { constants } from 'node:os'
import { basename, dirname, join } from 'node:path'
import {
  type BackingFile,
  checkBackingFile,
  checkBoolean,
  checkOptions,
  checkReference,
  type FileArgument,
  wrongType,
  wrongValue,
} from '../common/arguments.ts'
import { checkDeadline, type Deadline, LOOKING, type Wait } from '../common/deadline.ts'
import { assertSupported, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { fromCaller } from '../errors/from-caller.ts'
import { explained } from '../errors/given-up.ts'
import { type Answers, askDevices, couldHave, isOn, type Silent } from '../handle/ask.ts'
import type { Bound } from '../kernel/bounded.ts'
import { devicePath } from '../kernel/devnode.ts'
import * as files from '../kernel/files.ts'
import * as sysfs from '../kernel/sysfs.ts'
import type { LoopInfo64 } from '../kernel/uapi.ts'
import { type LoopInfo, readInfos } from './list.ts'
import { findLoopAt } from './mounted.ts'

export interface FindOptions extends Wait {
  /**
   * Also returns devices that may be the ones you look for, but could not be asked; `LoopInfo.unconfirmed` says why.
   * Default false: such devices are left out, and find() rejects if it found nothing else.
   */
  unconfirmed?: boolean | undefined
  /** Milliseconds; default 5 000. */
  timeout?: number | undefined
}

/**
 * Returns the devices that are attached to the file `what`, or that have the tag `reference`, or the device that is
 * mounted, as a whole or with one of its partitions, on the folder `mountPoint`.
 *
 * `find` recognises a file by its device and inode, and a block device by its number, whichever node was attached
 * (LOOP_GET_STATUS64). Paths are not compared, because a path in another mount namespace can be another file here.
 * `find` needs the privileges to open devices.
 *
 * @example
 * ```ts
 * const [info] = await find('disk.img')
 * console.log(info?.path ?? 'not attached')
 * ```
 */
export async function find(
  what: BackingFile | { reference: string } | { mountPoint: string },
  options?: FindOptions,
): Promise<LoopInfo[]> {
  return await fromCaller(findDevices(what, options))
}

async function findDevices(what: Parameters<typeof find>[0], options: FindOptions | undefined): Promise<LoopInfo[]> {
  const given = checkOptions(options, ['unconfirmed', 'signal', 'timeout'])
  const unconfirmed = given.unconfirmed === undefined ? false : checkBoolean('unconfirmed', given.unconfirmed)
  const deadline = checkDeadline(given, LOOKING)
  if (typeof what === 'object' && what !== null && 'mountPoint' in what) {
    const mountPoint = checkMountPoint(what.mountPoint)
    assertSupported()
    const number = await explained(() => findLoopAt(mountPoint, deadline.bound), mountPoint)
    return number === undefined ? [] : readInfos([number], false)
  }
  if (typeof what === 'object' && what !== null && 'reference' in what) {
    const reference = checkReference(what.reference)
    assertSupported()
    const wanted: Wanted = {
      is: (info) => info.fileName === reference,
      isAwaited: async () => true,
      couldBe: async () => true,
    }
    return explained(() => findWanted(wanted, unconfirmed, deadline))
  }
  const argument = checkBackingFile(what)
  assertSupported()
  return explained(async () => findWanted(await sameFile(argument, deadline.bound), unconfirmed, deadline))
}

function checkMountPoint(value: unknown): string {
  if (typeof value !== 'string') throw wrongType('mountPoint', 'a path', value)
  if (value === '' || value.includes('\0')) throw wrongValue('mountPoint', 'must be a path')
  return value
}

/** The devices attached to a file that had this path and was deleted; what is there now is another file, or nothing. */
export async function findOfDeleted(path: string | Buffer, options: Wait): Promise<LoopInfo[]> {
  const { bound } = checkDeadline(options, LOOKING)
  return explained(() => findByFormerPath(path, bound), path.toString())
}

async function findByFormerPath(path: string | Buffer, bound: Bound): Promise<LoopInfo[]> {
  const there = await files.realPath(path, bound)
  const folder = typeof there === 'string' ? undefined : await files.realPath(dirname(path.toString()), bound)
  const whole =
    typeof there === 'string' ? there : typeof folder === 'string' && join(folder, basename(path.toString()))
  if (whole === false) return []
  const numbers = (await readAttached()).filter((number) => {
    return sysfs.readBackingFileSync(number) === `${whole} (deleted)`
  })
  const infos = await readInfos(numbers, false)
  return infos.filter(({ backingFile, backingDeleted }) => backingDeleted && backingFile === whole)
}

interface Wanted {
  is: (info: LoopInfo64) => boolean
  /** Of a device that does not answer: whether it is given all the time there is. */
  isAwaited: (number: number) => Promise<boolean>
  /** Of a device that cannot be asked, or does not answer. */
  couldBe: (silent: Silent) => Promise<boolean>
}

async function sameFile(argument: FileArgument, bound: Bound): Promise<Wanted> {
  const own = await identityOf(argument, bound)
  const is = ({ device, inode, rdevice }: LoopInfo64): boolean =>
    own.isBlockDevice() ? rdevice === own.rdev : device === own.dev && inode === own.ino
  const isSame = (other: files.FileStat): boolean =>
    own.isBlockDevice() ? other.rdev === own.rdev : other.dev === own.dev && other.ino === own.ino
  const isAwaited = (number: number): Promise<boolean> => isOn(own.dev, number, bound)
  const couldBe = async ({ number, why }: Silent): Promise<boolean> => {
    // Where the filesystem of a device does not answer, that of the file that is looked for has.
    if (why === 'timeout') return isAwaited(number)
    return couldHave(number, isSame, bound)
  }
  return { is, isAwaited, couldBe }
}

async function findWanted(
  { is, isAwaited, couldBe }: Wanted,
  unconfirmed: boolean,
  deadline: Deadline,
): Promise<LoopInfo[]> {
  const { answers, silent } = await askDevices(await readAttached(), deadline.bound, isAwaited)
  const wanted = answers.filter(({ info }) => is(info))
  const candidates = []
  for (const candidate of silent) {
    if (await couldBe(candidate)) candidates.push(candidate)
  }
  const confirmed = await describe(wanted)
  if (unconfirmed) {
    const infos = await readInfos(
      candidates.map(({ number }) => number),
      false,
    )
    const reasons = new Map(candidates.map(({ number, why }) => [number, why]))
    const told = infos.map((info) => ({ ...info, unconfirmed: reasons.get(info.number) ?? 'permission' }))
    return [...confirmed, ...told].toSorted((a, b) => a.number - b.number)
  }
  const [first] = candidates
  if (confirmed.length === 0 && first !== undefined) throw cannotTell(first)
  return confirmed
}

function cannotTell({ number, why, errno: answer }: Silent): Error {
  const path = devicePath(number)
  if (answer !== undefined) return explain({ call: 'LOOP_GET_STATUS64', errno: answer, path, number })
  const hint = 'with unconfirmed: true it is in the answer, and says why it is not certain'
  if (why === 'timeout') {
    return refusal('timeout', 'ioctl', 'it could be what is looked for, and does not answer', { path, hint })
  }
  const errno = why === 'permission' ? -constants.errno.EACCES : -constants.errno.ENOENT
  return explain({ call: 'open', errno, path, number }, 'open device')
}

/** Those that have been detached or attached anew since they were asked are left out. */
async function describe(wanted: readonly Answers[]): Promise<LoopInfo[]> {
  const infos = await readInfos(
    wanted.map(({ number }) => number),
    false,
  )
  return infos.filter((info) =>
    wanted.some(({ number, diskSeq }) => number === info.number && (diskSeq ?? info.diskSeq) === info.diskSeq),
  )
}

/** The numbers of the attached devices. */
async function readAttached(): Promise<number[]> {
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') throw explain({ call: 'scandir', errno: numbers, path: '/sys/block' }, 'read /sys')
  return numbers.filter((number) => sysfs.isBound(number))
}

async function identityOf(argument: FileArgument, bound: Bound): Promise<files.FileStat> {
  const found = 'fd' in argument ? await files.fstat(argument.fd, bound) : await files.stat(argument.path, bound)
  if (typeof found !== 'number') return found
  const path = 'fd' in argument ? `descriptor ${argument.fd}` : argument.path.toString()
  throw explain({ call: 'stat', errno: found, path, backingFile: path }, 'open backing file')
}
