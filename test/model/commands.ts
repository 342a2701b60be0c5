/** The steps of the model test, as fast-check makes them up: numbers that choose among what is there when they are run. */

import * as fc from 'fast-check'
import type { Machine } from './machine.ts'
import {
  type Action,
  type Answer,
  type Change,
  FILE_SIZES,
  type Handle,
  type Model,
  type Overlap,
  type User,
} from './model.ts'

/** So many attachments, and open descriptors of each actor, there are at most. */
const MOST = 6

type Command = fc.AsyncCommand<Model, Machine>
type Choose = (model: Model, machine: Machine, id: number) => Action | undefined

/** Ids of handles: never the same one twice. */
let lastId = 0

/** One action of one actor. */
class Step implements Command {
  readonly #choose: Choose
  #told = ''

  constructor(choose: Choose) {
    this.#choose = choose
  }

  check(model: Readonly<Model>): boolean {
    return model.attachments.size <= MOST && model.handles.length <= 3 * MOST
  }

  async run(model: Model, machine: Machine): Promise<void> {
    const action = this.#choose(model, machine, ++lastId)
    this.#told = ''
    if (action === undefined) return
    this.#told = JSON.stringify(action)
    const answer = await machine.do(action, waits(model, action))
    this.#told += ` -> ${JSON.stringify(answer)}`
    const complaint = model.take(action, answer)
    if (complaint !== undefined) throw new Error(`${this.#told}\n  should be ${complaint}`)
    await machine.compare(model)
  }

  toString(): string {
    return this.#told === '' ? '-' : this.#told
  }
}

/** Two actions at once: what comes of them has to be what could come of one after the other. */
class Race implements Command {
  readonly #choices: readonly [Choose, Choose]
  #told = ''

  constructor(...choices: [Choose, Choose]) {
    this.#choices = choices
  }

  check(model: Readonly<Model>): boolean {
    return model.attachments.size < MOST && model.handles.length < 3 * MOST
  }

  async run(model: Model, machine: Machine): Promise<void> {
    const [one, other] = this.#choices.map((choose) => choose(model, machine, ++lastId))
    this.#told = ''
    if (one === undefined || other === undefined || one.actor === other.actor) return
    this.#told = `${JSON.stringify(one)} || ${JSON.stringify(other)}`
    const answers = await Promise.all([machine.do(one, waits(model, one)), machine.do(other, waits(model, other))])
    this.#told += ` -> ${JSON.stringify(answers)}`
    const [answer, otherAnswer] = answers
    const ways = sayings(one, answer).flatMap((first) =>
      sayings(other, otherAnswer).flatMap((second) => [
        [first, second],
        [second, first],
      ]),
    )
    const complaints: string[] = []
    for (const way of ways) {
      const next = model.clone()
      const complaint = way.map(([action, given]) => next.take(action, given)).find((said) => said !== undefined)
      // Both orders can give the same answers, and leave different things behind.
      const difference = complaint ?? (await differenceFrom(next, machine))
      if (difference === undefined) {
        model.become(next)
        return
      }
      complaints.push(difference)
    }
    throw new Error(`${this.#told}\n  should be ${complaints.join(', or ')}`)
  }

  toString(): string {
    return this.#told === '' ? '-' : this.#told
  }
}

/** The action with its answer; and with `deferred`, which can have come true before the answer was given. */
function sayings(action: Action, answer: Answer): [Action, Answer][] {
  const isDeferring = action.name === 'detachSync' || (action.name === 'detach' && action.lazy)
  const isOver = isDeferring && 'value' in answer && answer.value === 'detached'
  return isOver
    ? [
        [action, answer],
        [action, { value: 'deferred' }],
      ]
    : [[action, answer]]
}

async function differenceFrom(model: Model, machine: Machine): Promise<string | undefined> {
  try {
    await machine.compare(model)
    return undefined
  } catch (error) {
    return String(error)
  }
}

/** kill -9, in the middle of a step where one is given: of one that leaves nothing else behind than the kill itself. */
class Kill implements Command {
  readonly #user: User
  readonly #milliseconds: number
  readonly #choose: Choose
  #told = ''

  constructor(user: User, milliseconds: number, choose: Choose) {
    this.#user = user
    this.#milliseconds = milliseconds
    this.#choose = choose
  }

  check(): boolean {
    return true
  }

  async run(model: Model, machine: Machine): Promise<void> {
    const chosen = this.#choose(model, machine, ++lastId)
    // Where somebody else has the device open, what was attached to it would stay.
    const isHeld = model.handles.some(({ actor, number }) => actor !== this.#user && !model.attachments.has(number))
    const action = isHeld ? undefined : chosen
    this.#told = `kill -9 of the ${this.#user} process in ${JSON.stringify(action)}`
    // An attach may have made its device.
    await machine.kill(this.#user, action, this.#milliseconds)
    model.kill(this.#user)
    if (action?.name === 'attach' && action.number !== undefined) machine.noteDevice(model, action.number)
    await machine.compare(model)
  }

  toString(): string {
    return this.#told === '' ? '-' : this.#told
  }
}

/** A marker through a device into its file. */
class Write implements Command {
  readonly #which: number
  readonly #sector: number
  readonly #fill: number
  #told = ''

  constructor(which: number, sector: number, fill: number) {
    this.#which = which
    this.#sector = sector
    this.#fill = fill
  }

  check(model: Readonly<Model>): boolean {
    return writable(model).length > 0
  }

  async run(model: Model, machine: Machine): Promise<void> {
    const attachment = pick(writable(model), this.#which)
    if (attachment === undefined) return
    const at = (this.#sector % (model.sizeOf(attachment) / 512)) * 512
    this.#told = `write to ${attachment.number} at ${at}`
    const bytes = Buffer.alloc(512, this.#fill)
    machine.write(attachment.number, at, bytes)
    const contents = Buffer.from(model.contents[attachment.file] ?? Buffer.alloc(0))
    bytes.copy(contents, attachment.offset + at)
    model.contents[attachment.file] = contents
    await machine.compare(model)
  }

  toString(): string {
    return this.#told === '' ? '-' : this.#told
  }
}

function writable(
  model: Readonly<Model>,
): ReturnType<Model['attachments']['values']> extends Iterable<infer T> ? T[] : never {
  return [...model.attachments.values()].filter((attachment) => !attachment.readOnly && model.sizeOf(attachment) > 0)
}

function pick<T>(all: readonly T[], which: number): T | undefined {
  return all[which % all.length]
}

/** Whether it will succeed, so that it may take its time: what will not would only wait for it. */
function waits(model: Model, action: Action): boolean {
  if (action.name === 'detach') {
    const handle = model.handles.find(({ id }) => id === action.handle)
    return handle !== undefined && (action.lazy || model.openersOf(handle.number).length === 1)
  }
  if (action.name !== 'attach' || action.number === undefined) return true
  return !model.openersOf(action.number).some(({ exclusive }) => exclusive)
}

// ── what is chosen

const user = fc.constantFrom<User>('first', 'second')
const which = fc.nat({ max: 11 })
const file = fc.nat({ max: FILE_SIZES.length - 1 })
const offset = fc.constantFrom(0, 0, 4096, 8192, 16_384, 1536)
const sizeLimit = fc.constantFrom(0, 0, 4096, 8192, 512)
const window = fc.record({ file, offset, sizeLimit, readOnly: fc.boolean() })
/** Few: they are to meet. */
const autoclear = fc.constantFrom(true, true, false)

const change: fc.Arbitrary<Change> = fc
  .record(
    { offset, sizeLimit, autoclear: fc.boolean(), reference: fc.constantFrom('', 'a', 'b') },
    { requiredKeys: [] },
  )
  .filter((members) => Object.keys(members).length > 0)

function chooseAttach(overlaps: readonly Overlap[], autoclears: fc.Arbitrary<boolean>): fc.Arbitrary<Choose> {
  const number = fc.option(which, { nil: undefined, freq: 2 })
  return fc
    .tuple(user, number, window, autoclears, fc.constantFrom(...overlaps))
    .map(([actor, n, taken, goes, overlap]) => (model, { numbers }, id) => {
      if (model.attachments.size >= MOST || model.handlesOf(actor).length >= MOST) return undefined
      const wanted = n === undefined ? undefined : pick(numbers, n)
      return {
        name: 'attach',
        actor,
        id,
        ...taken,
        autoclear: goes,
        overlap,
        ...(wanted !== undefined && { number: wanted }),
      }
    })
}

const attach = chooseAttach(['refuse', 'refuse', 'allow', 'reuse'], autoclear)

/** An action of a handle of one of the two. */
function ofHandle(make: (actor: User, handle: Handle) => Action): fc.Arbitrary<Choose> {
  return fc.tuple(user, which).map(([actor, n]) => (model) => {
    const handle = pick(model.handlesOf(actor), n)
    return handle && make(actor, handle)
  })
}

const detach = fc.boolean().chain((lazy) => ofHandle((actor, { id }) => ({ name: 'detach', actor, handle: id, lazy })))
const end = fc
  .constantFrom('detachSync', 'dispose', 'close', 'release')
  .chain((name) => ofHandle((actor, { id }) => ({ name, actor, handle: id })))
const set = fc
  .tuple(change, fc.constantFrom<'refuse' | 'allow'>('refuse', 'allow'))
  .chain(([members, overlap]) =>
    ofHandle((actor, { id }) => ({ name: 'set', actor, handle: id, change: members, overlap })),
  )
const changeFile = file.chain((to) => ofHandle((actor, { id }) => ({ name: 'change', actor, handle: id, file: to })))

const open: fc.Arbitrary<Choose> = fc
  .tuple(user, which, fc.constantFrom('number', 'attached', 'ref', 'ref'))
  .map(([actor, n, by]) => (model, { numbers }, id) => {
    if (model.handlesOf(actor).length >= MOST) return undefined
    if (by === 'ref') {
      const ref = model.refs.filter(({ number }) => numbers.includes(number)).at(-1 - n)
      return ref && { name: 'open', actor, id, ...ref }
    }
    const number = pick(by === 'number' ? numbers : [...model.attachments.keys()], n)
    return number === undefined ? undefined : { name: 'open', actor, id, number }
  })

const remove = fc.tuple(user, which).map(([actor, n]): Choose => (_, { numbers }) => ({
  name: 'remove',
  actor,
  number: pick(numbers, n) ?? -1,
}))

const rudeAttach = fc.tuple(which, window, autoclear).map(([n, taken, goes]): Choose => (model, { numbers }, id) => {
  const number = pick(numbers, n) ?? -1
  const isHeld = model.openersOf(number).some(({ exclusive }) => exclusive)
  if (model.attachments.size >= MOST || model.attachments.has(number) || isHeld) return undefined
  return { name: 'rudeAttach', actor: 'rude', id, number, ...taken, autoclear: goes }
})

const rudeOpen = fc.tuple(which, fc.boolean()).map(([n, exclusive]): Choose => (model, { numbers }, id) => {
  const there = [...new Set([...model.attachments.keys(), ...numbers.filter((number) => model.devices.has(number))])]
  const number = pick(there, n)
  if (number === undefined || model.handlesOf('rude').length >= MOST) return undefined
  if (exclusive && model.openersOf(number).some((handle) => handle.exclusive)) return undefined
  return { name: 'rudeOpen', actor: 'rude', id, number, exclusive }
})

function ofRude(make: (handle: Handle, model: Model) => Action | undefined): fc.Arbitrary<Choose> {
  return which.map((n) => (model) => {
    const handle = pick(model.handlesOf('rude'), n)
    return handle && make(handle, model)
  })
}

const rudeClose = ofRude(({ id }) => ({ name: 'rudeClose', actor: 'rude', handle: id }))
const rudeClear = ofRude(({ id, number }, model) =>
  model.attachments.has(number) ? { name: 'rudeClear', actor: 'rude', handle: id } : undefined,
)
const rudeSet = change.chain((members) =>
  ofRude(({ id, number }, model) =>
    model.attachments.has(number) ? { name: 'rudeSet', actor: 'rude', handle: id, change: members } : undefined,
  ),
)
const rudeChange = file.chain((to) =>
  ofRude(({ id, number }, model) => {
    const attachment = model.attachments.get(number)
    if (attachment?.readOnly !== true) return undefined
    if (model.sizeOf({ ...attachment, file: to }) !== model.sizeOf(attachment)) return undefined
    return { name: 'rudeChange', actor: 'rude', handle: id, file: to }
  }),
)

/** What is tried at once: it must not matter that two of them choose the same handle or the same free device. */
const racing = fc.oneof(
  chooseAttach(['refuse', 'refuse', 'reuse'], autoclear),
  detach,
  end,
  rudeAttach,
  rudeClose,
  rudeClear,
)

/** Of these a kill leaves nothing: the attachment has autoclear. */
const killed = fc.oneof(
  chooseAttach(['refuse'], fc.constant(true)),
  fc.constant<Choose>(() => undefined),
)

const steps = (choose: fc.Arbitrary<Choose>): fc.Arbitrary<Command> => choose.map((chosen) => new Step(chosen))

/** LOOP_SET_STATUS64 and LOOP_CHANGE_FD take 20 ms each, LOOP_CTL_REMOVE 45: they are drawn less often. */
export const commands: fc.Arbitrary<Command> = fc.oneof(
  { weight: 30, arbitrary: steps(attach) },
  { weight: 16, arbitrary: steps(detach) },
  { weight: 16, arbitrary: steps(end) },
  { weight: 12, arbitrary: steps(open) },
  { weight: 4, arbitrary: steps(set) },
  { weight: 4, arbitrary: steps(changeFile) },
  { weight: 2, arbitrary: steps(remove) },
  { weight: 10, arbitrary: steps(rudeAttach) },
  { weight: 8, arbitrary: steps(rudeOpen) },
  { weight: 6, arbitrary: steps(rudeClose) },
  { weight: 6, arbitrary: steps(rudeClear) },
  { weight: 2, arbitrary: steps(rudeSet) },
  { weight: 2, arbitrary: steps(rudeChange) },
  {
    weight: 12,
    arbitrary: fc
      .tuple(fc.nat({ max: 63 }), fc.nat({ max: 127 }), fc.integer({ min: 1, max: 255 }))
      .map(([n, sector, fill]) => new Write(n, sector, fill)),
  },
  { weight: 8, arbitrary: fc.tuple(racing, racing).map(([one, other]) => new Race(one, other)) },
  {
    weight: 1,
    arbitrary: fc.tuple(user, fc.nat({ max: 4 }), killed).map(([who, ms, choose]) => new Kill(who, ms, choose)),
  },
)
