/** Devices that refused an attach, in ways that another try, perhaps at another device, may not meet. */

import { backoff, type Deadline, tries } from '../common/deadline.ts'
import type { Failure, Role } from '../errors/causes.ts'
import { LoopError, type LoopErrorReason, refusal } from '../errors/errors.ts'
import { diagnose, explain, withStatus } from '../errors/explain.ts'
import { devicePath } from '../kernel/devnode.ts'
import { decide } from '../kernel/trace.ts'

/** One try at one device that failed. */
export interface Refused {
  failure: Failure
  role?: Role
  reason: LoopErrorReason
}

const MAY_PASS = new Set<LoopErrorReason>(['detaching', 'in-use', 'dirty-cache', 'no-such-device', 'node-missing'])

/** How often a device may refuse for the same reason before that is taken for lasting. */
const CHANCES = 3

export class Refusals {
  /** Undefined: any free device will do. */
  readonly #number: number | undefined
  readonly #deadline: Deadline
  readonly #times = new Map<string, number>()
  #last: Refused | undefined
  #attempt = 0

  constructor(number: number | undefined, deadline: Deadline) {
    this.#number = number
    this.#deadline = deadline
  }

  /** Whether the device has refused so often that another one is better tried. */
  isLasting(number: number): boolean {
    return (this.#times.get(`${number} in-use`) ?? 0) >= CHANCES
  }

  /** Whether the device has refused at all. */
  hasRefused(number: number): boolean {
    return this.#times.has(`${number} in-use`)
  }

  /**
   * Whether the node was missing before, or is not going to be waited for. In the kernel's own /dev it is made a moment
   * after the device: only then somebody has removed it.
   */
  hasMissedNode(number: number): boolean {
    return this.#times.has(`${number} node-missing`) || this.#deadline.left === 0
  }

  /**
   * A failure that may pass.
   *
   * @throws one that will stay
   */
  async classify(failure: Failure, role?: Role): Promise<Refused> {
    const known = await withStatus(failure)
    const error = explain(known, role)
    const passes = MAY_PASS.has(error.reason) || (error.reason === 'already-attached' && this.#number === undefined)
    if (!passes) throw error
    // The descriptor will be closed by the time it is told.
    return { failure: { ...known, fd: undefined }, reason: error.reason, ...(role && { role }) }
  }

  /**
   * Waits a moment before the next try.
   *
   * @throws where no time is left, or the same device has refused too often
   */
  async wait(number: number, refused: Refused): Promise<void> {
    const key = `${number} ${refused.reason}`
    const times = (this.#times.get(key) ?? 0) + 1
    this.#times.set(key, times)
    this.#last = refused
    this.#attempt++
    decide(() => `${devicePath(number)} refused, ${refused.reason}: once more, perhaps another device`)
    if (refused.reason === 'node-missing' && times === CHANCES) throw explain(refused.failure, refused.role)
    if (!(await this.#deadline.pause(backoff(this.#attempt)))) throw await this.#giveUp(refused)
  }

  /** To be called at the last moment at which giving up costs nothing. */
  async assertInTime(number: number): Promise<void> {
    this.#deadline.throwIfAborted()
    if (!this.#deadline.isOver) return
    if (this.#last) throw await this.#giveUp(this.#last)
    throw refusal('timeout', 'ioctl', 'the time was up before anything failed', { path: devicePath(number) })
  }

  async #giveUp({ failure, role }: Refused): Promise<LoopError> {
    const error = await diagnose({ ...failure, effort: tries(this.#attempt, this.#deadline) }, role)
    if (this.#number !== undefined || error.reason === 'dirty-cache') return error
    // With a free choice of devices every refusal was another device's: what is left to say is that they all were taken.
    return new LoopError({
      reason: 'contention',
      errno: error.errno,
      syscall: error.syscall,
      ioctl: error.ioctl,
      path: error.path,
      backingFile: error.backingFile,
      detail: `every free device was taken by somebody else first (${this.#attempt} attempts in ${this.#deadline.waited} ms)`,
      cause: error,
    })
  }
}
