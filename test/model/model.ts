/** What the loop driver and the library are to do, in a few lines: who has which device open, and what it is attached to. */

/** The backing files' sizes in bytes; the last one differs, so that a change to it is refused. */
export const FILE_SIZES: readonly number[] = [65_536, 65_536, 65_536, 32_768]

export type User = 'first' | 'second'
export type Actor = User | 'rude'

/** What an attachment takes of its file. */
export interface Window {
  file: number
  offset: number
  sizeLimit: number
  readOnly: boolean
}

export interface Attachment extends Window {
  number: number
  autoclear: boolean
  reference: string
  /** Moves with every attach and every change of the file, as the disk sequence number does. */
  identity: number
}

/** An open descriptor of a device. */
export interface Handle {
  id: number
  actor: Actor
  number: number
  owned: boolean
  /** The device was free when it was opened. */
  wasFree: boolean
  exclusive: boolean
}

export interface Change {
  offset?: number
  sizeLimit?: number
  autoclear?: boolean
  reference?: string
}

export type Overlap = 'refuse' | 'allow' | 'reuse'

/** One step, with everything that was to be chosen chosen. `handle` and `id` are those of {@link Handle}. */
export type Action =
  | (Window & { name: 'attach'; actor: User; id: number; number?: number; autoclear: boolean; overlap: Overlap })
  | { name: 'open'; actor: User; id: number; number: number; identity?: number }
  | { name: 'detach'; actor: User; handle: number; lazy: boolean }
  | { name: 'detachSync' | 'dispose' | 'close' | 'release'; actor: User; handle: number }
  | { name: 'set'; actor: User; handle: number; change: Change; overlap: 'refuse' | 'allow' }
  | { name: 'change'; actor: User; handle: number; file: number }
  | { name: 'remove'; actor: User; number: number }
  | (Window & { name: 'rudeAttach'; actor: 'rude'; id: number; number: number; autoclear: boolean })
  | { name: 'rudeOpen'; actor: 'rude'; id: number; number: number; exclusive: boolean }
  | { name: 'rudeClose' | 'rudeClear'; actor: 'rude'; handle: number }
  | { name: 'rudeSet'; actor: 'rude'; handle: number; change: Change }
  | { name: 'rudeChange'; actor: 'rude'; handle: number; file: number }

/** What came of a step: a value, or the reason of the error. */
export type Answer = { value: unknown } | { reason: string; message: string }

/** What an attach and an open answer. */
export interface Opened {
  number: number
  owned: boolean
}

export class Model {
  attachments = new Map<number, Attachment>()
  handles: Handle[] = []
  /** The devices of the test's own numbers that there are. */
  devices = new Set<number>()
  /** Attachments that were, as references name them. */
  refs: { number: number; identity: number }[] = []
  contents: Buffer[] = FILE_SIZES.map((size) => Buffer.alloc(size))
  #identity = 0

  clone(): Model {
    const copy = new Model()
    copy.attachments = new Map([...this.attachments].map(([number, attachment]) => [number, { ...attachment }]))
    copy.handles = this.handles.map((handle) => ({ ...handle }))
    copy.devices = new Set(this.devices)
    copy.refs = [...this.refs]
    copy.contents = [...this.contents]
    copy.#identity = this.#identity
    return copy
  }

  /** Becomes what a clone has come to. */
  become(other: Model): void {
    Object.assign(this, other)
    this.#identity = other.#identity
  }

  handlesOf(actor: Actor): Handle[] {
    return this.handles.filter((handle) => handle.actor === actor)
  }

  openersOf(number: number): Handle[] {
    return this.handles.filter((handle) => handle.number === number)
  }

  /** What the device shows of its file, in bytes: whole sectors. */
  sizeOf({ file, offset, sizeLimit }: Window): number {
    const left = Math.max(0, (FILE_SIZES[file] ?? 0) - offset)
    return Math.floor((sizeLimit === 0 ? left : Math.min(left, sizeLimit)) / 512) * 512
  }

  /** Takes the step over, where what came of it is as it has to be; else says what would have been. */
  take(action: Action, answer: Answer): string | undefined {
    const complaint = this.#take(action, answer)
    for (const [number, { autoclear }] of this.attachments) {
      if (autoclear && this.openersOf(number).length === 0) this.attachments.delete(number)
    }
    return complaint
  }

  /** A process ends: the kernel closes what it has open. */
  kill(actor: User): void {
    this.handles = this.handles.filter((handle) => handle.actor !== actor)
    for (const [number, { autoclear }] of this.attachments) {
      if (autoclear && this.openersOf(number).length === 0) this.attachments.delete(number)
    }
  }

  #take(action: Action, answer: Answer): string | undefined {
    switch (action.name) {
      case 'attach':
        return this.#attach(action, answer)
      case 'rudeAttach': {
        if (this.attachments.has(action.number)) return expectReason(answer, 'already-attached')
        this.#add(action, action.number, action.autoclear)
        return this.#hold(action, answer, false)
      }
      case 'open':
      case 'rudeOpen':
        return this.#open(action, answer)
      case 'remove':
        return this.#remove(action.number, answer)
      case 'rudeClose':
      case 'close':
        this.#drop(action.handle)
        return expectValue(answer)
      default:
        return this.#act(action, answer)
    }
  }

  #attach(action: Extract<Action, { name: 'attach' }>, answer: Answer): string | undefined {
    const { number, overlap } = action
    const others = [...this.attachments.values()].filter(({ file }) => file === action.file)
    if (overlap === 'reuse') {
      const same = others.filter((other) => isSame(other, action) && (number ?? other.number) === other.number)
      if (same.length > 0) {
        const numbers = same.map((other) => other.number)
        return this.#hold(action, answer, false, numbers)
      }
    }
    if (overlap !== 'allow' && others.some((other) => conflicts(other, action))) return expectReason(answer, 'overlap')
    if (number !== undefined) {
      if (this.attachments.has(number)) return expectReason(answer, 'already-attached')
      if (this.openersOf(number).some(({ exclusive }) => exclusive)) return expectReason(answer, 'in-use')
    }
    if (!('value' in answer)) return 'attached'
    const opened = answer.value as Opened
    if (this.attachments.has(opened.number)) return `another device than ${opened.number}, which is attached`
    if (this.openersOf(opened.number).some(({ exclusive }) => exclusive)) return 'a device that nobody holds'
    this.#add(action, opened.number, action.autoclear)
    return this.#hold(action, answer, true, [number ?? opened.number])
  }

  #add({ file, offset, sizeLimit, readOnly }: Window, number: number, autoclear: boolean): void {
    const identity = this.#identity++
    this.devices.add(number)
    this.attachments.set(number, { number, file, offset, sizeLimit, readOnly, autoclear, reference: '', identity })
    this.refs.push({ number, identity })
  }

  #hold(
    { id, actor }: { id: number; actor: Actor },
    answer: Answer,
    owned: boolean,
    numbers?: readonly number[],
  ): string | undefined {
    if (!('value' in answer)) return `a handle, owned: ${owned}`
    const opened = answer.value as Opened
    if (opened.owned !== owned || (numbers !== undefined && !numbers.includes(opened.number))) {
      return `a handle of ${numbers?.join(' or ')}, owned: ${owned}`
    }
    const wasFree = !this.attachments.has(opened.number)
    this.handles.push({ id, actor, number: opened.number, owned, wasFree, exclusive: false })
    return undefined
  }

  #open(action: Extract<Action, { name: 'open' | 'rudeOpen' }>, answer: Answer): string | undefined {
    const { number } = action
    if (!this.devices.has(number)) return expectReason(answer, 'no-such-device')
    if (action.name === 'open' && action.identity !== undefined) {
      if (this.attachments.get(number)?.identity !== action.identity) return expectReason(answer, 'replaced')
    }
    const complaint = this.#hold(action, answer, false, [number])
    const handle = this.handles.at(-1)
    if (complaint === undefined && handle !== undefined) {
      handle.exclusive = action.name === 'rudeOpen' && action.exclusive
    }
    return complaint
  }

  #remove(number: number, answer: Answer): string | undefined {
    if (!this.devices.has(number)) return expectReason(answer, 'no-such-device')
    if (this.attachments.has(number) || this.openersOf(number).length > 0) return expectReason(answer, 'in-use')
    this.devices.delete(number)
    return expectValue(answer, number)
  }

  /** Of a handle. */
  #act(action: Extract<Action, { handle: number }>, answer: Answer): string | undefined {
    const handle = this.handles.find(({ id }) => id === action.handle)
    if (handle === undefined) return 'no such step'
    const attachment = this.attachments.get(handle.number)
    const isAlone = this.openersOf(handle.number).length === 1
    if (action.name === 'dispose' && !handle.owned) {
      this.#drop(handle.id)
      return expectValue(answer)
    }
    if (attachment === undefined) return expectReason(answer, 'not-attached')
    if (handle.wasFree && handle.actor !== 'rude') return expectReason(answer, 'replaced')
    switch (action.name) {
      case 'detach':
        if (!action.lazy && !isAlone) return expectReason(answer, 'in-use')
        return this.#detach(handle, attachment, answer, isAlone)
      case 'detachSync':
        return this.#detach(handle, attachment, answer, isAlone)
      case 'dispose':
      case 'rudeClear':
        attachment.autoclear = true
        this.#drop(handle.id)
        return expectValue(answer)
      case 'release':
        attachment.autoclear = false
        this.#drop(handle.id)
        return expectValue(answer, `/dev/loop${handle.number}`)
      case 'set':
        if (action.overlap === 'refuse' && this.#movesOntoAnother(attachment, action.change)) {
          return expectReason(answer, 'overlap')
        }
        Object.assign(attachment, action.change)
        return expectValue(answer)
      case 'rudeSet':
        Object.assign(attachment, action.change)
        return expectValue(answer)
      case 'change':
      case 'rudeChange':
        return this.#change(attachment, action, answer)
      default:
        return 'no such step'
    }
  }

  /** What overlapped before was allowed. */
  #movesOntoAnother(attachment: Attachment, change: Change): boolean {
    const next = { ...attachment, ...change }
    if (next.offset === attachment.offset && next.sizeLimit === attachment.sizeLimit) return false
    const others = this.#others(attachment.number, attachment.file)
    return others.some((other) => conflicts(other, next) && !conflicts(other, attachment))
  }

  #others(number: number, file: number): Attachment[] {
    return [...this.attachments.values()].filter((other) => other.number !== number && other.file === file)
  }

  /** 'deferred' also where somebody only looks at the device in that moment. */
  #detach(handle: Handle, attachment: Attachment, answer: Answer, isAlone: boolean): string | undefined {
    attachment.autoclear = true
    this.#drop(handle.id)
    return isAlone && 'value' in answer && answer.value === 'deferred'
      ? undefined
      : expectValue(answer, isAlone ? 'detached' : 'deferred')
  }

  #change(
    attachment: Attachment,
    { name, file }: { name: 'change' | 'rudeChange'; file: number },
    answer: Answer,
  ): string | undefined {
    if (name === 'change') {
      if (!attachment.readOnly) return expectReason(answer, 'not-read-only')
      // K2: a filesystem that is mounted elsewhere shows in nothing else.
      const isHeld = this.openersOf(attachment.number).some(({ exclusive }) => exclusive)
      if (isHeld) return expectReason(answer, 'would-shut-down-filesystem')
      const next = { ...attachment, file }
      if (this.sizeOf(next) !== this.sizeOf(attachment)) return expectReason(answer, 'size-mismatch')
      if (this.#others(attachment.number, file).some((other) => conflicts(other, next))) {
        return expectReason(answer, 'overlap')
      }
    }
    attachment.file = file
    attachment.identity = this.#identity++
    this.refs.push({ number: attachment.number, identity: attachment.identity })
    return expectValue(answer)
  }

  #drop(id: number): void {
    this.handles = this.handles.filter((handle) => handle.id !== id)
  }
}

function isSame(a: Window, b: Window): boolean {
  return a.file === b.file && a.offset === b.offset && a.sizeLimit === b.sizeLimit && a.readOnly === b.readOnly
}

/** Whether both take some of the same bytes, and one of them can write. */
function conflicts(a: Window, b: Window): boolean {
  const end = ({ offset, sizeLimit }: Window): number => (sizeLimit === 0 ? Infinity : offset + sizeLimit)
  return !(a.readOnly && b.readOnly) && a.offset < end(b) && b.offset < end(a)
}

function expectReason(answer: Answer, reason: string): string | undefined {
  return 'reason' in answer && answer.reason === reason ? undefined : `an error of reason ${reason}`
}

function expectValue(answer: Answer, value?: string | number): string | undefined {
  if (!('value' in answer)) return 'no error'
  return value === undefined || answer.value === value ? undefined : `the answer ${value}`
}
