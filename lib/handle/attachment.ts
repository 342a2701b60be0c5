/** What a handle knows of its attachment: the identity, and what was in effect when it was last looked at. */

import { refusal } from '../errors/errors.ts'
import { binding } from '../kernel/binding.ts'
import { devicePath } from '../kernel/devnode.ts'
import { diskSeqCountsAttachments, hasDiskSeq, numberOfMinor } from '../kernel/features.ts'
import { isServed } from '../kernel/servers.ts'
import { readBackingFileSync } from '../kernel/sysfs.ts'
import {
  LO_FLAGS_AUTOCLEAR,
  LO_FLAGS_READ_ONLY,
  LOOP_MAJOR,
  type LoopInfo64,
  majorOf,
  minorOf,
} from '../kernel/uapi.ts'
import { type Backing, describeRef, type LoopRef, nameOf } from './identity.ts'

/** What the device answers as long as nobody has touched it since it was last looked at. */
export interface Expected {
  diskSeq: number
  flags: number
  autoclear: boolean
  /** LOOP_GET_STATUS64 asks a filesystem that may not answer. */
  isServed: boolean
}

/** BLKGETDISKSEQ; undefined before kernel 5.15. */
export function readDiskSeq(fd: number): number | undefined {
  if (!hasDiskSeq(fd)) return undefined
  const diskSeq = binding().blkGetDiskSeqSync(fd)
  return diskSeq < 0 ? undefined : diskSeq
}

/** What of LOOP_GET_STATUS64 is remembered. */
export type Seen = Backing & Pick<LoopInfo64, 'flags' | 'fileName'>

export class Attachment {
  readonly number: number
  #diskSeq: number | undefined
  #backing: Backing | undefined
  #flags: number | undefined
  #reference: string | undefined
  /** Whether the device was attached when the handle was made. */
  readonly #isAttached: boolean
  /** A change of our own is under way: the device is still ours, whatever it looks like. */
  #isChanging = false

  constructor(
    number: number,
    {
      backing,
      attached,
      diskSeq,
    }: {
      backing: Seen | undefined
      attached: boolean | undefined
      diskSeq: number | undefined
    },
  ) {
    this.number = number
    this.#diskSeq = diskSeq
    this.#backing = backing
    this.#flags = backing?.flags
    this.#reference = backing?.fileName
    this.#isAttached = attached ?? backing !== undefined
  }

  get ref(): LoopRef {
    const diskSeq = this.#diskSeq
    const backing = this.#backing
    const ref: LoopRef = { number: this.number }
    if (diskSeq !== undefined) ref.diskSeq = diskSeq
    if (backing !== undefined && !diskSeqCountsAttachments()) ref.backing = nameOf(backing)
    return ref
  }

  /** Undefined where the kernel gives nothing that would tell another attachment. */
  get expected(): Expected | undefined {
    const [diskSeq, flags] = [this.#diskSeq, this.#flags]
    if (diskSeq === undefined || flags === undefined || !diskSeqCountsAttachments()) return undefined
    const isServedBy = this.#backing === undefined || isServed(this.#backing.device)
    return { diskSeq, flags, autoclear: (flags & LO_FLAGS_AUTOCLEAR) !== 0, isServed: isServedBy }
  }

  /** Whether the attachment is read-only, which it is for good. */
  get isReadOnly(): boolean {
    return ((this.#flags ?? 0) & LO_FLAGS_READ_ONLY) !== 0
  }

  /** `lo_file_name` as it was last seen or set. */
  get reference(): string | undefined {
    return this.#reference
  }

  /**
   * The loop device that this one is backed by. From its numbers: the path that sysfs shows is that of the reader's root,
   * and the node can be gone.
   */
  get lowerNumber(): number | undefined {
    const rdevice = this.#backing?.rdevice
    if (rdevice === undefined || majorOf(rdevice) !== LOOP_MAJOR) return undefined
    return numberOfMinor(minorOf(rdevice))
  }

  /** @throws `replaced` where the reference names another attachment than this one */
  assertIs({ diskSeq, backing }: LoopRef): void {
    const own = this.#backing && nameOf(this.#backing)
    const same =
      (diskSeq === undefined || this.#diskSeq === undefined || diskSeq === this.#diskSeq) &&
      (backing === undefined || backing === own)
    if (same) return
    const now = `${describeRef(this.#diskSeq, own)}, not ${describeRef(diskSeq, backing)}`
    throw refusal('replaced', 'open', `it was detached, or attached anew, since the reference was made (${now})`, {
      path: devicePath(this.number),
      hint: 'find the device of the file anew, or attach the file',
    })
  }

  /**
   * Takes over what LOOP_GET_STATUS64 has answered. Another process may have changed the file or the window: it is the
   * same attachment all the same.
   *
   * @throws `replaced`
   */
  takeOver(info: LoopInfo64, fd: number, diskSeq?: number): void {
    this.assertStill(fd, diskSeq)
    this.#flags = info.flags
    this.#reference = info.fileName
    if (!this.#isChanging) this.#backing = info
  }

  /**
   * An open descriptor of the device defers every detach, so an attachment that was there when the device was opened
   * is still there, whoever changed its file or its settings meanwhile: the disk sequence number that it has now is
   * taken over. A device that was free when it was opened can be anybody's since. `diskSeq`: where it has been read.
   *
   * @throws `replaced`
   */
  assertStill(fd: number, diskSeq?: number): void {
    if (this.#isChanging) return
    if (!this.#isAttached) {
      throw refusal('replaced', 'ioctl', `now belongs to another attachment, of ${readBackingFileSync(this.number)}`, {
        path: devicePath(this.number),
        ioctl: 'LOOP_GET_STATUS64',
        hint: 'it was free when this handle was opened; nothing was changed',
      })
    }
    this.#diskSeq = diskSeq ?? readDiskSeq(fd)
  }

  /** Runs a call that changes the identity, answers a negative errno, and is our own. */
  async change(
    backing: Backing & { fileName?: string },
    fd: () => number,
    call: () => Promise<number>,
  ): Promise<number> {
    this.#isChanging = true
    try {
      const answer = await call()
      if (answer >= 0) {
        this.#backing = backing
        this.#reference = backing.fileName ?? this.#reference
        this.#diskSeq = readDiskSeq(fd())
      }
      return answer
    } finally {
      this.#isChanging = false
    }
  }
}
