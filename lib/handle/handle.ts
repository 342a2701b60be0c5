/** One descriptor of one loop device: its queue, its ownership, its identity, its end. */

import { constants } from 'node:os'
import type { Failure } from '../errors/causes.ts'
import { Deadline } from '../common/deadline.ts'
import { Warnings } from '../common/warnings.ts'
import { explainGivenUp } from '../errors/given-up.ts'
import { forgotten, type Remains } from './forgotten.ts'
import { Queue } from './queue.ts'
import { type LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { binding, type Binding } from '../kernel/binding.ts'
import { type Bound, type Bounded, GivenUp, UNDOING, within } from '../kernel/bounded.ts'
import { callWithinSync, closeWithinSync } from '../kernel/bounded-sync.ts'
import { devicePath, openDevice } from '../kernel/devnode.ts'
import { close, closeSoon, closeSync, O_RDWR } from '../kernel/files.ts'
import { decodeInfo, type LoopInfo64, newInfo, type Struct } from '../kernel/uapi.ts'
import { Attachment, type Expected, readDiskSeq, type Seen } from './attachment.ts'
import type { Backing, LoopRef } from './identity.ts'

const { EPERM, ETIMEDOUT } = constants.errno

/** struct loop_info64 as read, to be patched and written back, and decoded. */
export interface Info {
  bytes: Uint8Array
  info: LoopInfo64
}

/** Calls that want a descriptor open for writing, or CAP_SYS_ADMIN. */
type WriterCall = 'loopSetStatus64' | 'loopSetCapacity' | 'loopSetDirectIo' | 'loopSetBlockSize'

/** Milliseconds that a synchronous method waits for the kernel. */
export const SYNC_MS = 1_000

/** Milliseconds that close() waits for the operations before it. */
const CLOSE_MS = 10_000

/** Held until detach, close, release or exit, as a listening socket is: no device goes by garbage collection. */
const owned = new Set<Handle>()

/**
 * Takes over `fd`, which is open read-only: with a writable one every mount would fail EBUSY where
 * CONFIG_BLK_DEV_WRITE_MOUNTED is off.
 */
export class Handle {
  readonly number: number
  readonly path: string
  /** Attached by this handle, so its to detach when disposed. */
  readonly owned: boolean
  /** Whether nodes of partitions are made where they are missing. */
  readonly createNode: boolean
  /** How many sectors had been written to the device when it was attached, in sysfs; undefined: not known. */
  readonly writesBefore: number | undefined

  /** A detach has succeeded after its caller had given up on it. */
  isDetached = false

  /** It was there before, and is used together with whoever attached it: `overlap: 'reuse'`. */
  isShared = false

  /** What was found odd about the device, from attach on. */
  readonly warnings: Warnings = new Warnings()

  /** Apart, so that the descriptor can be closed when the handle is gone. */
  readonly #remains: Remains
  readonly #attachment: Attachment
  #closed = false
  #closing: Promise<void> | undefined
  readonly #queue = new Queue()
  #calls: Bounded | undefined
  #deadline: Deadline | undefined

  constructor(
    number: number,
    fd: number,
    options: {
      owned: boolean
      backing: Seen | undefined
      /** Where the backing file is not known although there is one. */
      attached?: boolean
      createNode?: boolean
      /** Where it has been read already. */
      diskSeq?: number | undefined
      /** How many sectors had been written to the device when it was attached. */
      writes?: number | undefined
    },
  ) {
    this.number = number
    this.path = devicePath(number)
    this.#remains = { fd, path: this.path }
    this.owned = options.owned
    this.createNode = options.createNode ?? true
    this.writesBefore = options.writes
    const { backing, attached, diskSeq = readDiskSeq(fd) } = options
    this.#attachment = new Attachment(number, { backing, attached, diskSeq })
    if (this.owned) owned.add(this)
    else forgotten.register(this, this.#remains, this)
  }

  /** For users; -1 once closed. */
  get fd(): number {
    return this.#closed ? -1 : this.descriptor
  }

  get ref(): LoopRef {
    return this.#attachment.ref
  }

  /** See {@link Attachment}. */
  get expected(): Expected | undefined {
    return this.#attachment.expected
  }

  get isReadOnly(): boolean {
    return this.#attachment.isReadOnly
  }

  get reference(): string | undefined {
    return this.#attachment.reference
  }

  get lowerNumber(): number | undefined {
    return this.#attachment.lowerNumber
  }

  /** @throws `replaced` where the reference names another attachment than this one */
  assertIs(ref: LoopRef): void {
    this.#attachment.assertIs(ref)
  }

  /** @throws `replaced` where the device was free when this handle was made */
  assertAttachment(): void {
    this.#attachment.assertStill(this.descriptor)
  }

  /** For operations: theirs until they end, even where closeSync() came meanwhile. */
  get descriptor(): number {
    return this.#remains.fd
  }

  /**
   * Runs the operation after those before it, within its time. An operation with a call that was given up on keeps its
   * place until that call has come back.
   *
   * @throws `closed` once close() was called, `timeout`, the signal's reason
   */
  async run<T>(operation: () => Promise<T>, deadline: Deadline): Promise<T> {
    if (this.isClosing) throw this.closedError()
    // Without a hop of the event loop where nobody is before it: a thread is in the kernel when this function returns.
    const turn = this.#queue.enter(deadline, this.path)
    if (turn !== undefined) await turn
    let back: Promise<unknown> | undefined
    try {
      this.assertOpen()
      this.#deadline = deadline
      this.#calls = within(deadline.bound, this.number)
      return await operation()
    } catch (error) {
      if (error instanceof GivenUp) back = error.back
      throw explainGivenUp(error, this.path)
    } finally {
      this.#deadline = undefined
      this.#calls = undefined
      // closeSync() came meanwhile and left the descriptor to us
      if (this.#closed) await this.#drop()
      this.#queue.leave(back)
    }
  }

  /** Takes an operation back, in a second of its own: the operation's time may be up, or its signal aborted. */
  async takingBack<T>(work: () => Promise<T>): Promise<T> {
    const [deadline, calls] = [this.#deadline, this.#calls]
    this.#deadline = new Deadline(UNDOING.left)
    this.#calls = within(this.#deadline.bound, this.number)
    try {
      return await work()
    } finally {
      this.#deadline = deadline
      this.#calls = calls
    }
  }

  /** The calls of the addon, with the end that the operation under way has. */
  get calls(): Bounded {
    return this.#calls ?? binding()
  }

  /** The end that the operation under way has. */
  get deadline(): Deadline {
    if (this.#deadline === undefined) throw new TypeError('no operation is under way')
    return this.#deadline
  }

  /** The same, for sequences of calls and for files. */
  get bound(): Bound | undefined {
    return this.#deadline?.bound
  }

  /** Whether close() was called: nothing new may begin, though the descriptor may still be in use. */
  get isClosing(): boolean {
    return this.#closing !== undefined
  }

  get isRunning(): boolean {
    return this.#queue.isRunning
  }

  /** Whether the next operation waits for a call that was given up on. */
  get isStuck(): boolean {
    return this.#queue.isStuck
  }

  /** @throws `closed` */
  assertOpen(): void {
    if (this.#closed) throw this.closedError()
  }

  closedError(): LoopError {
    return refusal('closed', 'ioctl', 'the handle is closed', { path: this.path })
  }

  /**
   * Lets go of the descriptor after the operations in flight. Idempotent. Where they do not end in time, the handle is
   * closed all the same, and the thread that is in a call closes the descriptor.
   */
  close(deadline: Deadline = new Deadline(CLOSE_MS)): Promise<void> {
    return (this.#closing ??= this.#close(deadline))
  }

  async #close(deadline: Deadline): Promise<void> {
    let hasTurn = true
    try {
      await this.#queue.enter(deadline, this.path)
    } catch {
      hasTurn = false
    }
    this.#closed = true
    // The operation under way closes it when it ends.
    if (hasTurn || !this.isRunning) await this.#drop()
    if (hasTurn) this.#queue.leave()
  }

  /** Lets go of the descriptor from within an operation. */
  async closeNow(): Promise<void> {
    this.#closed = true
    this.#closing ??= Promise.resolve()
    await this.#drop()
  }

  /** The same of a descriptor that stands for nothing any more, so that closing it cannot take long. */
  closeVacated(): void {
    this.#closed = true
    this.#closing ??= Promise.resolve()
    closeSync(this.#take())
  }

  /** Marks it closed at once. An operation in flight keeps the descriptor until it ends: then answers false. */
  closeSync(ms: number = SYNC_MS): boolean {
    this.#closed = true
    this.#closing ??= Promise.resolve()
    if (this.isRunning) return false
    const fd = this.#take()
    if (fd >= 0) closeWithinSync(fd, ms)
    return true
  }

  async #drop(): Promise<void> {
    await closeSoon(this.#take())
  }

  #take(): number {
    const { fd } = this.#remains
    this.#remains.fd = -1
    owned.delete(this)
    if (!this.owned) forgotten.unregister(this)
    return fd
  }

  /** Runs a call that changes the attachment's identity, answers a negative errno, and is our own. */
  changeIdentity(backing: Backing & { fileName?: string }, call: () => Promise<number>): Promise<number> {
    return this.#attachment.change(backing, () => this.descriptor, call)
  }

  /**
   * To be called after a call that wrote the flags back: where closeSync() came meanwhile, that has cancelled the
   * detach which was asked for.
   *
   * @throws `closed`
   */
  async renewDetach(): Promise<void> {
    if (!this.#closed) return
    await this.calls.loopClrFd(this.descriptor)
    throw this.closedError()
  }

  /**
   * LOOP_GET_STATUS64, on a thread: it asks the backing file's filesystem, which can be on a dead server.
   *
   * @throws `not-attached`, `detaching`, `replaced`
   */
  async readInfo(): Promise<Info> {
    const bytes = newInfo()
    const answer = await this.calls.loopGetStatus64(this.descriptor, bytes)
    return { bytes, info: this.takeOver(bytes, answer) }
  }

  readInfoSync(): Info {
    const bytes = newInfo()
    const answer = callWithinSync(SYNC_MS, this.number, 'loopGetStatus64', this.descriptor, bytes)
    return { bytes, info: this.takeOver(bytes, answer ?? -ETIMEDOUT) }
  }

  /**
   * Takes over what LOOP_GET_STATUS64 has answered, and the disk sequence number where that has been read with it.
   *
   * @throws `not-attached`, `detaching`, `replaced`
   */
  takeOver(struct: Struct, answer: number, diskSeq?: number): LoopInfo64 {
    if (answer < 0) throw this.explain('LOOP_GET_STATUS64', answer)
    const info = decodeInfo(struct)
    this.#attachment.takeOver(info, this.descriptor, diskSeq)
    return info
  }

  /** Issues a call that needs write access or CAP_SYS_ADMIN; opens for writing only where the kernel asks for it. */
  async write<Name extends WriterCall>(
    name: Name,
    ...values: Parameters<Binding[Name]> extends [number, ...infer Rest] ? Rest : never
  ): Promise<number> {
    const call = this.calls[name] as (fd: number, ...rest: unknown[]) => Promise<number>
    const answer = await call(this.descriptor, ...values)
    if (answer !== -EPERM) return answer
    const fd = await openDevice(this.number, O_RDWR, this.bound)
    if (fd < 0) return answer
    try {
      return await call(fd, ...values)
    } finally {
      await close(fd)
    }
  }

  failure(call: string, errno: number, more: Partial<Failure> = {}): Failure {
    const fd = this.descriptor < 0 ? undefined : this.descriptor
    return { call, errno, path: this.path, number: this.number, fd, ...more }
  }

  explain(call: string, errno: number, more: Partial<Failure> = {}): LoopError {
    return explain(this.failure(call, errno, more), call === 'open' ? 'open device' : undefined)
  }
}
