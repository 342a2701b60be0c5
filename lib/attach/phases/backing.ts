/** The backing file: opened, asked for its block size where that is wanted, and let go of at the end. */

import type { Phase } from '../../common/phases.ts'
import { explain } from '../../errors/explain.ts'
import { within } from '../../kernel/bounded.ts'
import * as files from '../../kernel/files.ts'
import type { Sequence } from '../../kernel/sequence.ts'
import { decodeStat, encodePath, newStat, visibleSize } from '../../kernel/uapi.ts'
import { probeGptBlockSize } from '../../partitions/gpt.ts'
import { type Attaching, known } from '../attaching.ts'
import { type Backing, describeRegular, openBacking } from '../backing.ts'
import type { Settings } from '../configure.ts'

/** Opens the backing file: by its path in one hop where it is a regular file, else step by step. */
export class BackingPhase implements Phase {
  readonly #work: Attaching

  constructor(work: Attaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#work.backing !== undefined || this.#work.isOver
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    const { argument, settings } = work
    if (!('path' in argument)) return undefined
    const stat = newStat()
    const file = sequence.call(
      'openRegular',
      encodePath(argument.path),
      settings.readOnly ? files.O_RDONLY : files.O_RDWR,
    )
    sequence.call('statx', file, stat)
    const ready = sequence.call('fcntlSetFl', file, 0)
    // K16, 6.15 and later: LOOP_CONFIGURE flushes the file, and would do that under the lock of /dev/loop-control.
    sequence.try('syncFileRange', file)
    work.file = file
    return () => {
      work.file = file.fd
      if (!ready.succeeded) return
      work.backing = describeRegular(file.fd, decodeStat(stat), argument.path.toString(), !settings.readOnly)
    }
  }

  async byHand(): Promise<void> {
    const work = this.#work
    await this.undo()
    const backing = await openBacking(work.argument, work.wanted.readOnly, work.deadline)
    work.backing = backing
    work.file = backing.fd
    work.settings.readOnly ||= !backing.writable
    await within(work.deadline.bound, backing.path).syncFileRange(backing.fd)
  }

  async undo(): Promise<void> {
    const { backing, file } = this.#work
    if (backing !== undefined) await backing.close()
    else if (known(file) >= 0) await files.close(known(file))
    this.#work.backing = undefined
    this.#work.file = -1
  }
}

/** `blockSize: 'auto'`: that of the GPT in the window of the file, where it has one. */
export class BlockSizePhase implements Phase {
  readonly #work: Attaching
  #isProbed = false

  constructor(work: Attaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#isProbed || this.#work.wanted.blockSize !== 'auto'
  }

  async byHand(): Promise<void> {
    const { backing, settings } = this.#work
    if (backing !== undefined) settings.blockSize = await probeBlockSize(backing, settings)
    this.#isProbed = true
  }
}

async function probeBlockSize(backing: Backing, { offset, sizeLimit }: Settings): Promise<number | undefined> {
  const { fd, path } = backing
  const read = async (position: number, length: number): Promise<Uint8Array> => {
    const bytes = new Uint8Array(length)
    const count = await files.readAt(fd, bytes, length, Number(offset) + position)
    if (count < 0) throw explain({ call: 'read', errno: count, path, backingFile: path })
    return bytes.subarray(0, count)
  }
  return probeGptBlockSize(read, Number(visibleSize(backing.size, offset, sizeLimit)))
}

/** Lets go of the backing file, which the device holds by itself now. */
export class ReleaseBackingPhase implements Phase {
  readonly #work: Attaching

  constructor(work: Attaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#work.handle !== undefined && this.#work.backing === undefined
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    const { argument, file } = work
    // A descriptor of the caller's stays open.
    if (!('path' in argument)) return undefined
    const closed = sequence.call('close', file)
    return () => {
      if (closed.answer === undefined) return
      work.backing = undefined
      work.file = -1
    }
  }

  async byHand(): Promise<void> {
    await this.#work.backing?.close()
    this.#work.backing = undefined
    this.#work.file = -1
  }
}
