/** A free device: chosen or made, its node made where that is missing, opened. What was made is removed if the attach fails. */

import { constants } from 'node:os'
import { Deadline } from '../common/deadline.ts'
import { LoopError } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { findFree, likelyFree, noteTaken } from '../handle/free-devices.ts'
import { type Bound, UNDOING } from '../kernel/bounded.ts'
import { checkDeviceNode, devicePath, isDevKernels, makeNode, openDevice, removeNode } from '../kernel/devnode.ts'
import { closeSync, O_RDWR } from '../kernel/files.ts'
import { openByHiddenNode } from '../kernel/hidden-folder.ts'
import { isUdevRunning } from '../kernel/system.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { decide } from '../kernel/trace.ts'
import { addDevice, getFree, openControl, removeDevice } from './loop-control.ts'
import type { Refusals } from './refusals.ts'

const { EEXIST, ENOENT } = constants.errno

export interface DeviceWishes {
  number: number | undefined
  /** A number that is meant for somebody else. */
  avoid: number | undefined
  partscan: boolean
  createNode: boolean
  /** The end that the calls have. */
  bound: Bound
}

export class FreeDevice {
  readonly #wishes: DeviceWishes
  readonly #refusals: Refusals
  /** Made by LOOP_CTL_ADD on the way. */
  readonly #made = new Set<number>()
  /** Nodes made on the way, by the device's number, each with its `major:minor`. */
  readonly #nodes = new Map<number, string>()
  #isHiddenFromUdev = false

  constructor(wishes: DeviceWishes, refusals: Refusals) {
    this.#wishes = wishes
    this.#refusals = refusals
  }

  /** udev has not seen that the device was opened for writing. */
  get isHiddenFromUdev(): boolean {
    return this.#isHiddenFromUdev
  }

  /** A device that is free as far as is known, without looking; undefined where nothing is known. */
  get likely(): number | undefined {
    const { number, avoid } = this.#wishes
    return number ?? likelyFree((candidate) => candidate === avoid || this.#refusals.hasRefused(candidate))
  }

  /**
   * The number of the device to try next: it exists, or did a moment ago.
   *
   * @param control -1: there is no /dev/loop-control
   */
  async choose(control: number): Promise<number> {
    const { number, avoid } = this.#wishes
    if (number !== undefined) {
      if (!sysfs.deviceExists(number)) await this.#make(control, number)
      return number
    }
    const free = await findFree()
    if (free === undefined) return getFree(control, this.#wishes.bound)
    const candidates = free.filter((candidate) => candidate !== avoid && !this.#refusals.isLasting(candidate))
    const fresh = candidates.filter((candidate) => !this.#refusals.hasRefused(candidate))
    // Where no device can be made, nodes cannot either, mostly: one that is there.
    const there = control < 0 ? fresh.find((candidate) => checkDeviceNode(candidate) === 0) : undefined
    return there ?? fresh[0] ?? candidates[0] ?? this.#make(control)
  }

  async #make(control: number, number?: number): Promise<number> {
    decide(() => `no device is free${number === undefined ? '' : ` of number ${number}`}: one is made`)
    try {
      const made = await addDevice(control, number, this.#wishes.bound)
      this.#made.add(made)
      // The lower device of a stack must not take the number that the upper one is to have.
      return made === this.#wishes.avoid ? await this.#make(control) : made
    } catch (error) {
      // Another process was faster, and may just be removing it again; that it exists is all that is wanted.
      if (number !== undefined && LoopError.is(error) && error.code === 'EEXIST') return number
      throw error
    }
  }

  /** With its node made, where that is missing. The negative errno where it cannot be opened. */
  async open(number: number, flags: number): Promise<number> {
    noteTaken(number)
    const hidden = flags === O_RDWR && this.#wishes.partscan ? await this.#openHiddenFromUdev(number) : -ENOENT
    if (hidden >= 0) return hidden
    const fd = await openDevice(number, flags, this.#wishes.bound)
    const device = fd === -ENOENT && this.#wishes.createNode ? sysfs.readDeviceNumbers(number) : undefined
    if (device === undefined || (isDevKernels() && !this.#refusals.hasMissedNode(number))) return fd
    const path = devicePath(number)
    decide(() => `${path} has no node here: it is made`)
    const made = await makeNode(path, device)
    // Another process was faster.
    if (made < 0 && made !== -EEXIST) throw explain({ call: 'mknod', errno: made, path, number }, 'make node')
    if (made >= 0) this.#nodes.set(number, device)
    return openDevice(number, flags, this.#wishes.bound)
  }

  /**
   * K4: for writing, by a node of our own. udev watches that of the device: when one who could write closes it, udev has
   * the kernel read the partition table again, and the partitions vanish for a moment after the attach has resolved.
   * Where no such node can be had, the device is opened as usual.
   */
  async #openHiddenFromUdev(number: number): Promise<number> {
    if (!isUdevRunning() || !isDevKernels() || !sysfs.deviceExists(number)) return -ENOENT
    const fd = await openByHiddenNode(number, O_RDWR, this.#wishes.bound)
    if (fd >= 0) this.#isHiddenFromUdev = true
    return fd
  }

  /** A failed attach leaves no device and no node behind. Whoever took one of them meanwhile keeps it. */
  async removeMade(): Promise<void> {
    for (const [number, device] of this.#nodes) if (!sysfs.isBound(number)) removeNode(devicePath(number), device)
    if (this.#made.size > 0) await this.#removeDevices([...this.#made])
  }

  /** Those that were made on the way and are not the one that was attached. */
  async removeSurplus(attached: number): Promise<void> {
    const surplus = [...this.#made].filter((number) => number !== attached)
    if (surplus.length > 0) await this.#removeDevices(surplus)
  }

  async #removeDevices(numbers: readonly number[]): Promise<void> {
    for (const number of numbers) {
      try {
        const control = await openControl(UNDOING)
        try {
          // Whoever looks at every device has it open for a moment.
          await removeDevice(control, number, new Deadline(UNDOING.left))
          noteTaken(number)
        } finally {
          closeSync(control)
        }
      } catch {
        // in use by another, or gone
      }
    }
  }
}
