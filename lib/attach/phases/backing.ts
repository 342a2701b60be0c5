/** The backing file: opened, read where that is needed to know its window, and let go of at the end. */

import type { Phase } from '../../common/phases.ts'
import { within } from '../../kernel/bounded.ts'
import { WHOLE_FILE } from '../../kernel/extents.ts'
import * as files from '../../kernel/files.ts'
import type { Sequence } from '../../kernel/sequence.ts'
import { decodeStat, STATX_SIZE } from '../../kernel/uapi.ts'
import { type Attaching, known } from '../attaching.ts'
import { describeRegular, openBacking } from '../backing.ts'
import { chooseWindow, mustRead } from '../window.ts'

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
    const stat = sequence.room(STATX_SIZE)
    const flags = settings.readOnly ? files.O_RDONLY : files.O_RDWR
    const file = sequence.call('openRegular', sequence.path(argument.path), flags)
    sequence.call('statx', file, stat)
    const ready = sequence.call('fcntlSetFl', file, 0)
    // K16, 6.15 and later: LOOP_CONFIGURE flushes the file, and would do that under the lock of /dev/loop-control.
    sequence.try('syncFileRange', file, ...WHOLE_FILE)
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
    await within(work.deadline.bound, backing.path).syncFileRange(backing.fd, ...WHOLE_FILE)
  }

  async undo(): Promise<void> {
    const { backing, file } = this.#work
    if (backing !== undefined) await backing.close()
    else if (known(file) >= 0) await files.close(known(file))
    this.#work.backing = undefined
    this.#work.file = -1
  }
}

/** The window of the file and the block size of the device, where the file has to be read to know them. */
export class WindowPhase implements Phase {
  readonly #work: Attaching
  #isChosen: boolean

  constructor(work: Attaching) {
    this.#work = work
    this.#isChosen = !mustRead(work.wanted)
  }

  get isDone(): boolean {
    return this.#isChosen
  }

  async byHand(): Promise<void> {
    const { backing, wanted, settings, deadline } = this.#work
    if (backing !== undefined) {
      const { warnings, ...window } = await chooseWindow(backing, wanted, deadline.bound)
      Object.assign(settings, window)
      this.#work.oddities = warnings
    }
    this.#isChosen = true
  }
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
