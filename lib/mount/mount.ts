/** From an attached device to its files: the kernel's mount API, and the mount that comes of it. */

import { constants } from 'node:os'
import { checkBoolean, checkOptions } from '../common/arguments.ts'
import { CHANGING, checkDeadline, type Deadline, type Wait } from '../common/deadline.ts'
import type { Warning } from '../common/warnings.ts'
import { detach } from '../detach/detach.ts'
import { detachSync } from '../detach/sync.ts'
import { disposeSync } from '../detach/dispose.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { fromCaller } from '../errors/from-caller.ts'
import { explained } from '../errors/given-up.ts'
import type { Handle } from '../handle/handle.ts'
import { Queue } from '../handle/queue.ts'
import { GivenUp } from '../kernel/bounded.ts'
import * as files from '../kernel/files.ts'
import { close } from './target.ts'
import { busy, findMounted, type Mounted, unmount, type UnmountResult, unmountSync } from './unmount.ts'
import { findUsersInFamily } from './users.ts'

const { EBUSY } = constants.errno
/** Opening the device so is refused while the filesystem, or somebody else, still holds it. */
const PROBE = files.O_RDONLY | files.O_EXCL

export interface UnmountOptions extends Wait {
  /**
   * If files of the mount are open, removes the mount from the directory tree; the kernel unmounts when they are
   * closed. Default false: rejects with `in-use`.
   */
  lazy?: boolean | undefined
}

/** A mount as it was made. */
export interface MadeMount {
  source: string
  fsType: string
  /** Null: it is private. */
  target: string | null
  /** Of a private mount; -1 for one in the tree, which a descriptor would keep busy. */
  fd: number
  /** The number that mountinfo shows. */
  id: bigint
  /** A number that no other mount ever gets, kernel 6.8; before that the same. */
  unique: bigint | undefined
}

/** The mounts that were made through a handle, and are not unmounted. */
const made = new WeakMap<Handle, Set<Mount>>()

/** The mounts of the handle, the last one first. */
export function mountsOf(handle: Handle): Mount[] {
  const mounts = made.get(handle)
  return mounts === undefined ? [] : [...mounts].toReversed()
}

/**
 * A mounted filesystem, made by `device.mount()` or by `mountImage()`. If `mountImage()` made it, unmounting it also
 * detaches the device. `await using` unmounts it, lazily if its files are open.
 */
export class Mount implements AsyncDisposable, Disposable {
  /** The folder with its files: the target, or `/proc/PID/fd/N` for a private mount. */
  readonly path: string
  /** The folder that it is mounted on, as the kernel shows it; null for a private mount. */
  readonly target: string | null
  /** The node of the device or the partition. */
  readonly source: string
  /** The kernel's name of the filesystem. */
  readonly fsType: string
  readonly #handle: Handle
  readonly #made: MadeMount
  /** Of a private mount, which lives as long as its descriptor. */
  #fd: number
  #isMounted = true
  /** An unmount was given up on, and may have happened after that. */
  #isUnmounting = false
  #takesDevice = false
  readonly #queue = new Queue()

  /** @hidden */
  constructor(handle: Handle, mount: MadeMount) {
    this.#handle = handle
    this.#made = mount
    this.#fd = mount.fd
    this.target = mount.target
    this.path = mount.target ?? `/proc/${process.pid}/fd/${mount.fd}`
    this.source = mount.source
    this.fsType = mount.fsType
    const others = made.get(handle) ?? new Set<Mount>()
    made.set(handle, others.add(this))
  }

  /** What is allowed but odd about the device or its image. */
  get warnings(): readonly Warning[] {
    return this.#handle.warnings.list
  }

  /**
   * Whether it is the mount of that number, as mountinfo shows it.
   *
   * @internal
   */
  has(id: number, target: string): boolean {
    return this.#isMounted && this.target === target && this.#made.id === BigInt(id)
  }

  /**
   * From now on the device goes with the mount.
   *
   * @internal
   */
  takeDevice(): this {
    this.#takesDevice = true
    return this
  }

  /**
   * Unmounts the filesystem. If `mountImage()` made the mount, also detaches the device. If files of the mount are
   * open, rejects with `in-use` and the holders; with `lazy: true` the kernel unmounts when they are closed, and the
   * call resolves to `'deferred'`. For a private mount, only this process and the processes that it started are
   * checked; if other processes use its files, the call resolves to `'deferred'` too.
   *
   * Calls umount2(2), or close(2) for a private mount. `timeout` is 10 000 ms by default.
   *
   * @throws LoopError `in-use`, `not-mounted`, `permission`, `timeout`
   */
  async unmount(options?: UnmountOptions): Promise<UnmountResult> {
    const given = checkOptions(options, ['lazy', 'signal', 'timeout'])
    const lazy = given.lazy === undefined ? false : checkBoolean('lazy', given.lazy)
    const deadline = checkDeadline(given, CHANGING)
    return await fromCaller(explained(() => this.unmountWithin(lazy, deadline), this.path))
  }

  /**
   * {@link unmount} as a part of other work, which has to know of a call that is given up on.
   *
   * @internal
   */
  async unmountWithin(lazy: boolean, deadline: Deadline): Promise<UnmountResult> {
    await this.#queue.enter(deadline, this.path)
    let back: Promise<unknown> | undefined
    try {
      return await this.#unmount(lazy, deadline)
    } catch (error) {
      if (error instanceof GivenUp) back = error.back
      throw error
    } finally {
      this.#queue.leave(back)
    }
  }

  /**
   * {@link unmount} for process exit handlers: synchronous, without waiting.
   *
   * @throws LoopError `in-use`, `not-mounted`, `permission`
   */
  unmountSync(options?: { lazy?: boolean | undefined }): UnmountResult {
    const given = checkOptions(options, ['lazy'])
    const lazy = given.lazy === undefined ? false : checkBoolean('lazy', given.lazy)
    if (this.#isOver) throw this.#notMounted()
    let result: UnmountResult = 'unmounted'
    if (this.#isMounted) {
      if (this.target === null) close(this.#take())
      else result = unmountSync(this.#mountedAt(this.target), lazy)
      this.#forget()
      if (this.target === null && this.#isHeld(files.openSync(this.source, PROBE))) result = 'deferred'
    }
    if (!this.#takesDevice) return result
    this.#takesDevice = false
    if (this.#handle.owned) return detachSync(this.#handle) === 'detached' ? result : 'deferred'
    this.#handle.closeSync()
    return result
  }

  /** Unmounts without waiting, lazily if files are open. If `mountImage()` made the mount, also detaches the device. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#isOver) return
    try {
      await this.unmount({ lazy: true })
    } catch (error) {
      if (!isNothingLeft(error)) throw error
    }
  }

  /** Does the same as `Symbol.asyncDispose`, synchronously. */
  [Symbol.dispose](): void {
    if (this.#isOver) return
    try {
      this.unmountSync({ lazy: true })
    } catch (error) {
      if (!isNothingLeft(error)) throw error
    } finally {
      if (this.#takesDevice) disposeSync(this.#handle)
    }
  }

  get #isOver(): boolean {
    return !this.#isMounted && !this.#takesDevice
  }

  async #unmount(lazy: boolean, deadline: Deadline): Promise<UnmountResult> {
    if (this.#isOver) throw this.#notMounted()
    let result: UnmountResult = 'unmounted'
    let lost: LoopError | undefined
    if (this.#isMounted) {
      try {
        result = await this.#unmountOnly(lazy, deadline)
      } catch (error) {
        // Moved, it is still to be unmounted.
        if (!LoopError.is(error, 'not-mounted') || findMounted(this.#made) !== undefined) throw error
        if (!this.#isUnmounting) lost = error
        this.#forget()
      }
    }
    if (this.#takesDevice) {
      const isLazy = lazy || result === 'deferred'
      // One that was there before, and is shared, stays.
      if (!this.#handle.owned) await this.#handle.close()
      else if ((await detach(this.#handle, { lazy: isLazy, ...deadline.rest })) === 'deferred') result = 'deferred'
      this.#takesDevice = false
    }
    if (lost !== undefined) throw lost
    return result
  }

  async #unmountOnly(lazy: boolean, deadline: Deadline): Promise<UnmountResult> {
    if (this.target === null) return this.#letGo(lazy, deadline)
    try {
      const result = await unmount(this.#mountedAt(this.target), lazy, deadline)
      this.#forget()
      return result
    } catch (error) {
      if (error instanceof GivenUp && error.hasBegun) this.#isUnmounting = true
      throw error
    }
  }

  /** Of a private mount. It is in no tree, so that nothing but its files can keep it. */
  async #letGo(lazy: boolean, deadline: Deadline): Promise<UnmountResult> {
    deadline.throwIfAborted()
    if (!lazy) {
      const users = await findUsersInFamily(this.#made, [this.#fd])
      if (users.length > 0) throw busy({ target: this.path }, users, undefined)
    }
    const fd = this.#take()
    this.#forget()
    await files.close(fd, deadline.bound)
    return this.#isHeld(await files.open(this.source, PROBE, 0, deadline.bound)) ? 'deferred' : 'unmounted'
  }

  #isHeld(probe: number): boolean {
    close(probe)
    return probe === -EBUSY
  }

  #mountedAt(target: string): Mounted {
    return { ...this.#made, target }
  }

  #take(): number {
    const fd = this.#fd
    this.#fd = -1
    return fd
  }

  #forget(): void {
    this.#isMounted = false
    made.get(this.#handle)?.delete(this)
  }

  #notMounted(): LoopError {
    return refusal('not-mounted', 'umount2', 'it was unmounted already', { path: this.path })
  }
}

/** Unmounted by somebody else, or detached already. */
function isNothingLeft(error: unknown): boolean {
  return (
    LoopError.is(error) && ['not-mounted', 'closed', 'not-attached', 'detaching', 'replaced'].includes(error.reason)
  )
}
