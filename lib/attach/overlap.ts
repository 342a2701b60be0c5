/** Other attachments of the same bytes: two writers, or a writer and a reader with caches of their own, destroy data. */

import { type LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { type Answers, type Asked, askDevices, couldHave, isOn, type Silence } from '../handle/ask.ts'
import { binding } from '../kernel/binding.ts'
import type { Bound } from '../kernel/bounded.ts'
import { devicePath } from '../kernel/devnode.ts'
import type { FileStat } from '../kernel/files.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { formatDevice, LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY, type LoopInfo64 } from '../kernel/uapi.ts'
import type { Backing } from './backing.ts'

/** What tells the file, and how it can be looked for. */
export type BackingIdentity = Pick<Backing, 'path' | 'fd' | 'device' | 'inode' | 'rdevice' | 'opened'>

/** What an attachment takes of the backing file. */
export interface Claim {
  offset: bigint
  sizeLimit: bigint
  readOnly: boolean
}

/** An attachment of the backing file, as found. */
export interface Found extends Claim {
  number: number
  diskSeq: number | undefined
  blockSize: number
  autoclear: boolean
  /** Not another file that has the same bytes, as a disk has those of its partitions. */
  isSameFile: boolean
  /** Where it begins and ends in the bytes of the file that was looked for. */
  start: bigint
  end: bigint
}

/**
 * All attachments of the file.
 *
 * The lease probe answers the common case in 3 us: where nobody else has the file open, no loop device has it either,
 * whoever attached it. It says nothing of block devices, of files that the caller has open, or without CAP_LEASE.
 *
 * @throws `overlap` where a device that could be one of them cannot be asked
 */
export async function findAttachments(backing: BackingIdentity, bound: Bound): Promise<Found[]> {
  return isFileUnshared(backing) ? [] : scanAttachments(backing, bound)
}

/** Whether nobody else has the file open; false where that cannot be told. */
export function isFileUnshared(backing: BackingIdentity): boolean {
  return backing.opened && binding().leaseProbeSync(backing.fd) >= 0
}

/**
 * Asks every attached device.
 *
 * @throws `overlap` where a device that could have the file cannot be asked
 */
export async function scanAttachments(backing: BackingIdentity, bound: Bound): Promise<Found[]> {
  const { found, silent } = await askForAttachments(backing, bound)
  for (const { number, why, errno } of silent) {
    // The filesystem of this file has just answered: a device whose filesystem does not is of another file. But one that
    // is slow has been given all the time there is.
    if (why === 'timeout' && (await isOn(backing.device, number, bound))) throw unanswered(number, errno, backing)
    if (why !== 'timeout' && (await couldHave(number, isLike(backing), bound))) throw notAsked(number, why, backing)
  }
  return found
}

/** The same, as far as the devices can be asked. */
export async function askForAttachments(
  backing: BackingIdentity,
  bound: Bound,
): Promise<{ found: Found[]; silent: Asked['silent'] }> {
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') throw explain({ call: 'scandir', errno: numbers, path: '/sys/block' }, 'read /sys')
  const { answers, silent } = await askDevices(
    numbers.filter((number) => sysfs.isBound(number)),
    bound,
    (number) => isOn(backing.device, number, bound),
  )
  const own = placeOf(backing)
  return { found: answers.flatMap((answer) => toFound(answer, backing, own)), silent }
}

/** Of a block device that sysfs does not show, and of a regular file: as if it were a disk of its own. */
function placeOf({ rdevice }: BackingIdentity): sysfs.OnDisk | undefined {
  return rdevice === undefined ? undefined : sysfs.readPlaceOnDisk(formatDevice(rdevice))
}

function toFound(
  { number, info, diskSeq, blockSize }: Answers,
  backing: BackingIdentity,
  own: sysfs.OnDisk | undefined,
): Found[] {
  const isSameFile = isBackedBy(info, backing)
  const other = own === undefined || info.rdevice === 0n ? undefined : sysfs.readPlaceOnDisk(formatDevice(info.rdevice))
  const isSameDisk = own !== undefined && other?.disk === own.disk
  if (!isSameFile && !isSameDisk) return []
  const { offset, sizeLimit } = info
  const claim = { offset, sizeLimit, readOnly: (info.flags & LO_FLAGS_READ_ONLY) !== 0 }
  const shift = own !== undefined && other !== undefined ? other.start - own.start : 0n
  const [start, end] = [offset + shift, other === undefined ? endOf(claim) : min(endOf(claim), other.size) + shift]
  if (own !== undefined && (start >= own.size || end <= 0n)) return []
  const autoclear = (info.flags & LO_FLAGS_AUTOCLEAR) !== 0
  return [{ ...claim, number, diskSeq, blockSize, autoclear, isSameFile, start, end }]
}

function min(a: bigint, b: bigint): bigint {
  return a < b ? a : b
}

function isBackedBy(info: LoopInfo64, { device, inode, rdevice }: BackingIdentity): boolean {
  if (rdevice !== undefined) return info.rdevice === rdevice
  return info.device === device && info.inode === inode
}

/** Of a block device any could be another node of it. */
function isLike({ device, inode, rdevice }: BackingIdentity): (file: FileStat) => boolean {
  return (file) => (rdevice === undefined ? file.dev === device && file.ino === inode : file.isBlockDevice())
}

function unanswered(number: number, errno: number | undefined, { path }: BackingIdentity): LoopError {
  const call = 'LOOP_GET_STATUS64'
  if (errno !== undefined) return explain({ call, errno, path: devicePath(number), number, backingFile: path })
  return refusal('timeout', 'ioctl', 'does not answer whether it has the same file', {
    path: devicePath(number),
    backingFile: path,
    hint: "raise the timeout, or allow it with overlap: 'allow'",
  })
}

function notAsked(number: number, why: Silence, { path }: BackingIdentity): LoopError {
  const cause = why === 'no-node' ? 'this /dev has no node for it' : 'its node may not be opened'
  return refusal('overlap', 'ioctl', `${devicePath(number)} may have the file, and cannot be asked: ${cause}`, {
    path: devicePath(number),
    backingFile: path,
    hint: "make its node or run as root; or, where you know that it has another file, attach with overlap: 'allow'",
  })
}

/** Whether both take some of the same bytes, and one of them can write. */
export function conflicts(found: Found, claim: Claim): boolean {
  return !(found.readOnly && claim.readOnly) && found.start < endOf(claim) && claim.offset < found.end
}

/** Without a limit it goes to the end of the file, which can move. */
function endOf({ offset, sizeLimit }: Claim): bigint {
  return sizeLimit === 0n ? 2n ** 64n : offset + sizeLimit
}

export function overlapError(ioctl: string, path: string, backing: BackingIdentity, other: Found): LoopError {
  const end = other.sizeLimit === 0n ? '' : ` to ${endOf(other)}`
  const bytes = other.offset === 0n && end === '' ? '' : `, from byte ${other.offset}${end}`
  const access = other.readOnly ? 'read-only' : 'for writing'
  return refusal(
    'overlap',
    'ioctl',
    `${backing.path} is attached ${access} to ${devicePath(other.number)} already${bytes}`,
    {
      ioctl,
      path,
      backingFile: backing.path,
      hint: "detach that one first, share it with overlap: 'reuse', attach both read-only, or allow it with overlap: 'allow'",
    },
  )
}
