/** One descriptor of one loop device: its queue, its ownership, its identity, its end. */

import { constants } from 'node:os'
import type { Failure } from '../errors/causes.ts'
import { Warnings } from '../common/warnings.ts'
import { type LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { binding, type Binding } from '../kernel/binding.ts'
import { devicePath, openDevice } from '../kernel/devnode.ts'
import { diskSeqCountsAttachments, hasDiskSeq, numberOfMinor } from '../kernel/features.ts'
import { close, closeSync, O_RDWR } from '../kernel/files.ts'
import { readBackingFileSync } from '../kernel/sysfs.ts'
import {
  decodeInfo,
  decodeU64,
  LOOP_MAJOR,
  type LoopInfo64,
  majorOf,
  minorOf,
  newInfo,
  newU64,
} from '../kernel/uapi.ts'
import { type Backing, describeRef, type LoopRef, nameOf } from './identity.ts'

const { EPERM } = constants.errno

/** What the device answers as long as nobody has touched it since it was last looked at. */
export interface Expected {
  diskSeq: number
  flags: number
}

/** struct loop_info64 as read, to be patched and written back, and decoded. */
export interface Info {
  bytes: Uint8Array
  info: LoopInfo64
}

/** Calls that want a descriptor open for writing, or CAP_SYS_ADMIN. */
type WriterCall = 'loopSetStatus64' | 'loopSetCapacity' | 'loopSetDirectIo' | 'loopSetBlockSize'

/** Held until detach, close, release or exit, as a listening socket is: no device goes by garbage collection. */
const owned = new Set<Handle>()

/** BLKGETDISKSEQ; undefined before kernel 5.15. */
export function readDiskSeq(fd: number): number | undefined {
  if (!hasDiskSeq(fd)) return undefined
  const diskSeq = binding().blkGetDiskSeqSync(fd)
  return diskSeq < 0 ? undefined : diskSeq
}

/** What is left of a handle that nobody has any more. */
interface Remains {
  fd: number
  readonly path: string
}

/** Only opened handles get here: those that own a device are kept. */
const forgotten = new FinalizationRegistry<Remains>((remains) => {
  if (remains.fd < 0) return
  process.emitWarning(`a handle of ${remains.path} was garbage collected without close()`, {
    type: 'LoopctlWarning',
    code: 'LOOPCTL_HANDLE_NOT_CLOSED',
    detail: 'use `await using`, or close it: until then its descriptor keeps the device busy',
  })
  void close(remains.fd)
})
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
  /** It was there before, and is used together with whoever attached it: `overlap: 'reuse'`. */
  isShared = false
  /** What was found odd about the device, from attach on. */
  readonly warnings: Warnings = new Warnings()

  /** Apart, so that the descriptor can be closed when the handle is gone. */
  readonly #remains: Remains
  #diskSeq: number | undefined
  #backing: Backing | undefined
  #flags: number | undefined
  #closed = false
  #closing: Promise<void> | undefined
  #running = false
  #changing = false
  #queue: Promise<unknown> = Promise.resolve()

  constructor(
    number: number,
    fd: number,
    options: {
      owned: boolean
      backing: (Backing & { flags: number }) | undefined
      createNode?: boolean
      /** Where it has been read already. */
      diskSeq?: number | undefined
    },
  ) {
    this.number = number
    this.path = devicePath(number)
    this.#remains = { fd, path: this.path }
    this.owned = options.owned
    this.createNode = options.createNode ?? true
    this.#backing = options.backing
    this.#flags = options.backing?.flags
    this.#diskSeq = options.diskSeq ?? readDiskSeq(fd)
    if (this.owned) owned.add(this)
    else forgotten.register(this, this.#remains, this)
  }

  /** For users; -1 once closed. */
  get fd(): number {
    return this.#closed ? -1 : this.descriptor
  }

  get ref(): LoopRef {
    const diskSeq = this.#diskSeq
    const backing = this.#backing
    return {
      number: this.number,
      ...(diskSeq !== undefined && { diskSeq }),
      ...(backing !== undefined && !diskSeqCountsAttachments() && { backing: nameOf(backing) }),
    }
  }

  /** Undefined where the kernel gives nothing that would tell another attachment. */
  get expected(): Expected | undefined {
    const [diskSeq, flags] = [this.#diskSeq, this.#flags]
    return diskSeq === undefined || flags === undefined || !diskSeqCountsAttachments() ? undefined : { diskSeq, flags }
  }

  /**
   * The loop device that this one is backed by. From its numbers: the path that sysfs shows is that of the reader's root,
   * and the node can be gone.
   */
  get lowerNumber(): number | undefined {
    const rdevice = this.#backing?.rdevice
    if (rdevice === undefined || majorOf(rdevice) !== LOOP_MAJOR) return undefined
    return numberOfMinor(minorOf(rdevice))
  }

  /** @throws `replaced` where the reference names another attachment than this one */
  assertIs({ diskSeq, backing }: LoopRef): void {
    const own = this.#backing && nameOf(this.#backing)
    const same =
      (diskSeq === undefined || this.#diskSeq === undefined || diskSeq === this.#diskSeq) &&
      (backing === undefined || backing === own)
    if (same) return
    throw refusal('replaced', 'open', `${describeRef(this.#diskSeq, own)}, not ${describeRef(diskSeq, backing)}`, {
      path: this.path,
      hint: 'the attachment that the reference names is gone',
    })
  }

  /** For operations: theirs until they end, even where closeSync() came meanwhile. */
  get descriptor(): number {
    return this.#remains.fd
  }

  /** Runs the operation after those before it; rejects with `closed` once close() was called. */
  run<T>(operation: () => Promise<T>): Promise<T> {
    if (this.isClosing) return Promise.reject(this.closedError())
    const result = this.#queue.then(async () => {
      this.assertOpen()
      this.#running = true
      try {
        return await operation()
      } finally {
        this.#running = false
        // closeSync() came meanwhile and left the descriptor to us
        if (this.#closed) await this.#drop()
      }
    })
    this.#queue = result.catch(() => {})
    return result
  }

  /** Whether close() was called: nothing new may begin, though the descriptor may still be in use. */
  get isClosing(): boolean {
    return this.#closing !== undefined
  }

  get isRunning(): boolean {
    return this.#running
  }

  /** @throws `closed` */
  assertOpen(): void {
    if (this.#closed) throw this.closedError()
  }

  closedError(): LoopError {
    return refusal('closed', 'ioctl', 'the handle is closed', { path: this.path })
  }

  /** Lets go of the descriptor after the operations in flight. Idempotent. */
  close(): Promise<void> {
    return (this.#closing ??= this.#queue.then(() => this.closeNow()))
  }

  /** Lets go of the descriptor from within an operation; `vacated`: nothing is left of it that could take long. */
  async closeNow({ vacated = false }: { vacated?: boolean } = {}): Promise<void> {
    this.#closed = true
    this.#closing ??= Promise.resolve()
    if (vacated) closeSync(this.#take())
    else await this.#drop()
  }

  /** Marks it closed at once. An operation in flight keeps the descriptor until it ends: then answers false. */
  closeSync(): boolean {
    this.#closed = true
    this.#closing ??= Promise.resolve()
    if (this.#running) return false
    const fd = this.#take()
    if (fd >= 0) closeSync(fd)
    return true
  }

  async #drop(): Promise<void> {
    const fd = this.#take()
    if (fd >= 0) await close(fd)
  }

  #take(): number {
    const { fd } = this.#remains
    this.#remains.fd = -1
    owned.delete(this)
    forgotten.unregister(this)
    return fd
  }

  /** From now on works on `fd`, which is another descriptor of the same device; the old one is the caller's to close. */
  replaceDescriptor(fd: number): void {
    this.#remains.fd = fd
  }

  /**
   * Runs a call that changes the attachment's identity, answers a negative errno, and is our own: in the meantime the
   * device is still ours, whatever it looks like.
   */
  async changeIdentity(backing: Backing, call: () => Promise<number>): Promise<number> {
    this.#changing = true
    try {
      const answer = await call()
      if (answer >= 0) {
        this.#backing = backing
        this.#diskSeq = readDiskSeq(this.descriptor)
      }
      return answer
    } finally {
      this.#changing = false
    }
  }

  /**
   * To be called after a call that wrote the flags back: where closeSync() came meanwhile, that has cancelled the
   * detach which was asked for.
   *
   * @throws `closed`
   */
  async renewDetach(): Promise<void> {
    if (!this.#closed) return
    await binding().loopClrFd(this.descriptor)
    throw this.closedError()
  }

  /**
   * LOOP_GET_STATUS64, on a pool thread: it asks the backing file's filesystem, which can be on a dead server.
   *
   * @throws `not-attached`, `detaching`, `replaced`
   */
  async readInfo(): Promise<Info> {
    const fd = this.descriptor
    const bytes = newInfo()
    return this.#checkedInfo(fd, bytes, await binding().loopGetStatus64(fd, bytes))
  }

  readInfoSync(): Info {
    const bytes = newInfo()
    return this.#checkedInfo(this.descriptor, bytes, binding().loopGetStatus64Sync(this.descriptor, bytes))
  }

  #checkedInfo(fd: number, bytes: Uint8Array, answer: number): Info {
    if (answer < 0) throw this.explain('LOOP_GET_STATUS64', answer)
    const info = decodeInfo(bytes)
    this.#flags = info.flags
    if (!this.#isOurs(fd, info)) {
      throw refusal('replaced', 'ioctl', `now belongs to another attachment, of ${readBackingFileSync(this.number)}`, {
        path: this.path,
        ioctl: 'LOOP_GET_STATUS64',
        hint: 'the attachment this handle was for is gone; nothing was changed',
      })
    }
    return { bytes, info }
  }

  #isOurs(fd: number, info: LoopInfo64): boolean {
    if (this.#changing) return true
    if (readDiskSeq(fd) !== this.#diskSeq) return false
    if (diskSeqCountsAttachments()) return true
    const backing = this.#backing
    return (
      backing !== undefined &&
      info.device === backing.device &&
      info.inode === backing.inode &&
      info.offset === backing.offset
    )
  }

  /** Issues a call that needs write access or CAP_SYS_ADMIN; opens for writing only where the kernel asks for it. */
  async write<Name extends WriterCall>(
    name: Name,
    ...values: Parameters<Binding[Name]> extends [number, ...infer Rest] ? Rest : never
  ): Promise<number> {
    const call = binding()[name] as (fd: number, ...rest: unknown[]) => Promise<number>
    const answer = await call(this.descriptor, ...values)
    if (answer !== -EPERM) return answer
    const fd = await openDevice(this.number, O_RDWR)
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

/** BLKGETSIZE64. */
export function readSize(handle: Handle): bigint {
  const bytes = newU64()
  const answer = binding().blkGetSize64Sync(handle.descriptor, bytes)
  if (answer < 0) throw handle.explain('BLKGETSIZE64', answer)
  return decodeU64(bytes)
}
