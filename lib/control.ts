import { addDevice, getFree, openControl, removeDevice } from './attach/loop-control.ts'
import { checkLoopNumber } from './common/arguments.ts'
import { CHANGING, checkWait, type Deadline, type Wait } from './common/deadline.ts'
import { assertSupported, refusal } from './errors/errors.ts'
import { explained } from './errors/given-up.ts'
import { CONTROL } from './kernel/devnode.ts'
import { close } from './kernel/files.ts'

export interface RemoveOptions extends Wait {
  /** Milliseconds to wait for openers to go; 0: one try. Default 10 000. */
  timeout?: number | undefined
}

/** /dev/loop-control: makes and removes devices. Attaching needs none of it. */
export class LoopControl implements AsyncDisposable {
  #fd: number
  /** Calls under way: the descriptor is closed after them. */
  readonly #running = new Set<Promise<unknown>>()
  #closing: Promise<void> | undefined

  private constructor(fd: number) {
    this.#fd = fd
  }

  /**
   * Opens /dev/loop-control, which loads the kernel module where it is one.
   *
   * @throws LoopError `no-loop-driver`, `permission`, `unsupported-platform`
   */
  static async open(options?: Wait): Promise<LoopControl> {
    const deadline = checkWait(options, CHANGING)
    assertSupported()
    deadline.throwIfAborted()
    return new LoopControl(await explained(() => openControl(deadline.bound), CONTROL))
  }

  /**
   * LOOP_CTL_ADD: makes /dev/loopN, without a number the next unused one. Resolves to the number.
   *
   * @throws LoopError `device-exists`, `permission`, `resources`, `closed`
   */
  async add(number?: number, options?: Wait): Promise<number> {
    if (number !== undefined) checkLoopNumber(number)
    const deadline = checkWait(options, CHANGING)
    return this.#run((fd) => addDevice(fd, number, deadline.bound), deadline)
  }

  /**
   * LOOP_CTL_REMOVE, some 45 ms: waits for openers to go, but not for a device that is attached. Resolves to the
   * number on every kernel.
   *
   * @throws LoopError `in-use`, `no-such-device`, `permission`, `closed`
   */
  async remove(number: number, options?: RemoveOptions): Promise<number> {
    checkLoopNumber(number)
    const deadline = checkWait(options, CHANGING)
    return this.#run((fd) => removeDevice(fd, number, deadline), deadline)
  }

  /**
   * LOOP_CTL_GET_FREE: the number of a free device, made if there was none. A hint only: nothing is reserved.
   *
   * @throws LoopError `permission`, `resources`, `closed`
   */
  async getFree(options?: Wait): Promise<number> {
    const deadline = checkWait(options, CHANGING)
    return this.#run((fd) => getFree(fd, deadline.bound), deadline)
  }

  /** Idempotent; after the calls under way. */
  async close(options?: Wait): Promise<void> {
    const deadline = checkWait(options, CHANGING)
    return (this.#closing ??= this.#close(deadline))
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(deadline: Deadline): Promise<void> {
    try {
      await deadline.waitFor(Promise.allSettled(this.#running))
    } catch {
      // A call that has not ended is left to its thread, which closes the descriptor.
    }
    const fd = this.#fd
    this.#fd = -1
    await close(fd)
  }

  async #run<T>(operation: (fd: number) => Promise<T>, deadline: Deadline): Promise<T> {
    if (this.#closing) throw refusal('closed', 'ioctl', 'the handle is closed', { path: '/dev/loop-control' })
    deadline.throwIfAborted()
    const running = explained(() => operation(this.#fd), CONTROL)
    this.#running.add(running)
    try {
      return await running
    } finally {
      this.#running.delete(running)
    }
  }
}
