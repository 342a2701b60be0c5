/** From a file to an attached device: everything checked before, verified after, undone when it fails. */

import { constants } from 'node:os'
import { attachOpenAtOnce, attachPathAtOnce, canAttachAtOnce, type Order, type Outcome } from './at-once.ts'
import {
  type BackingFile,
  checkBackingFile,
  checkBlockSize,
  checkOptions,
  type FileArgument,
} from '../common/arguments.ts'
import { backoff, checkDeadline, Deadline, tries } from '../common/deadline.ts'
import type { Failure, Role } from '../errors/causes.ts'
import { assertSupported, LoopError, type LoopErrorReason, refusal } from '../errors/errors.ts'
import { diagnose, explain, withStatus } from '../errors/explain.ts'
import { findHolders } from '../errors/holders.ts'
import { lockDevice } from '../handle/device-lock.ts'
import { Handle, readDiskSeq } from '../handle/handle.ts'
import { openHandle } from '../handle/open.ts'
import { binding } from '../kernel/binding.ts'
import { checkDeviceNode, devicePath, isDevKernels, makeNode, openDevice, removeNode } from '../kernel/devnode.ts'
import { observeDiskSeq, pageSize } from '../kernel/features.ts'
import { close, closeSync, isNodeNewerThan, O_RDONLY, O_RDWR, open, readAt, unlink } from '../kernel/files.ts'
import { isUdevRunning } from '../kernel/surroundings.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { type LoopInfo64, visibleSize } from '../kernel/uapi.ts'
import { dropLeftovers, removePresent } from '../partitions/blkpg.ts'
import { probeGptBlockSize } from '../partitions/gpt.ts'
import { settlePartitions } from '../partitions/nodes.ts'
import { addFromTable } from '../partitions/partitions.ts'
import { type Backing, openBacking } from './backing.ts'
import { configure, type Settings, type Target, verify } from './configure.ts'
import { type ControlLock, isLockIdle, lockControl } from './lock.ts'
import { addDevice, getFree, openControl, removeDevice } from './loop-control.ts'
import { type AttachOptions, checkWanted, OPTION_NAMES, type Wanted } from './options.ts'
import { type Claim, conflicts, findAttachments, type Found, overlapError, scanAttachments } from './overlap.ts'

const { EEXIST, ENOENT } = constants.errno

/**
 * Attaches `file` to a device and returns the handle that owns it.
 *
 * @throws TypeError, RangeError, LoopError, or the signal's reason
 */
export async function attachFile(file: BackingFile, options?: AttachOptions): Promise<Handle> {
  const given = checkOptions(options, OPTION_NAMES)
  const argument = checkBackingFile(file)
  const wanted = checkWanted(given)
  const deadline = checkDeadline(given, 10_000)
  assertSupported()
  // K1, 6.11 and later: one that the kernel refuses leaves the device half configured.
  if (typeof wanted.blockSize === 'number') checkBlockSize('blockSize', wanted.blockSize, pageSize())
  deadline.throwIfAborted()

  return new Attachment(argument, wanted, deadline).run()
}

/** That of the GPT in the window of the file; undefined where there is none. */
async function probeBlockSize(backing: Backing, { offset, sizeLimit }: Wanted): Promise<number | undefined> {
  const { fd, path } = backing
  const read = async (position: number, length: number): Promise<Uint8Array> => {
    const bytes = new Uint8Array(length)
    const count = await readAt(fd, bytes, length, Number(offset) + position)
    if (count < 0) throw explain({ call: 'read', errno: count, path, backingFile: path })
    return bytes.subarray(0, count)
  }
  return probeGptBlockSize(read, Number(visibleSize(backing.size, offset, sizeLimit)))
}

/** One try at one device that failed, in a way that another try, perhaps at another device, may not. */
interface Refused {
  failure: Failure
  role?: Role
  reason: LoopErrorReason
}

/** How often a device may refuse for the same reason before that is taken for lasting. */
const CHANCES = 3

/** An attach from the path on is in flight: a second one at the same time would not get the lock. */
let isUnderWay = false

/** The work on one attachment, from the file to a verified handle. */
class Attachment {
  readonly #file: FileArgument
  readonly #wanted: Wanted
  readonly #deadline: Deadline
  #opened: Backing | undefined
  readonly #settings: Settings
  #control = -1
  /** Made on the way, to be removed again if the attach fails. */
  readonly #made = new Set<number>()
  /** Nodes made on the way, by the device's number, each with its `major:minor`; removed again too. */
  readonly #nodes = new Map<number, string>()
  /** udev has not seen that the device was opened for writing. */
  #unwatched = false
  /** Refusals of the same device for the same reason, in a row. */
  #refused = { number: -1, reason: 'unknown' as LoopErrorReason, times: 0 }
  /** How the last attempt ended, and which it was. */
  #last: { refused: Refused; attempt: number } | undefined

  constructor(file: FileArgument, wanted: Wanted, deadline: Deadline) {
    this.#file = file
    this.#wanted = wanted
    this.#deadline = deadline
    const blockSize = wanted.blockSize === 'auto' ? undefined : wanted.blockSize
    this.#settings = { ...wanted, blockSize, readOnly: wanted.readOnly === true, partscan: wanted.partscan === true }
  }

  get #backing(): Backing {
    if (this.#opened === undefined) throw new TypeError('the backing file is not open')
    return this.#opened
  }

  async run(): Promise<Handle> {
    try {
      const handle = await this.#tryFromPath()
      if (handle) return handle
      await this.#openBacking()
      await this.#openControl()
      return await this.#tryUntilDone()
    } catch (error) {
      await this.#removeMade()
      throw error
    } finally {
      if (this.#control >= 0) closeSync(this.#control)
      await this.#opened?.close()
    }
  }

  async #openBacking(): Promise<void> {
    const backing = (this.#opened ??= await openBacking(this.#file, this.#wanted.readOnly, this.#deadline))
    this.#deadline.throwIfAborted()
    this.#settings.readOnly ||= !backing.writable
    if (this.#wanted.blockSize === 'auto') this.#settings.blockSize = await probeBlockSize(backing, this.#wanted)
  }

  /** The usual case; undefined where it is none. */
  async #tryFromPath(): Promise<Handle | undefined> {
    const file = this.#file
    const { blockSize, overlap } = this.#wanted
    if (!('path' in file) || blockSize === 'auto' || overlap === 'reuse' || !this.#canDoAtOnce()) return undefined
    // It would not get the lock, and have the file open for nothing.
    if (isUnderWay || !isLockIdle()) return undefined
    isUnderWay = true
    try {
      return await this.#attachAtOnce(async (order) => {
        const { device, backing, control } = await attachPathAtOnce(file.path, order, overlap !== 'allow')
        this.#opened = backing
        this.#control = control
        return device
      })
    } finally {
      isUnderWay = false
    }
  }

  #canDoAtOnce(): boolean {
    // K4: then a node of another name is opened.
    return canAttachAtOnce(this.#settings) && !(this.#settings.partscan && isUdevRunning())
  }

  async #attachAtOnce(attach: (order: Order) => Promise<Outcome>): Promise<Handle | undefined> {
    const { number: wanted, createNode } = this.#wanted
    const [before, since] = [sysfs.countBlockDevices(), Date.now()]
    const { number, attached, configured } = await attach({ number: wanted, settings: this.#settings })
    if (number === undefined) return undefined
    if (wanted === undefined) this.#noteIfMade(number, before, since)
    if (configured !== undefined) {
      const target = { number, fd: configured, backing: this.#backing, settings: this.#settings }
      return this.#complete(target, false)
    }
    if (attached === undefined) return undefined
    const { fd, info, diskSeq } = attached
    const handle = new Handle(info.number, fd, { owned: true, backing: info, createNode, diskSeq })
    try {
      this.#deadline.throwIfAborted()
    } catch (error) {
      await binding().loopClrFd(fd)
      await handle.close()
      throw error
    }
    return this.#withPartitions(handle)
  }

  async #tryUntilDone(): Promise<Handle> {
    for (let attempt = 1; ; attempt++) {
      const result = await this.#tryOnce()
      if (result instanceof Handle) return result
      this.#last = { refused: result, attempt }
      if (!(await this.#deadline.pause(backoff(attempt)))) throw await this.#giveUp(result, attempt)
    }
  }

  async #tryOnce(): Promise<Handle | Refused> {
    // Held from before the look for overlaps until after LOOP_CONFIGURE
    const lock = await lockControl(this.#control, this.#deadline)
    try {
      const shared = await this.#findShared()
      if (shared) return shared
      if ((lock.held || this.#wanted.overlap === 'allow') && this.#canDoAtOnce() && !this.#deadline.isOver) {
        const handle = await this.#attachAtOnce(async (order) => {
          const outcome = await attachOpenAtOnce(this.#control, this.#backing, order)
          if (outcome.attached !== undefined || outcome.configured !== undefined) lock.release()
          return outcome
        })
        if (handle) return handle
      }
      const number = await this.#choose()
      const result = await this.#tryDevice(number, lock)
      if (!(result instanceof Handle)) this.#remember(number, result)
      return result
    } finally {
      lock.release()
    }
  }

  #remember(number: number, { failure, role, reason }: Refused): void {
    const again = this.#refused.number === number && this.#refused.reason === reason
    this.#refused = { number, reason, times: again ? this.#refused.times + 1 : 1 }
    if (reason === 'node-missing' && this.#refused.times === CHANCES) throw explain(failure, role)
  }

  /** The attachment to be used in place of a new one. */
  async #findShared(): Promise<Handle | undefined> {
    const { overlap } = this.#wanted
    if (overlap === 'allow') return undefined
    const found = await findAttachments(this.#backing)
    this.#deadline.throwIfAborted()
    if (overlap === 'reuse') {
      for (const candidate of found.filter((other) => this.#isAsWanted(other))) {
        const handle = await this.#share(candidate)
        if (handle) return await this.#withPartitions(handle)
      }
    }
    this.#refuseConflict(found)
    return undefined
  }

  #isAsWanted(other: Found): boolean {
    const { number } = this.#wanted
    const { blockSize } = this.#settings
    const claim: Claim = this.#settings
    return (
      other.offset === claim.offset &&
      other.sizeLimit === claim.sizeLimit &&
      other.readOnly === claim.readOnly &&
      (number === undefined || other.number === number) &&
      (blockSize === undefined || other.blockSize === blockSize)
    )
  }

  /** Opened first, so that it cannot go any more, and then looked at once more; undefined where it went before. */
  async #share({ number, diskSeq }: Found): Promise<Handle | undefined> {
    let handle: Handle
    try {
      handle = await openHandle(diskSeq === undefined ? { number } : { number, diskSeq })
    } catch (error) {
      if (LoopError.is(error, 'permission') || LoopError.is(error, 'resources')) throw error
      return undefined
    }
    let isShared = false
    try {
      const still = (await scanAttachments(this.#backing)).find((other) => other.number === number)
      isShared = still !== undefined && this.#isAsWanted(still)
      handle.isShared = isShared
      return isShared ? handle : undefined
    } finally {
      if (!isShared) await handle.close()
    }
  }

  #refuseConflict(found: Found[]): void {
    const other = found.find((candidate) => conflicts(candidate, this.#settings))
    if (!other) return
    const { number } = this.#wanted
    const path = number === undefined ? this.#backing.path : devicePath(number)
    throw overlapError('LOOP_CONFIGURE', path, this.#backing, other)
  }

  /** Where the lock was not held, two may have looked before either attached: the newer one gives way. */
  async #giveWay(fd: number, number: number): Promise<void> {
    const diskSeq = readDiskSeq(fd) ?? 0
    const others = (await scanAttachments(this.#backing)).filter((other) => other.number !== number)
    this.#refuseConflict(others.filter((other) => (other.diskSeq ?? 0) <= diskSeq))
  }

  async #giveUp({ failure, role }: Refused, attempt: number): Promise<LoopError> {
    const error = await diagnose({ ...failure, effort: tries(attempt, this.#deadline) }, role)
    if (this.#wanted.number !== undefined || error.reason === 'dirty-cache') return error
    // With a free choice of devices every refusal was another device's: what is left to say is that they all were taken.
    return new LoopError({
      reason: 'contention',
      errno: error.errno,
      syscall: error.syscall,
      ioctl: error.ioctl,
      path: error.path,
      backingFile: error.backingFile,
      detail: `every free device was taken by somebody else first (${attempt} attempts in ${this.#deadline.waited} ms)`,
      cause: error,
    })
  }

  /** The number of the device to try next; it exists, or did a moment ago. */
  async #choose(): Promise<number> {
    const { number } = this.#wanted
    if (number !== undefined) {
      if (!sysfs.deviceExists(number)) await this.#make(number)
      return number
    }
    const [before, since] = [sysfs.countBlockDevices(), Date.now()]
    const free = await getFree(this.#control)
    // Free, yet it refuses: somebody holds it exclusively, and LOOP_CTL_GET_FREE would offer it for ever.
    const { number: refused, reason, times } = this.#refused
    if (free === refused && reason === 'in-use' && times >= CHANCES) return this.#make()
    this.#noteIfMade(free, before, since)
    return free
  }

  /** One device more can be anybody's: the node tells whether it is this one. In a container's /dev it has none yet. */
  #noteIfMade(number: number, before: number, since: number): void {
    if (sysfs.countBlockDevices() <= before) return
    if (checkDeviceNode(number) === -ENOENT || isNodeNewerThan(devicePath(number), since)) this.#made.add(number)
  }

  async #make(number?: number): Promise<number> {
    try {
      const made = await addDevice(this.#control, number)
      this.#made.add(made)
      return made
    } catch (error) {
      // Another process was faster, and may just be removing it again; that it exists is all that is wanted.
      if (number !== undefined && LoopError.is(error) && error.code === 'EEXIST') return number
      throw error
    }
  }

  /** A device that was asked for by number can be had without it. */
  async #openControl(): Promise<void> {
    if (this.#control >= 0) return
    try {
      this.#control = await openControl()
    } catch (error) {
      const { number } = this.#wanted
      if (number === undefined || !sysfs.deviceExists(number)) throw error
    }
  }

  /** A failed attach leaves no device and no node behind. Whoever took one of them meanwhile keeps it. */
  async #removeMade(): Promise<void> {
    for (const [number, device] of this.#nodes) if (!sysfs.isBound(number)) removeNode(devicePath(number), device)
    for (const number of this.#made) {
      try {
        await this.#openControl()
        // Whoever looks at every device has it open for a moment.
        await removeDevice(this.#control, number, new Deadline(250))
      } catch {
        // in use by another, or gone
      }
    }
  }

  async #tryDevice(number: number, lock: ControlLock): Promise<Handle | Refused> {
    // A descriptor that is open for reading only makes the kernel attach read-only.
    const fd = await this.#openDevice(number, this.#settings.readOnly ? O_RDONLY : O_RDWR)
    if (fd < 0) return this.#classify({ call: 'open', errno: fd, path: devicePath(number), number }, 'open device')
    const target = { number, fd, backing: this.#backing, settings: this.#settings }
    let isOurs = true
    try {
      await this.#assertInTime(number)
      const diskSeq = readDiskSeq(fd)
      const busy = await dropLeftovers(number)
      if (busy) return await this.#avoid({ ...busy, fd }, busy.call === 'open' ? 'open device' : 'BLKPG delete')
      const failure = await configure(target, this.#deadline)
      if (failure) return await this.#classify(failure)
      isOurs = false
      lock.release()
      observeDiskSeq(diskSeq, readDiskSeq(fd))
      return await this.#complete(target, !lock.held && this.#wanted.overlap !== 'allow')
    } finally {
      if (isOurs) await close(fd)
    }
  }

  /** From what LOOP_CONFIGURE has attached to a handle, or undone. `isRace`: another may have been attached as well. */
  async #complete(target: Target, isRace: boolean): Promise<Handle> {
    const { number, fd } = target
    try {
      this.#deadline.throwIfAborted()
      if (isRace) await this.#giveWay(fd, number)
      const info = await verify(target)
      this.#deadline.throwIfAborted()
      return await this.#makeHandle(number, info)
    } catch (error) {
      // Attached here: after a failed LOOP_CONFIGURE this would detach the winner of the race.
      await binding().loopClrFd(fd)
      throw error
    } finally {
      await close(fd)
    }
  }

  /** With its node made, where it is missing in a /dev that the kernel does not look after. */
  async #openDevice(number: number, flags: number): Promise<number> {
    const unwatched = flags === O_RDWR && this.#settings.partscan ? await this.#openUnwatched(number) : -ENOENT
    if (unwatched >= 0) return unwatched
    const fd = await openDevice(number, flags)
    const device = fd === -ENOENT && this.#wanted.createNode ? sysfs.readDeviceNumbers(number) : undefined
    if (device === undefined || isDevKernels()) return fd
    const path = devicePath(number)
    const made = await makeNode(path, device)
    // Another process was faster.
    if (made < 0 && made !== -EEXIST) throw explain({ call: 'mknod', errno: made, path, number }, 'make node')
    if (made >= 0) this.#nodes.set(number, device)
    return openDevice(number, flags)
  }

  /**
   * K4: for writing, by a node of our own. udev watches that of the device: when one who could write closes it, udev has
   * the kernel read the partition table again, and the partitions vanish for a moment after the attach has resolved.
   */
  async #openUnwatched(number: number): Promise<number> {
    const device = isUdevRunning() ? sysfs.readDeviceNumbers(number) : undefined
    if (device === undefined || !isDevKernels()) return -ENOENT
    const path = `/dev/.loopctl-${process.pid}-${number}`
    const made = await makeNode(path, device)
    if (made < 0) return made
    const fd = await open(path, O_RDWR)
    await unlink(path)
    if (fd >= 0) this.#unwatched = true
    return fd
  }

  /** The last moment at which giving up costs nothing. */
  async #assertInTime(number: number): Promise<void> {
    this.#deadline.throwIfAborted()
    if (!this.#deadline.isOver) return
    if (this.#last) throw await this.#giveUp(this.#last.refused, this.#last.attempt)
    throw refusal('timeout', 'ioctl', 'the time was up before anything failed', { path: devicePath(number) })
  }

  /** With a descriptor of its own, opened before the writable one is closed: autoclear fires where there is none. */
  async #makeHandle(number: number, info: LoopInfo64): Promise<Handle> {
    // Another process that made the node may have failed meanwhile, and removed it again.
    const fd = await this.#openDevice(number, O_RDONLY)
    if (fd < 0) throw explain({ call: 'open', errno: fd, path: devicePath(number), number }, 'open device')
    const { createNode } = this.#wanted
    return this.#withPartitions(new Handle(number, fd, { owned: true, backing: info, createNode }))
  }

  /** As asked for; where that fails the handle is closed, and what was added removed. */
  async #withPartitions(handle: Handle): Promise<Handle> {
    const { partscan } = this.#wanted
    let added: Awaited<ReturnType<typeof addFromTable>> = []
    try {
      if (this.#wanted.lock) await lockDevice(handle, this.#deadline)
      // K9, 5.18 to 6.14: nothing but the close that it watches for tells udev of a new attachment.
      if (this.#unwatched) await sysfs.announce(handle.number)
      if (partscan === 'user') added = await addFromTable(handle)
      if (partscan !== false) await settlePartitions(handle, this.#deadline)
      return handle
    } catch (error) {
      // Of a device that goes all of them, whoever added them: they would stay on it.
      await removePresent(handle, handle.owned ? sysfs.readPartitions(handle.number) : added)
      if (handle.owned) await binding().loopClrFd(handle.descriptor)
      await handle.close()
      throw error
    }
  }

  /** Partitions are left on the device that cannot be removed: another one will do. */
  async #avoid(failure: Failure, role: Role): Promise<Refused> {
    const { number } = this.#wanted
    if (number === undefined) return { failure: { ...failure, fd: undefined }, role, reason: 'in-use' }
    const holders = await findHolders(number, failure.fd === undefined ? [] : [failure.fd])
    return this.#classify({ ...failure, holders }, role)
  }

  /** A failure that will stay is thrown; one that may pass is returned. */
  async #classify(failure: Failure, role?: Role): Promise<Refused> {
    const known = await withStatus(failure)
    const error = explain(known, role)
    const passes =
      MAY_PASS.has(error.reason) || (error.reason === 'already-attached' && this.#wanted.number === undefined)
    if (!passes) throw error
    // The descriptor will be closed by the time it is told.
    return { failure: { ...known, fd: undefined }, reason: error.reason, ...(role && { role }) }
  }
}

const MAY_PASS = new Set<LoopErrorReason>(['detaching', 'in-use', 'dirty-cache', 'no-such-device', 'node-missing'])
