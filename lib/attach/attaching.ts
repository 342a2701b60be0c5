/** What an attach has got so far, which its phases hand on to one another. */

import type { FileArgument } from '../common/arguments.ts'
import type { Deadline } from '../common/deadline.ts'
import type { Warning } from '../common/warnings.ts'
import { isKnown } from '../kernel/features.ts'
import type { Step } from '../kernel/sequence.ts'
import { linksWithoutPartitions } from '../kernel/sysfs.ts'
import type { LoopInfo64 } from '../kernel/uapi.ts'
import type { Handle } from '../handle/handle.ts'
import type { Backing } from './backing.ts'
import type { Settings, Target } from './configure.ts'
import { isScanWanted, type Wanted } from './options.ts'

/** A number that is known, or the planned call that will answer it. */
export type Planned = number | Step

/** Descriptors are -1 where there is none. */
export class Attaching {
  readonly argument: FileArgument
  readonly wanted: Wanted
  readonly deadline: Deadline
  readonly settings: Settings

  backing: Backing | undefined
  /** The descriptor of the backing file. */
  file: Planned = -1
  /** /dev/loop-control. */
  control: Planned = -1
  /** Whether opening it was tried: a device that is asked for by number can be had without. */
  isControlTried = false
  /** The device that is tried; -1: none is chosen. */
  number: Planned = -1
  /** The descriptor of the device that LOOP_CONFIGURE is given. */
  device: Planned = -1
  /** The descriptor that the handle gets, where it has to be locked before the device is configured. */
  locked: Planned = -1
  /** The disk sequence number of the attachment; undefined before kernel 5.15. */
  diskSeq: number | undefined
  /** LOOP_CONFIGURE has succeeded: from here on undoing means LOOP_CLR_FD. */
  isAttached = false
  /** How many sectors had been written to the device before, in sysfs; undefined where that was not read. */
  writes: number | undefined
  /** What is odd about the window of the file. */
  oddities: readonly Warning[] = []
  /** Whether nobody else has the file open, as the lease probe after LOOP_CONFIGURE tells; undefined before that. */
  isUnshared: boolean | undefined
  /** What is in effect, once it has been looked at. */
  info: LoopInfo64 | undefined
  /** The result: of the new attachment, or of one that is there already and is shared. */
  handle: Handle | undefined

  constructor(argument: FileArgument, wanted: Wanted, deadline: Deadline) {
    this.argument = argument
    this.wanted = wanted
    this.deadline = deadline
    const { offset, sizeLimit, blockSize, directIO, autoclear, reference } = wanted
    this.settings = {
      readOnly: wanted.readOnly === true,
      offset,
      sizeLimit,
      blockSize: blockSize === 'auto' ? undefined : blockSize,
      directIO,
      partscan: isScanWanted(wanted),
      autoclear,
      reference,
    }
  }

  /** Nothing is left to be prepared: the device is attached, or another attachment serves in its place. */
  get isOver(): boolean {
    return this.isAttached || this.handle !== undefined
  }

  /**
   * Whether it can be told what the calls on the device will answer: an earlier attach of this process has shown it.
   * With direct I/O the kernel drops the flag without a word, and then there is more to be tried.
   */
  get isPredictable(): boolean {
    if (this.settings.directIO !== false || linksWithoutPartitions('free') === undefined) return false
    return isKnown('loopConfigure') && isKnown('diskSeq')
  }

  /** Of the device that is being set up, when nothing of it is only planned. */
  get target(): Target {
    const { number, device, backing, settings, deadline } = this
    if (typeof number !== 'number' || typeof device !== 'number' || backing === undefined) {
      throw new TypeError('the device is not open yet')
    }
    return { number, fd: device, backing, settings, bound: deadline.bound }
  }
}

/** The descriptor or number, where it is not only planned. */
export function known(value: Planned): number {
  return typeof value === 'number' ? value : -1
}
