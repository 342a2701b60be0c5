/** The files of many devices in sysfs, read in few hops to a thread and decoded in one pass. */

import { constants } from 'node:os'
import { binding } from './binding.ts'
import { type Asked, type Bound, within } from './bounded.ts'
import { inBatches } from './batches.ts'
import { Sequence, type Step } from './sequence.ts'
import {
  backingFileOf,
  decodeBackingFile,
  decodeTexts,
  deviceDirectory,
  encodeList,
  isBound,
  LACKING,
  newAttribute,
} from './sysfs.ts'

const { ENODEV, ENOENT } = constants.errno

/** The files of one device as they are, with the newline at the end, and `dev` without; undefined where there is none. */
export type Attributes = Readonly<Partial<Record<Attribute | 'dev', string>>>

/** In the order in which they are read; the first and the last have the disk sequence number. */
const OF_LOOP = ['backing_file', 'offset', 'sizelimit', 'autoclear', 'partscan', 'dio'] as const
const OF_DEVICE = ['uevent', 'size', 'ro', 'queue/logical_block_size', 'diskseq'] as const

export type Attribute = (typeof OF_LOOP)[number] | (typeof OF_DEVICE)[number]

export interface DeviceFiles {
  attributes: Attributes
  /** loop/backing_file; null: not attached; undefined: attached, but the path is longer than sysfs can show. */
  backingFile: string | null | undefined
  /** They may be of more than one attachment: it was attached, changed or detached meanwhile. */
  moved: boolean
}

/** A negative errno: something is lacking here, and nothing can be said. */
export type Found = (DeviceFiles | undefined)[] | number

/**
 * The files of devices, in the order of the numbers, each read once; undefined: there is no such device, or it is free
 * and `free` is false. The block size waits while a queue is being drained.
 *
 * @throws GivenUp where there is a bound
 */
export async function readDevices(
  numbers: readonly number[],
  free: boolean,
  bound?: Bound,
  asked?: Asked,
): Promise<Found> {
  const calls = within(bound, asked)
  const read = async (form: Form, some: readonly number[]): Promise<Found> =>
    decode(form, some, await calls.sysfsRead(directoriesOf(form, some), form.names))
  const found = await inBatches(numbers, async (batch) => {
    const attached = await read(ATTACHED, batch)
    const missing = free ? missingOf(batch, attached) : []
    return missing.length === 0 ? attached : fill(attached, missing, await read(FREE, missing))
  })
  return (
    found.find((each) => typeof each === 'number') ?? found.flatMap((each) => (typeof each === 'number' ? [] : each))
  )
}

/** The paths of the backing files of those that are attached, null where one is too long to be shown. */
export async function readBackingFiles(numbers: readonly number[], bound?: Bound): Promise<Map<number, string | null>> {
  const read = await inBatches(numbers, (batch) => readBackingFileBatch(batch, bound))
  const found = new Map<number, string | null>()
  for (const { number, bytes, length } of read.flat()) {
    const path = decodeBackingFile(bytes, length.answer)
    if (path !== undefined) found.set(number, path)
  }
  return found
}

async function readBackingFileBatch(
  numbers: readonly number[],
  bound: Bound | undefined,
): Promise<{ number: number; bytes: Buffer; length: Step }[]> {
  const sequence = new Sequence()
  const read = numbers.map((number) => {
    const bytes = newAttribute()
    return { number, bytes, length: sequence.try('sysfsBackingFile', number, bytes) }
  })
  await sequence.run(bound)
  return read
}

/** {@link readDevices}, free ones too, at once; without the block size. */
export function readDevicesSync(numbers: readonly number[]): Found {
  const found = readFormSync(ATTACHED_NOW, numbers)
  const missing = missingOf(numbers, found)
  return missing.length === 0 ? found : fill(found, missing, readFormSync(FREE_NOW, missing))
}

function readFormSync(form: Form, numbers: readonly number[]): Found {
  return decode(form, numbers, binding().sysfsReadSync(directoriesOf(form, numbers), form.names))
}

function missingOf(numbers: readonly number[], found: Found): number[] {
  return typeof found === 'number' ? [] : numbers.filter((_, i) => found[i] === undefined)
}

/** What was not found attached, in the order of the gaps; it can have been attached since. */
function fill(found: Found, missing: readonly number[], others: Found): Found {
  if (typeof found === 'number' || typeof others === 'number') return others
  const next = others.map((files, i) => files && { ...files, moved: files.moved || isBound(missing[i] ?? -1) }).values()
  return found.map((files) => files ?? next.next().value)
}

/** Which files, and in which directory of the device: where that is not there, that is all the kernel is asked. */
interface Form {
  directory: string
  attributes: readonly Attribute[]
  names: Uint8Array
}

function makeForm(directory: string, device: string, inner: readonly Attribute[], outer: readonly Attribute[]): Form {
  const [uevent, ...others] = outer
  const names = [`${device}${uevent}`, ...inner, ...others.map((name) => device + name)]
  return { directory, attributes: [...outer.slice(0, 1), ...inner, ...others], names: encodeList(names) }
}

const AT_ONCE = OF_DEVICE.filter((name) => name !== 'queue/logical_block_size')

/** loop/ comes and goes with the attachment. */
const ATTACHED = makeForm('/loop', '../', OF_LOOP, OF_DEVICE)
const ATTACHED_NOW = makeForm('/loop', '../', OF_LOOP, AT_ONCE)
const FREE = makeForm('', '', [], OF_DEVICE)
const FREE_NOW = makeForm('', '', [], AT_ONCE)

function directoriesOf({ directory }: Form, numbers: readonly number[]): Uint8Array {
  return encodeList(numbers.map((number) => deviceDirectory(number) + directory))
}

function decode({ attributes }: Form, numbers: readonly number[], bytes: Buffer): Found {
  const answers = decodeTexts(bytes)
  const lack = answers.find((answer) => typeof answer === 'number' && LACKING.has(answer))
  if (typeof lack === 'number') return lack
  return numbers.map((_, device) => {
    const texts: Texts = {}
    const errors: Errors = {}
    let at = device * attributes.length
    for (const name of attributes) {
      const answer = answers[at++]
      if (typeof answer === 'number') errors[name] = answer
      else if (answer !== undefined) texts[name] = answer
    }
    return toFiles(texts, errors)
  })
}

type Texts = Partial<Record<Attribute, string>>
type Errors = Partial<Record<Attribute, number>>

function toFiles(texts: Texts, errors: Errors): DeviceFiles | undefined {
  const { uevent = '', backing_file: path, diskseq } = texts
  const major = MAJOR.exec(uevent)?.[1]
  if (major === undefined) return undefined
  const isGone = [errors.backing_file, errors.partscan].some((errno) => errno === -ENOENT || errno === -ENODEV)
  return {
    attributes: { ...texts, dev: `${major}:${MINOR.exec(uevent)?.[1]}` },
    backingFile: backingFileOf(path === undefined ? errors.backing_file : Buffer.from(path, 'latin1')),
    moved: isGone || DISKSEQ.exec(uevent)?.[1] !== diskseq?.trimEnd(),
  }
}

/** Lines of a file uevent. */
const MAJOR = /^MAJOR=(.*)$/m
const MINOR = /^MINOR=(.*)$/m
const DISKSEQ = /^DISKSEQ=(.*)$/m
