/**
 * What happens to loop devices, as it happens. Uevents only say where to look: several kinds of change share one, some
 * changes send none, some kernels none for an attach. What is told comes from comparing what sysfs shows with what it
 * showed before; now and then every device is looked at without a uevent.
 */

import { constants } from 'node:os'
import { checkOptions, checkSignal } from '../common/arguments.ts'
import { assertSupported } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { fromCaller } from '../errors/from-caller.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { type DeviceFiles, readDevicesSync } from '../kernel/sysfs-batch.ts'
import { areUeventsSentHere, subscribe, type Uevent } from '../kernel/uevent.ts'
import { compare, type Hint, know, type Known, type LoopEvent, NO_HINT } from './events.ts'
import { list, readInfo, toInfo } from './list.ts'

export interface WatchOptions {
  /** When it is aborted, the watch ends, and `next()` rejects with the signal's reason. */
  signal?: AbortSignal | undefined
}

/** Events that wait for the reader; beyond that it is told to look again. */
const QUEUE_SIZE = 1024

/**
 * Milliseconds between looks at every device: for what sends no uevent (direct I/O, block size, read-only, flags; an
 * attach on 5.18 to 6.14) a person waits that long, and with some devices a look takes a few milliseconds. With many it
 * takes longer: they take one part in REST of the time at most.
 */
const PERIOD = 1_000
const REST = 20

/**
 * Reports what happens to the loop devices of this machine from this call on; see {@link LoopEvent}. What happens to a
 * device in quick succession can be told as one: an attach with the size that it has been given since. The watch has a
 * socket and a thread until it ends: when you leave the loop, call `return()`, or abort the signal.
 *
 * @example
 * ```ts
 * const events = watch()
 * await using device = await attach('disk.img')
 * for await (const event of events) {
 *   console.log(event.type) // attach
 *   break
 * }
 * ```
 */
export function watch(options?: WatchOptions): AsyncIterableIterator<LoopEvent> {
  const { signal } = checkOptions(options, ['signal'])
  if (signal !== undefined) checkSignal(signal)
  assertSupported()
  return new Watcher(signal)
}

interface Waiting {
  resolve: (result: IteratorResult<LoopEvent>) => void
  reject: (error: unknown) => void
}

const DONE = { done: true, value: undefined } as const

class Watcher implements AsyncIterableIterator<LoopEvent, undefined> {
  readonly #known = new Map<number, Known>()
  /** Devices to be looked at. */
  readonly #hints = new Map<number, Hint>()
  #everyDevice = false
  /** What happened meanwhile is not told one by one. */
  #lost: 'overrun' | 'no-netlink' | undefined
  #looking = false
  #queue: LoopEvent[] = []
  /** The queue was full: nothing is looked at until somebody asks. */
  #paused = false
  readonly #waiting: Waiting[] = []
  #timer: NodeJS.Timeout | undefined
  #unsubscribe: (() => void) | undefined
  #closed = false
  /** What the next next() rejects with. */
  #failure: { error: unknown } | undefined
  readonly #signal: AbortSignal | undefined
  readonly #onAbort = (): void => this.#fail(this.#signal?.reason)

  constructor(signal: AbortSignal | undefined) {
    this.#signal = signal
    if (signal?.aborted) {
      this.#fail(signal.reason)
      return
    }
    // First: what happens between this and the look is seen, or told by a uevent.
    const subscription = subscribe((message) => this.#onMessage(message))
    if (typeof subscription !== 'number') this.#unsubscribe = subscription
    try {
      // Without waiting: what the caller does next has to be an event.
      const files = readEveryDevice()
      signal?.addEventListener('abort', this.#onAbort, { once: true })
      void this.#begin(files, typeof subscription !== 'number')
    } catch (error) {
      this.#close()
      throw error
    }
  }

  [Symbol.asyncIterator](): this {
    return this
  }

  next(): Promise<IteratorResult<LoopEvent, undefined>> {
    return fromCaller(this.#next())
  }

  #next(): Promise<IteratorResult<LoopEvent, undefined>> {
    const failure = this.#failure
    this.#failure = undefined
    // oxlint-disable-next-line typescript/prefer-promise-reject-errors -- the signal's reason, whatever it is
    if (failure) return Promise.reject(failure.error)
    const event = this.#queue.shift()
    if (event) return Promise.resolve({ done: false, value: event })
    if (this.#closed) return Promise.resolve(DONE)
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject })
      this.#timer?.ref()
      this.#paused = false
      void this.#look()
    })
  }

  return(): Promise<IteratorResult<LoopEvent, undefined>> {
    this.#failure = undefined
    this.#close()
    return Promise.resolve(DONE)
  }

  /** What the caller does next is looked at as soon as the kernel tells of it: nothing that takes time comes before. */
  async #begin(files: Map<number, DeviceFiles>, subscribed: boolean): Promise<void> {
    this.#looking = true
    try {
      const known = [...files].map(async ([number, each]) => {
        this.#known.set(number, { info: await toInfo(number, each), going: false, hasBlockSize: false })
      })
      await Promise.all(known)
    } catch (error) {
      this.#fail(error)
    } finally {
      this.#looking = false
    }
    if (!subscribed) this.#lost = 'no-netlink'
    this.#setTimer(PERIOD)
    await Promise.all([this.#look(), this.#learnMore(subscribed)])
  }

  /** What must not be waited for at the start: whether uevents come here, and the block sizes, which can block. */
  async #learnMore(subscribed: boolean): Promise<void> {
    try {
      if (subscribed && !(await areUeventsSentHere())) {
        this.#lost = 'no-netlink'
        void this.#look()
      }
      for (const { number, diskSeq, blockSize } of await list({ all: true })) {
        const known = this.#known.get(number)
        if (known === undefined || known.hasBlockSize || known.info.diskSeq !== diskSeq) continue
        known.info.blockSize = blockSize
        known.hasBlockSize = true
      }
    } catch (error) {
      this.#fail(error)
    }
  }

  #onMessage(message: Uevent | number): void {
    if (this.#closed) return
    if (typeof message === 'number') {
      if (message !== -constants.errno.ENOBUFS) this.#unsubscribe?.()
      this.#lost = message === -constants.errno.ENOBUFS ? 'overrun' : 'no-netlink'
    } else {
      const { number, action, mediaChange, diskSeq } = message
      const { removed, detached } = this.#hints.get(number) ?? NO_HINT
      const seq = diskSeq === undefined ? [] : [diskSeq]
      this.#hints.set(number, {
        removed: action === 'remove' ? [...removed, ...seq] : removed,
        detached: mediaChange ? [...detached, ...seq] : detached,
      })
    }
    void this.#look()
  }

  /** Looks at what there is to be looked at; once at a time. */
  async #look(): Promise<void> {
    if (this.#looking) return
    this.#looking = true
    try {
      while (!this.#closed && !this.#paused) {
        const [number] = this.#hints.keys()
        if (this.#lost !== undefined) await this.#resync(this.#lost)
        else if (this.#everyDevice) await this.#lookAtAll()
        else if (number !== undefined) this.#tell(await this.#lookAt(number))
        else break
      }
    } catch (error) {
      this.#fail(error)
    } finally {
      this.#looking = false
    }
  }

  async #resync(cause: 'overrun' | 'no-netlink'): Promise<void> {
    this.#lost = undefined
    for (const number of await this.#allNumbers()) await this.#lookAt(number)
    const devices = [...this.#known.values()].map(({ info }) => info).toSorted((a, b) => a.number - b.number)
    this.#tell([{ type: 'resync', cause, devices }])
  }

  async #lookAtAll(): Promise<void> {
    this.#everyDevice = false
    const start = performance.now()
    for (const number of await this.#allNumbers()) {
      // What the kernel tells of meanwhile does not wait until all the others have been looked at.
      for (const [hinted] of this.#hints) this.#tell(await this.#lookAt(hinted))
      this.#tell(await this.#lookAt(number))
    }
    this.#setTimer(Math.max(PERIOD, REST * (performance.now() - start)))
  }

  /** Of the devices that there are or were. */
  async #allNumbers(): Promise<number[]> {
    const numbers = await sysfs.readNumbers()
    if (typeof numbers === 'number') throw noSysfs(numbers)
    return [...new Set([...numbers, ...this.#known.keys()])].toSorted((a, b) => a - b)
  }

  async #lookAt(number: number): Promise<LoopEvent[]> {
    const said = this.#hints.get(number) ?? NO_HINT
    // Before the look: what is said from now on may be of a later state.
    this.#hints.delete(number)
    const now = await readInfo(number)
    // Or of this one: of a detach and an attach the look can see the outcome before we are told of the detach.
    const meanwhile = this.#hints.get(number) ?? NO_HINT
    const hint = {
      removed: [...said.removed, ...meanwhile.removed],
      detached: [...said.detached, ...meanwhile.detached],
    }
    const before = this.#known.get(number)
    if (before && now && !before.hasBlockSize) before.info.blockSize = now.blockSize
    if (now) this.#known.set(number, know(before, now))
    else this.#known.delete(number)
    return compare(number, before, now, hint)
  }

  #tell(events: LoopEvent[]): void {
    if (this.#closed || this.#paused) return
    for (const event of events) {
      // After a gap nothing comes before the word of it.
      if (this.#lost !== undefined && event.type !== 'resync') continue
      const first = this.#waiting.shift()
      if (first) first.resolve({ done: false, value: event })
      else this.#queue.push(event)
    }
    if (this.#waiting.length === 0) this.#timer?.unref()
    if (this.#queue.length <= QUEUE_SIZE) return
    this.#queue = []
    this.#lost = 'overrun'
    this.#paused = true
  }

  #setTimer(ms: number): void {
    if (this.#closed) return
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => {
      this.#everyDevice = true
      void this.#look()
    }, ms)
    // A process lives for as long as somebody waits, not for the sake of a look.
    if (this.#waiting.length === 0) this.#timer.unref()
  }

  #fail(error: unknown): void {
    if (this.#closed) return
    const first = this.#waiting.shift()
    if (first) first.reject(error)
    else this.#failure = { error }
    this.#close()
  }

  #close(): void {
    this.#closed = true
    this.#queue = []
    this.#unsubscribe?.()
    clearTimeout(this.#timer)
    this.#signal?.removeEventListener('abort', this.#onAbort)
    for (const { resolve } of this.#waiting.splice(0)) resolve(DONE)
  }
}

function readEveryDevice(): Map<number, DeviceFiles> {
  const numbers = sysfs.readNumbersSync()
  if (typeof numbers === 'number') throw noSysfs(numbers)
  const found = readDevicesSync(numbers)
  if (typeof found === 'number') throw noSysfs(found)
  return new Map(
    numbers.flatMap((number, i) => {
      const files = found[i]
      return files ? [[number, files]] : []
    }),
  )
}

function noSysfs(errno: number): Error {
  return explain({ call: 'scandir', errno, path: '/sys/block' }, 'read /sys')
}
