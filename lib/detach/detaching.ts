/** What a detach has got so far, which its phases hand on to one another. */

import type { Deadline } from '../common/deadline.ts'
import { explain } from '../errors/explain.ts'
import type { Handle } from '../handle/handle.ts'
import { binding } from '../kernel/binding.ts'
import { canAdministrate } from '../kernel/process.ts'
import type { Step } from '../kernel/sequence.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN } from '../kernel/uapi.ts'
import { constants } from 'node:os'

/** What the attachment is, as far as its end depends on that. */
export interface Present {
  autoclear: boolean
  /** All that the kernel has. */
  partitions: readonly sysfs.KnownPartition[]
  /** K3, up to 7.1: what was added with BLKPG outlives the detach. What the kernel found itself it removes itself. */
  added: readonly sysfs.KnownPartition[]
}

export class Detaching {
  readonly handle: Handle
  readonly deadline: Deadline
  /** What cannot be flushed is lost, and said as a warning: the device goes all the same. */
  readonly losesData: boolean

  present: Present | undefined
  isFlushed: boolean
  /** An exclusive descriptor besides the handle's own; -1: none. */
  exclusive: number | Step = -1
  /** The handle's descriptor is the exclusive one. */
  isExclusive = false
  /** LOOP_CLR_FD has been issued and the attachment is ending. */
  isGoing = false
  /** The device is free, as sysfs shows it. */
  isGone = false

  constructor(handle: Handle, deadline: Deadline, losesData: boolean) {
    this.handle = handle
    this.deadline = deadline
    this.losesData = losesData
    this.isFlushed = handle.isReadOnly
  }

  /** Autoclear as it was last seen. */
  get autoclear(): boolean {
    return this.present?.autoclear ?? this.handle.expected?.autoclear ?? false
  }

  /**
   * What is written and not yet in the file cannot get there any more between LOOP_CLR_FD and the last close. The kernel
   * tells of a failed write once: a second fsync(2) would succeed.
   *
   * @param answer that of fsync(2)
   * @throws `io`
   */
  noteFlush(answer: number): void {
    this.isFlushed = true
    // Where it has not come back, what is in the page cache has perhaps not been written at all.
    if (answer >= 0 || (answer !== -constants.errno.ETIMEDOUT && hasNoWrites(this.handle))) return
    const error = this.handle.explain('fsync', answer)
    if (!this.losesData) throw error
    this.handle.warnings.add('data-lost', `what was written to ${this.handle.path} last is lost: ${error.message}`)
  }
}

/** Where nothing was written since the device was attached, a flush that fails has lost nothing. */
function hasNoWrites({ number, writesBefore }: Handle): boolean {
  return writesBefore !== undefined && binding().sysfsSectorsWrittenSync(number) === writesBefore
}

/**
 * From sysfs, which asks no filesystem; where it is not mounted, from LOOP_GET_STATUS64.
 *
 * @throws `not-attached`, `detaching`, `replaced`
 */
export function readPresent(handle: Handle): Present {
  const { number } = handle
  const isBound = sysfs.isBound(number)
  if (!isBound && sysfs.isMounted()) throw handle.explain('LOOP_CLR_FD', -constants.errno.ENXIO)
  if (!isBound) return presentOf(handle, handle.readInfoSync().info.flags)
  handle.assertAttachment()
  const autoclear = sysfs.readAutoclearSync(number)
  if (autoclear === undefined) return presentOf(handle, handle.readInfoSync().info.flags)
  const flags = (autoclear ? LO_FLAGS_AUTOCLEAR : 0) | (sysfs.isScannedSync(number) ? LO_FLAGS_PARTSCAN : 0)
  return presentOf(handle, flags)
}

function presentOf({ number }: Handle, flags: number): Present {
  const partitions = sysfs.hasPartitions(number) ? sysfs.readPartitions(number) : []
  const added = (flags & LO_FLAGS_PARTSCAN) === 0 ? partitions : []
  return { autoclear: (flags & LO_FLAGS_AUTOCLEAR) !== 0, partitions, added }
}

/**
 * BLKPG wants CAP_SYS_ADMIN: without it the partitions would stay on the free device.
 *
 * @throws `permission`
 */
export function assertRemovable(handle: Handle, { added }: Present): void {
  if (added.length > 0 && !canAdministrate()) {
    throw explain(handle.failure('BLKPG', -constants.errno.EACCES), 'BLKPG delete')
  }
}
