/** Other attachments of the same bytes: two writers, or a writer and a reader with caches of their own, destroy data. */

import { type LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { askDevices } from '../handle/ask.ts'
import type { Bound } from '../kernel/bounded.ts'
import { binding } from '../kernel/binding.ts'
import { devicePath } from '../kernel/devnode.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { LO_FLAGS_READ_ONLY, type LoopInfo64 } from '../kernel/uapi.ts'
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
}

/**
 * All attachments of the file.
 *
 * The lease probe answers the common case in 3 us: where nobody else has the file open, no loop device has it either,
 * whoever attached it. It says nothing of block devices, of files that the caller has open, or without CAP_LEASE.
 */
export async function findAttachments(backing: BackingIdentity, bound?: Bound): Promise<Found[]> {
  return isFileUnshared(backing) ? [] : scanAttachments(backing, bound)
}

/** Whether nobody else has the file open; false where that cannot be told. */
export function isFileUnshared(backing: BackingIdentity): boolean {
  return backing.opened && binding().leaseProbeSync(backing.fd) >= 0
}

/** Asks every attached device. */
export async function scanAttachments(backing: BackingIdentity, bound?: Bound): Promise<Found[]> {
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') throw explain({ call: 'scandir', errno: numbers, path: '/sys/block' }, 'read /sys')
  const { answers } = await askDevices(
    numbers.filter((number) => sysfs.isBound(number)),
    bound,
  )
  return answers
    .filter(({ info }) => isSameFile(info, backing))
    .map(({ number, info, diskSeq, blockSize }) => ({
      number,
      diskSeq,
      blockSize,
      offset: info.offset,
      sizeLimit: info.sizeLimit,
      readOnly: (info.flags & LO_FLAGS_READ_ONLY) !== 0,
    }))
}

function isSameFile(info: LoopInfo64, { device, inode, rdevice }: BackingIdentity): boolean {
  if (rdevice !== undefined) return info.rdevice === rdevice
  return info.device === device && info.inode === inode
}

/** Whether both take some of the same bytes, and one of them can write. */
export function conflicts(a: Claim, b: Claim): boolean {
  return !(a.readOnly && b.readOnly) && a.offset < endOf(b) && b.offset < endOf(a)
}

/** Without a limit it goes to the end of the file, which can move. */
function endOf({ offset, sizeLimit }: Claim): bigint {
  return sizeLimit === 0n ? 2n ** 64n : offset + sizeLimit
}

export function overlapError(ioctl: string, path: string, backing: BackingIdentity, other: Found): LoopError {
  const bytes = other.sizeLimit === 0n ? `from byte ${other.offset} on` : `bytes ${other.offset} to ${endOf(other)}`
  const access = other.readOnly ? 'read-only' : 'for writing'
  return refusal('overlap', 'ioctl', `${bytes}, the file is attached ${access} to ${devicePath(other.number)}`, {
    ioctl,
    path,
    backingFile: backing.path,
    hint: "detach that one first, attach both read-only, or allow it with overlap: 'allow'",
  })
}
