/** What the commands do, list apart. Loaded when one of them is run. */

import { styleText } from 'node:util'
import type { AttachOptions } from '../attach/options.ts'
import type { Wait } from '../common/deadline.ts'
import { attach, open } from '../device.ts'
import { doctor, type DoctorReport } from '../doctor/doctor.ts'
import { refusal } from '../errors/errors.ts'
import { LOWER_TAG } from '../handle/lower.ts'
import type { DeviceRef } from '../handle/open.ts'
import type { LoopEvent } from '../observe/events.ts'
import { find } from '../observe/find.ts'
import { list, type LoopInfo } from '../observe/list.ts'
import { watch } from '../observe/watch.ts'
import { fileOf } from './columns.ts'
import { findAttached } from './listing.ts'
import { fileArgument, HOW_TO_RUN, UsageError } from './parse.ts'
import { withProgress } from './progress.ts'
import { closing } from './closing.ts'
import { describeStatus } from './status.ts'
import {
  boundOf,
  type Common,
  Exit,
  EXIT_FAILED,
  interruptible,
  isForPeople,
  note,
  print,
  printJson,
  printWarnings,
  report,
} from './terminal.ts'
import { humanSize, printable } from './text.ts'
import { translate, translateHint } from './words.ts'

export { addAction, freeAction, removeAction } from './control-actions.ts'
export { createAction, mountAction, umountAction } from './mount-actions.ts'
export { partitionsAction } from './partitions-action.ts'

type AttachFlags = Common & { directIo?: true | 'prefer'; createNode: boolean } & Omit<
    AttachOptions,
    'directIO' | 'createNode' | 'timeout' | 'signal'
  >

function attachOptions({ json, timeout, directIo: directIO, createNode, ...options }: AttachFlags): AttachOptions {
  return { ...options, directIO, createNode: createNode ? 'auto' : false }
}

/** Released only when the path has been written: nobody must be left with a device whose name was never told. */
export async function attachAction(file: string, flags: AttachFlags): Promise<void> {
  await interruptible(async (signal) => {
    const left = boundOf(flags.timeout, signal)
    const device = await attach(fileArgument(file), { ...attachOptions(flags), ...left() })
    try {
      printWarnings(device.warnings, flags.json)
      // Released it will have no autoclear any more.
      await (flags.json ? printJson({ ...(await device.status(left())), autoclear: false }) : print(`${device.path}\n`))
      signal.throwIfAborted()
      if (!device.owned) {
        note(`${device.path} was attached already and is shared: whoever attached it detaches it`, flags.json)
      }
      await device.release(left())
    } finally {
      await device[Symbol.asyncDispose]()
    }
  })
}

type RunFlags = AttachFlags & { mount?: true | string; options?: string }

export async function runAction(file: string, words: string[], flags: RunFlags): Promise<void> {
  const { mount, options, ...rest } = flags
  if (!process.argv.includes('--')) throw new UsageError("missing '--' before the command", HOW_TO_RUN)
  if (mount === undefined && options !== undefined) throw new UsageError('--options goes with --mount')
  // Loaded only here: node:child_process takes its time.
  const [{ runWithDevice }, { endAs }] = await Promise.all([import('./run.ts'), import('./child.ts')])
  const target = mount === undefined ? undefined : mount === true ? null : mount
  const { timeout } = rest
  endAs(await runWithDevice(file, { ...attachOptions(rest), timeout }, words, target, { options }, rest.json))
}

interface DetachFlags extends Common {
  lazy?: true
  unmount?: true
  file?: string
}

export async function detachAction(
  numbers: number[] = [],
  { json, file, timeout, ...options }: DetachFlags,
): Promise<void> {
  if (numbers.length === 0 && file === undefined) throw new UsageError('name devices, or a file with --file')
  if (numbers.length > 0 && file !== undefined) throw new UsageError('name devices or a file with --file, not both')
  await interruptible(async (signal) => {
    const refs: readonly DeviceRef[] =
      file === undefined ? numbers : await findTopmost(file, boundOf(timeout, signal), json)
    if (file !== undefined && refs.length === 0) {
      throw refusal('not-attached', 'ioctl', 'nothing is attached to it', {
        path: file,
        hint: '`loopctl list` shows what is attached',
      })
    }
    const results = []
    let status = 0
    // One that cannot be detached must not keep the others.
    for (const ref of refs) {
      const left = boundOf(timeout, signal)
      try {
        const device = await open(ref, left())
        const unmounted: string[] = []
        const onUnmount = (path: string) => {
          unmounted.push(path)
          if (!json) note(`unmounted ${path}`, json)
        }
        const result = await closing(device, json, () => device.detach({ ...options, onUnmount, ...left() }))
        results.push({ number: device.number, path: device.path, result, ...(options.unmount && { unmounted }) })
        // Of one that was named, the answer is a word.
        if (!json) await print(numbers.length === 1 ? `${result}\n` : `${device.path}: ${result}\n`)
      } catch (error) {
        status = report(error, json === true)
        if (signal.aborted) break
      }
    }
    if (json) await printJson(results)
    if (status !== 0) throw new Exit(status)
  })
}

/** Those attached to the file, and for the lower device of a stack the upper one, which holds it. */
async function findTopmost(file: string, left: () => Wait, json: true | undefined): Promise<LoopInfo[]> {
  const found = await findAttached(file, left, { json })
  // A device that does not answer is none of those that were found, which have.
  const lowers = await find({ reference: LOWER_TAG }, { unconfirmed: true, ...left() })
  const all = await list(left())
  return found.map((info) => {
    const isLower = lowers.some(({ number }) => number === info.number)
    return (isLower && all.find(({ lower }) => lower === info.number)) || info
  })
}

export async function statusAction(number: number, { json, timeout }: Common): Promise<void> {
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    const device = await open(number, left())
    const status = await closing(device, json, () => device.status(left()))
    return json ? printJson(status) : print(describeStatus(status))
  })
}

interface ChangeFlags extends Common {
  force?: true
  overlap?: 'refuse' | 'allow'
}

export async function changeAction(
  number: number,
  file: string,
  { json, ...options }: ChangeFlags & { verify?: true },
): Promise<void> {
  await interruptible(async (signal) => {
    const device = await open(number, { signal })
    await closing(device, json, async () => {
      await withProgress((onProgress) =>
        device.changeBackingFile(fileArgument(file), { ...options, signal, onProgress }),
      )
      if (json) await printJson(await device.status())
    })
  })
}

interface MigrateFlags extends ChangeFlags {
  verify: boolean
  sparse: boolean
  overwrite?: true
}

export async function migrateAction(
  number: number,
  destination: string,
  { json, ...options }: MigrateFlags,
): Promise<void> {
  await interruptible(async (signal) => {
    const device = await open(number, { signal })
    await closing(device, json, async () => {
      const result = await withProgress((onProgress) => device.migrate(destination, { ...options, signal, onProgress }))
      if (json) await printJson(result)
    })
  })
}

export async function resizeAction(
  number: number,
  wanted: number | undefined,
  { json, timeout, partition }: Common & { partition?: 'last' },
): Promise<void> {
  if (wanted === undefined && partition !== undefined) throw new UsageError('--partition goes with a new size')
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    const device = await open(number, left())
    const size = await closing(device, json, () =>
      wanted === undefined ? device.refreshCapacity(left()) : device.grow(wanted, { partition, ...left() }),
    )
    await (json ? printJson({ number: device.number, path: device.path, size }) : print(`${size}\n`))
  })
}

interface SetFlags extends Common {
  directIo?: boolean
  blockSize?: number
  offset?: number
  sizeLimit?: number
  autoclear?: boolean
  partscan?: true
  reference?: string
  overlap?: 'refuse' | 'allow'
}

export async function setAction(number: number, flags: SetFlags): Promise<void> {
  const { json, timeout, directIo, blockSize, overlap, ...change } = flags
  const changesStatus = Object.keys(change).length > 0
  if (!changesStatus && directIo === undefined && blockSize === undefined) {
    throw new UsageError('there is nothing to set', 'loopctl set --help shows what can be set')
  }
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    const device = await open(number, left())
    await closing(device, json, async () => {
      if (changesStatus) await device.setStatus(change, { overlap, ...left() })
      if (blockSize !== undefined) await device.setBlockSize(blockSize, left())
      if (directIo !== undefined) await device.setDirectIO(directIo, left())
      if (json) await printJson(await device.status(left()))
    })
  })
}

/** Ends with the reader too: it sees that at the next event. */
export async function watchAction({ json }: Pick<Common, 'json'>): Promise<void> {
  await interruptible(async (signal) => {
    const people = isForPeople(undefined)
    for await (const event of watch({ signal })) await (json ? printJson(event) : print(eventLine(event, people)))
  })
}

function eventLine(event: LoopEvent, people: boolean): string {
  if (event.type === 'resync') return `resync  ${event.cause}  ${event.devices.length} devices\n`
  const words = [event.type.padEnd('attach'.length), `/dev/loop${event.number}`]
  if (event.type !== 'remove')
    words.push(people ? humanSize(event.info.size) : String(event.info.size), fileOf(event.info))
  return `${words.join('  ')}\n`
}

export async function doctorAction({ json }: Pick<Common, 'json'>): Promise<void> {
  // It takes no signal, for it does not take long: interrupted, it still takes away what it has made.
  await interruptible(async (signal) => {
    const result = await doctor()
    signal.throwIfAborted()
    await (json ? printJson(result) : print(doctorTable(result)))
    if (!result.canAttach) throw new Exit(EXIT_FAILED)
  })
}

const MARKS = { ok: ['green', '✓'], warning: ['yellow', '!'], failure: ['red', '✗'] } as const

/** Each check on a line, and under it what to do. */
function doctorTable({ checks, canAttach }: DoctorReport): string {
  const width = Math.max(...checks.map(({ name }) => name.length))
  const lines = checks.flatMap(({ name, status, message, remedy }) => [
    `${mark(status)} ${name.padEnd(width)}  ${printable(translate(message))}`,
    remedy === undefined ? [] : `  ${' '.repeat(width)}  -> ${printable(translateHint(remedy))}`,
  ])
  return `${[...lines.flat(), '', `attaching ${canAttach ? 'works' : 'does not work'}`].join('\n')}\n`
}

/** In colour on a terminal: Node looks at that, and at NO_COLOR and FORCE_COLOR. */
function mark(status: keyof typeof MARKS): string {
  const [colour, sign] = MARKS[status]
  return styleText(colour, sign, { stream: process.stdout })
}
