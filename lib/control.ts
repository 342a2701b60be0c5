import { addDevice, getFree, openControl, removeDevice } from './attach/loop-control.ts'
import { checkLoopNumber } from './common/arguments.ts'
import { CHANGING, checkWait, type Deadline, type Wait } from './common/deadline.ts'
import { assertSupported, refusal } from './errors/errors.ts'
import { fromCaller } from './errors/from-caller.ts'
import { explained } from './errors/given-up.ts'
import { CONTROL } from './kernel/devnode.ts'
import { close } from './kernel/files.ts'

export interface RemoveOptions extends Wait {
  /** Milliseconds to wait for programs that have the device open; 0: one try. Default 10 000. */
  timeout?: number | undefined
}

/** /dev/loop-control: makes and removes devices. You do not need it to attach. */
export class LoopControl implements AsyncDisposable {
  #fd: number
  /** Calls under way: the descriptor is closed after them. */
  readonly #running = new Set<Promise<unknown>>()
  #closing: Promise<void> | undefined

  private constructor(fd: number) {
    this.#fd = fd
  }

  /**
   * Opens /dev/loop-control. If the loop driver is a kernel module, this loads it.
   *
   * @throws LoopError `no-loop-driver`, `permission`, `unsupported-platform`
   */
  static async open(options?: Wait): Promise<LoopControl> {
    const deadline = checkWait(options, CHANGING)
    assertSupported()
    deadline.throwIfAborted()
    return new LoopControl(await fromCaller(explained(() => openControl(deadline.bound), CONTROL)))
  }

  /**
   * Makes /dev/loopN; without a number, the next unused one. Resolves to the number. LOOP_CTL_ADD.
   *
   * @throws LoopError `device-exists`, `permission`, `resources`, `closed`
   */
  async add(number?: number, options?: Wait): Promise<number> {
    if (number !== undefined) checkLoopNumber(number)
    const deadline = checkWait(options, CHANGING)
    return await fromCaller(this.#run((fd) => addDevice(fd, number, deadline.bound), deadline))
  }

  /**
   * Removes a device, which takes some 45 ms. Waits for programs that have the device open, but rejects at once if it
   * is attached. Resolves to the number on every kernel. LOOP_CTL_REMOVE.
   *
   * @throws LoopError `in-use`, `no-such-device`, `permission`, `closed`
   */
  async remove(number: number, options?: RemoveOptions): Promise<number> {
    checkLoopNumber(number)
    const deadline = checkWait(options, CHANGING)
    return await fromCaller(this.#run((fd) => removeDevice(fd, number, deadline), deadline))
  }

  /**
   * The number of a free device, which is made if there is none. It is only a hint: another program can take the
   * device. LOOP_CTL_GET_FREE.
   *
   * @throws LoopError `permission`, `resources`, `closed`
   */
  async getFree(options?: Wait): Promise<number> {
    const deadline = checkWait(options, CHANGING)
    return await fromCaller(this.#run((fd) => getFree(fd, deadline.bound), deadline))
  }

  /** Closes the descriptor when the running calls have ended. Idempotent. */
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
