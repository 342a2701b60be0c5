/** The real driver, as the three actors use it: two processes with the library, and raw ioctls in this one. */

import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import {
  closeSync,
  constants,
  existsSync,
  fsyncSync,
  openSync,
  readFileSync,
  readSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { setTimeout } from 'node:timers/promises'
import { find, list, LoopControl, type LoopInfo, type LoopStatus } from '../../lib/index.ts'
import * as ioctl from '../../lib/ioctl.ts'
import { sysfs } from '../kernel/support.ts'
import { limit } from '../scale.ts'
import {
  type Action,
  type Answer,
  type Attachment,
  type Change,
  FILE_SIZES,
  type Handle,
  type Model,
  type User,
} from './model.ts'

const WORKER = fileURLToPath(new URL('fixtures/actor.mjs', import.meta.url))

/** A process that uses the library. */
class Worker {
  readonly #child: ChildProcess
  readonly #ended: Promise<unknown>
  readonly #ready: Promise<unknown>

  constructor() {
    this.#child = fork(WORKER, { stdio: ['ignore', 'ignore', 'inherit', 'ipc'], execArgv: [] })
    this.#ended = once(this.#child, 'exit')
    this.#ready = this.#answer()
  }

  /** The next message; an error where the process ends instead. */
  async #answer(): Promise<unknown> {
    const message = once(this.#child, 'message').then(([answer]: unknown[]) => answer)
    const answer = await Promise.race([message, this.#ended.then(() => undefined)])
    if (answer === undefined) throw new Error('a process of the model test has ended')
    return answer
  }

  async ask(message: object): Promise<Answer> {
    await this.#ready
    const answer = this.#answer()
    this.#child.send(message)
    return (await answer) as Answer
  }

  /** Begins, and is killed so many milliseconds later, whatever it has got to. */
  async killIn(message: object, milliseconds: number): Promise<void> {
    await this.#ready
    this.#child.send(message)
    await setTimeout(milliseconds)
    await this.kill()
  }

  async kill(): Promise<void> {
    await this.#ready.catch(() => {})
    this.#child.kill('SIGKILL')
    await this.#ended
  }
}

/** What a process says of one of its handles. */
interface Look {
  id: number
  owned: boolean
  fd: number
  status?: LoopStatus
  reason?: string
}

/** What is compared with the model. */
type Shown = Pick<LoopInfo, 'number' | 'backingFile' | 'offset' | 'sizeLimit' | 'size' | 'readOnly' | 'autoclear'>

function shown({ number, backingFile, offset, sizeLimit, size, readOnly, autoclear }: Shown): Shown {
  return { number, backingFile, offset, sizeLimit, size, readOnly, autoclear }
}

export class Machine {
  readonly files: string[]
  readonly #numbers: readonly number[]
  readonly #folder: string
  readonly #workers: Record<User, Worker>
  /** Started ahead: a process takes a while. */
  #spare: Worker
  #rude = new Map<number, number>()
  /** The disk sequence number of each identity that the model gives. */
  #diskSeqs = new Map<number, number>()
  #steps = 0

  constructor(folder: string, numbers: readonly number[]) {
    this.#folder = folder
    this.#numbers = numbers
    this.files = FILE_SIZES.map((_, i) => join(folder, `disk${i}`))
    this.#workers = { first: new Worker(), second: new Worker() }
    this.#spare = new Worker()
  }

  /** Those that no other program has taken: any free device is anybody's. */
  get numbers(): number[] {
    return this.#numbers.filter((number) => !this.#isStrangers(number))
  }

  #isStrangers(number: number): boolean {
    const file = sysfs(number, 'loop/backing_file')
    return file !== undefined && !file.startsWith(`${this.#folder}/`)
  }

  /** Whether another program has taken or removed a device that the model has as free: what follows proves nothing. */
  isDisturbed(model: Model): boolean {
    const numbers = [...this.#numbers, ...model.handles.map(({ number }) => number)]
    return numbers
      .filter((number) => !model.attachments.has(number))
      .some((number) => this.#isStrangers(number) || (model.devices.has(number) && !exists(number)))
  }

  get steps(): number {
    return this.#steps
  }

  /** As at the beginning: nothing attached, no device of our numbers, the files empty. */
  async reset(): Promise<void> {
    await Promise.all(Object.values(this.#workers).map((worker) => worker.ask({ name: 'reset' })))
    for (const fd of this.#rude.values()) closeSync(fd)
    this.#rude.clear()
    this.#diskSeqs.clear()
    for (const { number, backingFile } of await this.#attached()) {
      const fd = openSync(`/dev/loop${number}`, 'r')
      if (sysfs(number, 'loop/backing_file') === backingFile) ioctl.loopClrFdSync(fd)
      closeSync(fd)
    }
    await this.#until(async () => ((await this.#attached()).length > 0 ? 'a device stays attached' : undefined))
    await using control = await LoopControl.open()
    await Promise.allSettled(this.numbers.filter(exists).map((number) => control.remove(number)))
    for (const [i, path] of this.files.entries()) writeFileSync(path, Buffer.alloc(FILE_SIZES[i] ?? 0))
  }

  /** Ends the processes, after {@link reset}. */
  async end(): Promise<void> {
    await this.reset()
    await Promise.all([...Object.values(this.#workers), this.#spare].map((worker) => worker.kill()))
  }

  /** Whatever is attached to a file of ours. */
  async #attached(): Promise<LoopInfo[]> {
    return (await list()).filter(({ backingFile }) => backingFile?.startsWith(`${this.#folder}/`))
  }

  async do(action: Action, waits: boolean): Promise<Answer> {
    try {
      if (action.actor === 'rude') return { value: await this.#doRudely(action) }
      return await this.#workers[action.actor].ask(this.#message(action, waits))
    } catch (error) {
      const { reason, message } = error as { reason?: string; message: string }
      return { reason: reason ?? 'unknown', message }
    }
  }

  /** Kills the process, in the middle of a step where one is given. */
  async kill(user: User, action?: Action, milliseconds = 0): Promise<void> {
    const worker = this.#workers[user]
    this.#workers[user] = this.#spare
    await (action === undefined ? worker.kill() : worker.killIn(this.#message(action, false), milliseconds))
    this.#spare = new Worker()
  }

  /** Takes over whether the device is there: a process that was killed may have made it. */
  noteDevice(model: Model, number: number): void {
    if (exists(number)) model.devices.add(number)
  }

  /** `waits`: there is nothing that has to be waited for, but for what passes, such as others that look at the device. */
  #message(action: Action, waits: boolean): object {
    const timeout = waits ? limit(5_000) : 0
    switch (action.name) {
      case 'attach': {
        const { id, name, file, actor: _, ...options } = action
        return { id, name, path: this.files[file], options: { ...options, timeout } }
      }
      case 'open': {
        const { id, name, number, identity } = action
        const diskSeq = identity === undefined ? undefined : this.#diskSeqs.get(identity)
        return { id, name, ref: diskSeq === undefined ? number : { number, diskSeq } }
      }
      case 'change':
        return { ...action, path: this.files[action.file] }
      case 'detach':
        return { ...action, timeout }
      default:
        return action
    }
  }

  async #doRudely(action: Extract<Action, { actor: 'rude' }>): Promise<unknown> {
    switch (action.name) {
      case 'rudeAttach':
        return this.#attachRudely(action)
      case 'rudeOpen': {
        const { id, number, exclusive } = action
        const fd = openSync(`/dev/loop${number}`, constants.O_RDONLY | (exclusive ? constants.O_EXCL : 0))
        this.#rude.set(id, fd)
        return { number, owned: false }
      }
      case 'rudeClose':
        return this.#closeRudely(action.handle)
      case 'rudeClear':
        await ioctl.loopClrFd(this.#descriptor(action.handle))
        return this.#closeRudely(action.handle)
      case 'rudeSet':
        return this.#setRudely(this.#descriptor(action.handle), action.change)
      case 'rudeChange': {
        const file = openSync(this.files[action.file] ?? '', 'r')
        try {
          await ioctl.loopChangeFd(this.#descriptor(action.handle), file)
        } finally {
          closeSync(file)
        }
        return null
      }
      default:
        throw new TypeError('no such step')
    }
  }

  async #attachRudely(action: Extract<Action, { name: 'rudeAttach' }>): Promise<unknown> {
    const { id, number, readOnly, autoclear } = action
    if (!exists(number)) {
      const control = openSync('/dev/loop-control', 'r+')
      await ioctl.loopCtlAdd(control, number)
      closeSync(control)
    }
    const access = readOnly ? 'r' : 'r+'
    const device = openSync(`/dev/loop${number}`, access)
    const file = openSync(this.files[action.file] ?? '', access)
    const [offset, sizeLimit] = [BigInt(action.offset), BigInt(action.sizeLimit)]
    const flags = (readOnly ? ioctl.LO_FLAGS_READ_ONLY : 0) | (autoclear ? ioctl.LO_FLAGS_AUTOCLEAR : 0)
    try {
      await ioctl.loopConfigure(device, { fd: file, info: { offset, sizeLimit, flags } })
    } catch (error) {
      closeSync(device)
      throw error
    } finally {
      closeSync(file)
    }
    this.#rude.set(id, device)
    return { number, owned: false }
  }

  async #setRudely(fd: number, { offset, sizeLimit, autoclear, reference }: Change): Promise<null> {
    const info = await ioctl.loopGetStatus64(fd)
    const flag = ioctl.LO_FLAGS_AUTOCLEAR
    await ioctl.loopSetStatus64(fd, {
      ...info,
      ...(offset !== undefined && { offset: BigInt(offset) }),
      ...(sizeLimit !== undefined && { sizeLimit: BigInt(sizeLimit) }),
      ...(autoclear !== undefined && { flags: autoclear ? info.flags | flag : info.flags & ~flag }),
      ...(reference !== undefined && { fileName: reference }),
    })
    return null
  }

  #descriptor(id: number): number {
    return this.#rude.get(id) ?? -1
  }

  #closeRudely(id: number): null {
    closeSync(this.#descriptor(id))
    this.#rude.delete(id)
    return null
  }

  /** Writes through the device, past what it has cached of a file that others write to. */
  write(number: number, offset: number, bytes: Buffer): void {
    const fd = openSync(`/dev/loop${number}`, 'r+')
    try {
      ioctl.blkFlsBufSync(fd)
      writeSync(fd, bytes, 0, bytes.length, offset)
      fsyncSync(fd)
    } finally {
      closeSync(fd)
    }
  }

  /** Compares everything there is to see with the model; others may look at our devices, and so keep them for a moment. */
  async compare(model: Model): Promise<void> {
    this.#steps++
    await this.#until(() => this.#difference(model))
  }

  async #until(look: () => Promise<string | undefined>): Promise<void> {
    const end = performance.now() + limit(5_000)
    let difference = await look()
    while (difference !== undefined && performance.now() < end) {
      await setTimeout(5)
      difference = await look()
    }
    if (difference !== undefined) throw new Error(difference)
  }

  async #difference(model: Model): Promise<string | undefined> {
    const expected = [...model.attachments.values()].toSorted((a, b) => a.number - b.number)
    const listed = await this.#attached()
    for (const { number, diskSeq } of listed) {
      const identity = model.attachments.get(number)?.identity
      if (identity !== undefined && diskSeq !== undefined) this.#diskSeqs.set(identity, diskSeq)
    }
    const wanted = expected.map((attachment) => this.#shown(model, attachment))
    return (
      differs('list()', listed.map(shown), wanted) ??
      (await this.#differenceInFind(expected)) ??
      (await this.#differenceInHandles(model)) ??
      this.#differenceInDevices(model) ??
      this.#differenceInBytes(model, expected)
    )
  }

  #shown(model: Model, attachment: Attachment): Shown {
    const { number, file, offset, sizeLimit, readOnly, autoclear } = attachment
    const backingFile = this.files[file] ?? null
    return { number, backingFile, offset, sizeLimit, size: model.sizeOf(attachment), readOnly, autoclear }
  }

  /** Of one file, another one at each step. */
  async #differenceInFind(expected: readonly Attachment[]): Promise<string | undefined> {
    const turn = this.#steps % this.files.length
    const found = await find(this.files[turn] ?? '')
    const wanted = expected.filter(({ file }) => file === turn)
    return differs(
      `find(${this.files[turn]})`,
      found.map(({ number }) => number),
      wanted.map(({ number }) => number),
    )
  }

  /** status() of all handles. */
  async #differenceInHandles(model: Model): Promise<string | undefined> {
    for (const user of ['first', 'second'] as const) {
      const handles = model.handlesOf(user)
      if (handles.length === 0) continue
      const answer = await this.#workers[user].ask({ name: 'look' })
      if (!('value' in answer)) return `looking at the handles of the ${user} process: ${answer.message}`
      const looks = (answer.value as Look[]).toSorted((a, b) => a.id - b.id)
      const wanted = handles.toSorted((a, b) => a.id - b.id).map((handle) => this.#look(model, handle))
      const difference = differs(`status() of the ${user} process`, looks.map(told), wanted)
      if (difference !== undefined) return difference
    }
    return undefined
  }

  #look(model: Model, { id, owned, number, wasFree }: Handle): unknown {
    const attachment = model.attachments.get(number)
    if (attachment === undefined) return { id, owned, reason: 'not-attached' }
    if (wasFree) return { id, owned, reason: 'replaced' }
    const { reference } = attachment
    return { id, owned, status: { ...this.#shown(model, attachment), reference } }
  }

  /** Free devices belong to nobody: other programs may remove ours, as the gate of other tests does. */
  #differenceInDevices(model: Model): string | undefined {
    for (const number of model.devices) {
      if (!exists(number) && model.openersOf(number).length === 0) model.devices.delete(number)
    }
    return differs(
      'devices',
      this.numbers.filter(exists),
      this.numbers.filter((number) => model.devices.has(number)),
    )
  }

  /** All files as they are, and one of the devices through its block device. */
  #differenceInBytes(model: Model, expected: readonly Attachment[]): string | undefined {
    for (const [i, path] of this.files.entries()) {
      if (model.contents[i]?.equals(readFileSync(path)) === false) return `${path} has other bytes`
    }
    const attachment = expected[this.#steps % expected.length]
    if (attachment === undefined) return undefined
    const { number, file, offset } = attachment
    const bytes = Buffer.alloc(Math.min(8192, model.sizeOf(attachment)))
    const fd = openSync(`/dev/loop${number}`, 'r')
    try {
      ioctl.blkFlsBufSync(fd)
      readSync(fd, bytes, 0, bytes.length, 0)
    } finally {
      closeSync(fd)
    }
    if (model.contents[file]?.subarray(offset, offset + bytes.length).equals(bytes)) return undefined
    return `/dev/loop${number} shows other bytes than ${this.files[file]} from ${offset} on`
  }
}

function told({ id, owned, status, reason }: Look): unknown {
  if (status === undefined) return { id, owned, reason }
  return { id, owned, status: { ...shown(status), reference: status.reference } }
}

function exists(number: number): boolean {
  return existsSync(`/sys/block/loop${number}`)
}

function differs(what: string, found: unknown, wanted: unknown): string | undefined {
  const [is, shouldBe] = [JSON.stringify(found), JSON.stringify(wanted)]
  return is === shouldBe ? undefined : `${what}\n  is        ${is}\n  should be ${shouldBe}`
}
