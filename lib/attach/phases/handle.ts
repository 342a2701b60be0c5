/** The handle: a read-only descriptor of its own, and then the partitions. */

import type { Phase } from '../../common/phases.ts'
import { explain } from '../../errors/explain.ts'
import { lockDevice } from '../../handle/device-lock.ts'
import { Handle } from '../../handle/handle.ts'
import { UNDOING, within } from '../../kernel/bounded.ts'
import { devicePath } from '../../kernel/devnode.ts'
import { close, O_RDONLY } from '../../kernel/files.ts'
import type { Sequence } from '../../kernel/sequence.ts'
import * as sysfs from '../../kernel/sysfs.ts'
import { type Range, removeAllUnused, removePresent } from '../../partitions/blkpg.ts'
import { showPartitions } from '../../partitions/scan.ts'
import { type Attaching, known } from '../attaching.ts'
import type { FreeDevice } from '../device.ts'

/** A descriptor of its own, opened before the one for writing is closed: autoclear fires where there is none. */
export class HandlePhase implements Phase {
  readonly #work: Attaching
  readonly #free: FreeDevice
  /** Open already, where the rest did not come about. */
  #kept = -1

  constructor(work: Attaching, free: FreeDevice) {
    this.#work = work
    this.#free = free
  }

  get isDone(): boolean {
    return this.#work.handle !== undefined && known(this.#work.device) === -1
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    const isOpen = typeof work.locked !== 'number' || work.locked >= 0
    const kept = isOpen ? undefined : sequence.call('openLoop', work.number, O_RDONLY)
    const closed = sequence.call('close', work.device)
    return () => {
      if (closed.answer !== undefined) work.device = -1
      if (kept !== undefined) this.#kept = kept.fd
      else if (closed.answer !== undefined) this.#takeLocked()
      if (this.#kept >= 0) this.#make()
    }
  }

  async byHand(): Promise<void> {
    const work = this.#work
    const number = known(work.number)
    if (work.handle === undefined) {
      // Another process that made the node may have failed meanwhile, and removed it again.
      this.#takeLocked()
      if (this.#kept < 0) this.#kept = await this.#free.open(number, O_RDONLY)
      if (this.#kept < 0) {
        throw explain({ call: 'open', errno: this.#kept, path: devicePath(number), number }, 'open device')
      }
      this.#make()
    }
    const fd = known(work.device)
    work.device = -1
    if (fd >= 0) await close(fd)
    await this.#free.removeSurplus(number)
  }

  #takeLocked(): void {
    this.#kept = known(this.#work.locked)
    this.#work.locked = -1
  }

  #make(): void {
    const work = this.#work
    const { info, diskSeq, writes } = work
    if (info === undefined) return
    const { createNode } = work.wanted
    work.handle = new Handle(known(work.number), this.#kept, {
      owned: true,
      backing: info,
      createNode,
      diskSeq,
      writes,
    })
    this.#kept = -1
  }

  async undo(): Promise<void> {
    const { handle } = this.#work
    const fd = handle?.owned ? handle.descriptor : this.#kept
    if (fd >= 0) await within(UNDOING).loopClrFd(fd)
    if (this.#kept >= 0) await close(this.#kept)
    this.#kept = -1
    await handle?.close()
    this.#work.handle = undefined
  }
}

/** As asked for; where that fails, what was added is removed. */
export class PartitionsPhase implements Phase {
  readonly #work: Attaching
  readonly #free: FreeDevice
  #isSettled = false
  #added: readonly Range[] = []

  constructor(work: Attaching, free: FreeDevice) {
    this.#work = work
    this.#free = free
  }

  get isDone(): boolean {
    return this.#isSettled || !this.#hasWork()
  }

  #hasWork(): boolean {
    const { lock, partscan } = this.#work.wanted
    return lock || partscan !== false || this.#free.isHiddenFromUdev
  }

  async byHand(): Promise<void> {
    const { handle, wanted, deadline } = this.#work
    if (handle === undefined) throw new TypeError('there is no handle yet')
    if (wanted.lock) await lockDevice(handle, deadline)
    // K9, 5.18 to 6.14: nothing but the close that it watches for tells udev of a new attachment.
    if (this.#free.isHiddenFromUdev) await sysfs.announce(handle.number)
    const { partscan } = wanted
    if (partscan !== false) this.#added = await showPartitions(handle, partscan === true ? 'any' : partscan, deadline)
    this.#isSettled = true
  }

  async undo(): Promise<void> {
    const { handle } = this.#work
    if (handle === undefined || this.#work.wanted.partscan === false) return
    // Of a device that goes all of them, whoever added them: they would stay on it.
    await (handle.owned ? removeAllUnused(handle) : removePresent(handle, this.#added))
  }
}
