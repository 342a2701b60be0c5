/** The device: chosen and opened, configured, looked at; and anew with another one where somebody was faster. */

import type { Phase } from '../../common/phases.ts'
import { findHolders } from '../../errors/holders.ts'
import { readDiskSeq } from '../../handle/attachment.ts'
import { LOCK_EX, LOCK_NB } from '../../handle/device-lock.ts'
import { noteTaken } from '../../handle/free-devices.ts'
import { binding } from '../../kernel/binding.ts'
import { UNDOING, within } from '../../kernel/bounded.ts'
import { devicePath } from '../../kernel/devnode.ts'
import { observeDiskSeq } from '../../kernel/features.ts'
import { close, O_RDONLY, O_RDWR } from '../../kernel/files.ts'
import type { Sequence } from '../../kernel/sequence.ts'
import { isServed } from '../../kernel/servers.ts'
import { isUdevRunning } from '../../kernel/system.ts'
import * as sysfs from '../../kernel/sysfs.ts'
import { CONFIG_SIZE, decodeInfo, INFO_SIZE } from '../../kernel/uapi.ts'
import { dropLeftovers } from '../../partitions/blkpg.ts'
import { type Attaching, known } from '../attaching.ts'
import { compareInfo, configure, verify, writeSettings } from '../configure.ts'
import type { FreeDevice } from '../device.ts'
import type { Refusals, Refused } from '../refusals.ts'
import type { LockPhase } from './lock.ts'

export class DevicePhase implements Phase {
  readonly #work: Attaching
  readonly #free: FreeDevice
  readonly #refusals: Refusals
  readonly #lock: LockPhase

  constructor(work: Attaching, free: FreeDevice, refusals: Refusals, lock: LockPhase) {
    this.#work = work
    this.#free = free
    this.#refusals = refusals
    this.#lock = lock
  }

  get isDone(): boolean {
    return known(this.#work.device) >= 0 || this.#work.isOver
  }

  /** A descriptor that is open for reading only makes the kernel attach read-only. */
  #flags(): number {
    return this.#work.settings.readOnly ? O_RDONLY : O_RDWR
  }

  /** A free device without partitions of an earlier image (K3). */
  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    const number = this.#free.likely
    const links = sysfs.linksWithoutPartitions('free')
    // K4: where udev is there, a node of another name is opened.
    const isHidden = work.settings.partscan && isUdevRunning()
    if (number === undefined || links === undefined || isHidden || !work.isPredictable) return undefined
    const free = sequence.expect(links, 'sysfsLinks', number)
    const device = sequence.call('openLoop', number, this.#flags())
    work.number = number
    work.device = device
    const locked = work.wanted.lock ? sequence.call('openLoop', number, O_RDONLY) : undefined
    if (locked) sequence.try('flock', locked, LOCK_EX | LOCK_NB)
    work.locked = locked ?? -1
    return () => {
      work.device = device.fd
      work.locked = locked?.fd ?? -1
      if (free.answer !== undefined) noteTaken(number)
    }
  }

  async byHand(): Promise<void> {
    const work = this.#work
    const number = await this.#free.choose(known(work.control))
    work.number = number
    const left = sysfs.hasPartitions(number) ? sysfs.readPartitions(number) : []
    const fd = await this.#free.open(number, this.#flags())
    if (fd < 0) {
      const failure = { call: 'open', errno: fd, path: devicePath(number), number }
      return this.tryAnother(await this.#refusals.classify(failure, 'open device'))
    }
    work.device = fd
    if (work.wanted.lock) await this.#lockEarly(number)
    await this.#refusals.assertInTime(number)
    const busy = await dropLeftovers(number, left)
    if (!busy) return undefined
    // Partitions are left on the device that cannot be removed: where any device will do, another one.
    const role = busy.call === 'open' ? 'open device' : 'BLKPG delete'
    if (work.wanted.number === undefined) return this.tryAnother({ failure: busy, role, reason: 'in-use' })
    return this.tryAnother(await this.#refusals.classify({ ...busy, holders: await findHolders(number, [fd]) }, role))
  }

  /**
   * LOOP_CONFIGURE has udev look, and so has the close of a writable descriptor: the lock is taken before, on the
   * descriptor that the handle keeps. Somebody who has it now is waited for later.
   */
  async #lockEarly(number: number): Promise<void> {
    const fd = await this.#free.open(number, O_RDONLY)
    if (fd < 0) return
    this.#work.locked = fd
    binding().flockSync(fd, LOCK_EX | LOCK_NB)
  }

  /** Lets go of the device and of the lock, and waits a moment. */
  async tryAnother(refused: Refused): Promise<void> {
    const number = known(this.#work.number)
    await this.#close()
    this.#lock.release()
    await this.#refusals.wait(number, refused)
  }

  async #close(): Promise<void> {
    const { device, locked } = this.#work
    this.#work.device = -1
    this.#work.locked = -1
    for (const fd of [known(locked), known(device)]) if (fd >= 0) await close(fd)
  }

  async undo(): Promise<void> {
    await this.#close()
    await this.#free.removeMade()
  }
}

/** LOOP_CONFIGURE, and before 5.8 LOOP_SET_FD. */
export class ConfigurePhase implements Phase {
  readonly #work: Attaching
  readonly #refusals: Refusals
  readonly #device: DevicePhase

  constructor(work: Attaching, refusals: Refusals, device: DevicePhase) {
    this.#work = work
    this.#refusals = refusals
    this.#device = device
  }

  get isDone(): boolean {
    return this.#work.isOver
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    if (!work.isPredictable) return undefined
    const before = sequence.call('blkGetDiskSeq', work.device)
    const config = sequence.room(CONFIG_SIZE)
    writeSettings(config, work.settings)
    const configured = sequence.call('loopConfigure', work.device, work.file, config)
    const after = sequence.call('blkGetDiskSeq', work.device)
    return () => {
      work.isAttached = configured.succeeded
      if (after.succeeded) this.#noteDiskSeq(before.answer, after.answer)
    }
  }

  async byHand(): Promise<void> {
    const work = this.#work
    const { target } = work
    await this.#refusals.assertInTime(target.number)
    const before = readDiskSeq(target.fd)
    const failure = await configure(target, work.deadline)
    if (failure) return this.#device.tryAnother(await this.#refusals.classify(failure))
    work.isAttached = true
    this.#noteDiskSeq(before, readDiskSeq(target.fd))
    return undefined
  }

  /** Before anything is decided by which of two attachments is the older one. */
  #noteDiskSeq(before: number | undefined, after: number | undefined): void {
    this.#work.diskSeq = after
    observeDiskSeq(before, after)
  }

  /** Only what was attached here: after a failed LOOP_CONFIGURE it would detach the winner of the race. */
  async undo(): Promise<void> {
    const fd = known(this.#work.device)
    if (this.#work.isAttached && fd >= 0) await within(UNDOING).loopClrFd(fd)
  }
}

/** What is in effect: read back, mended where a bug of the kernel wants that, and compared with what was asked. */
export class VerifyPhase implements Phase {
  readonly #work: Attaching

  constructor(work: Attaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#work.info !== undefined || this.#work.handle !== undefined
  }

  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    const { settings, device } = work
    if (!work.isPredictable) return undefined
    const room = sequence.room(INFO_SIZE)
    let last = sequence.call('loopGetStatus64', device, room)
    let isAsExpected = (): boolean => last.succeeded
    if (settings.blockSize !== undefined) {
      const blockSize = settings.blockSize
      const [status, size] = [last, sequence.expect(blockSize, 'blkSszGet', device)]
      isAsExpected = () => status.succeeded && size.answer === blockSize
    }
    if (!settings.readOnly) {
      // K5, 5.12 and later: BLKROSET outlives the attachment it was set for.
      const isSoFar = isAsExpected
      last = sequence.expect(0, 'blkRoGet', device)
      isAsExpected = () => isSoFar() && last.answer === 0
    }
    return () => {
      if (!isAsExpected()) return
      this.#noteWrites()
      const info = decodeInfo(room)
      this.#compare(info)
      work.info = info
    }
  }

  /** Where the server can die: then it matters whether anything had been written. */
  #noteWrites(): void {
    const { backing, settings, number } = this.#work
    if (settings.readOnly || backing === undefined || !isServed(backing.device)) return
    const sectors = binding().sysfsSectorsWrittenSync(known(number))
    this.#work.writes = sectors < 0 ? undefined : sectors
  }

  #compare(info: ReturnType<typeof decodeInfo>): void {
    const { number, backing, settings } = this.#work
    if (backing !== undefined) compareInfo({ number: known(number), backing, settings }, info)
  }

  async byHand(): Promise<void> {
    const { target } = this.#work
    this.#noteWrites()
    this.#work.info = await verify(target)
  }
}
