import { addDevice, getFree, openControl, removeDevice } from './attach/loop-control.ts'
import { checkLoopNumber, checkOptions } from './common/arguments.ts'
import { checkDeadline } from './common/deadline.ts'
import { assertSupported, refusal } from './errors/errors.ts'
import { close } from './kernel/files.ts'

export interface RemoveOptions {
  /** Milliseconds to wait for openers to go; 0: one try. Default 5 000. */
  timeout?: number | undefined
  /** Gives up and rejects with the signal's reason. */
  signal?: AbortSignal | undefined
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
  static async open(): Promise<LoopControl> {
    assertSupported()
    return new LoopControl(await openControl())
  }

  /**
   * LOOP_CTL_ADD: makes /dev/loopN, without a number the next unused one. Resolves to the number.
   *
   * @throws LoopError `device-exists`, `permission`, `resources`, `closed`
   */
  async add(number?: number): Promise<number> {
    if (number !== undefined) checkLoopNumber(number)
    return this.#run((fd) => addDevice(fd, number))
  }

  /**
   * LOOP_CTL_REMOVE, some 45 ms: waits for openers to go, but not for a device that is attached. Resolves to the
   * number on every kernel.
   *
   * @throws LoopError `in-use`, `no-such-device`, `permission`, `closed`
   */
  async remove(number: number, options?: RemoveOptions): Promise<number> {
    checkLoopNumber(number)
    const deadline = checkDeadline(checkOptions(options, ['timeout', 'signal']), 5_000)
    return this.#run((fd) => removeDevice(fd, number, deadline))
  }

  /**
   * LOOP_CTL_GET_FREE: the number of a free device, made if there was none. A hint only: nothing is reserved.
   *
   * @throws LoopError `permission`, `resources`, `closed`
   */
  async getFree(): Promise<number> {
    return this.#run((fd) => getFree(fd))
  }

  /** Idempotent; after the calls under way. */
  close(): Promise<void> {
    return (this.#closing ??= this.#close())
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(): Promise<void> {
    await Promise.allSettled(this.#running)
    const fd = this.#fd
    this.#fd = -1
    await close(fd)
  }

  async #run<T>(operation: (fd: number) => Promise<T>): Promise<T> {
    if (this.#closing) throw refusal('closed', 'ioctl', 'the handle is closed', { path: '/dev/loop-control' })
    const running = operation(this.#fd)
    this.#running.add(running)
    try {
      return await running
    } finally {
      this.#running.delete(running)
    }
  }
}
