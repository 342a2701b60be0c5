/** What the commands do, list apart. Loaded when one of them is run. */

import type { Command } from 'commander'
import { styleText } from 'node:util'
import type { AttachOptions } from '../attach/options.ts'
import { readPartitionTable } from '../attach/window.ts'
import { checkDeadline, LOOKING, type Wait } from '../common/deadline.ts'
import { attach, type LoopDevice, open } from '../device.ts'
import { doctor, type DoctorReport } from '../doctor/doctor.ts'
import { refusal } from '../errors/errors.ts'
import { explained } from '../errors/given-up.ts'
import { LOWER_TAG } from '../handle/lower.ts'
import type { DeviceRef } from '../handle/open.ts'
import { numberOfNode } from '../kernel/devnode.ts'
import type { LoopEvent } from '../observe/events.ts'
import { find } from '../observe/find.ts'
import { list, type LoopInfo } from '../observe/list.ts'
import { watch } from '../observe/watch.ts'
import type { TablePartition } from '../partitions/disk.ts'
import type { Partition } from '../partitions/partitions.ts'
import { fileOf, findAttached } from './listing.ts'
import { withProgress } from './progress.ts'
import {
  boundOf,
  type Common,
  Exit,
  EXIT_FAILED,
  fileArgument,
  interruptible,
  isBrokenPipe,
  print,
  printable,
  printJson,
  printWarnings,
  report,
  table,
  warn,
} from './terminal.ts'

export { addAction, freeAction, removeAction } from './control-actions.ts'
export { createAction, mountAction, umountAction } from './mount-actions.ts'

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
      if (!flags.json) printWarnings(device.warnings)
      // Released it will have no autoclear any more.
      await (flags.json ? printJson({ ...(await device.status(left())), autoclear: false }) : print(`${device.path}\n`))
      signal.throwIfAborted()
      if (!device.owned) {
        warn(`${device.path} was attached already and is shared: it goes when whoever attached it detaches it`)
      }
      await device.release(left())
    } finally {
      await device[Symbol.asyncDispose]()
    }
  })
}

type RunFlags = AttachFlags & { mount?: true | string; options?: string }

export async function runAction(file: string, words: string[], flags: RunFlags, self: Command): Promise<void> {
  const { mount, options, ...rest } = flags
  if (mount === undefined && options !== undefined) self.error('error: --options is for --mount')
  // Loaded only here: node:child_process takes its time.
  const { runWithDevice } = await import('./run.ts')
  const target = mount === undefined ? undefined : mount === true ? null : mount
  const { timeout } = rest
  process.exitCode = await runWithDevice(file, { ...attachOptions(rest), timeout }, words, target, { options })
}

interface DetachFlags extends Common {
  lazy?: true
  unmount?: true
  file?: string
}

export async function detachAction(
  numbers: number[] = [],
  { json, file, timeout, ...options }: DetachFlags,
  self: Command,
): Promise<void> {
  if ((numbers.length === 0) === (file === undefined)) self.error('error: name devices, or a file with --file')
  await interruptible(async (signal) => {
    const refs: readonly DeviceRef[] = file === undefined ? numbers : await findTopmost(file, boundOf(timeout, signal))
    if (file !== undefined && refs.length === 0) {
      throw refusal('not-attached', 'ioctl', 'nothing is attached to it', {
        path: file,
        hint: 'loopctl list shows what is attached',
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
          if (!json) warn(`unmounted ${path}`)
        }
        const result = await closing(device, () => device.detach({ ...options, onUnmount, ...left() }))
        results.push({ number: device.number, path: device.path, result, ...(options.unmount && { unmounted }) })
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
async function findTopmost(file: string, left: () => Wait): Promise<LoopInfo[]> {
  const found = await findAttached(file, left)
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
    const status = await closing(device, () => device.status(left()))
    if (json) return printJson(status)
    const { warnings, ...fields } = status
    printWarnings(warnings)
    const lines = Object.entries(fields).map(([key, value]) => `${key}: ${printable(String(value ?? '-'))}\n`)
    return print(lines.join(''))
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
    await closing(device, async () => {
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
    await closing(device, async () => {
      const result = await withProgress((onProgress) => device.migrate(destination, { ...options, signal, onProgress }))
      if (json) await printJson(result)
    })
  })
}

export async function resizeAction(
  number: number,
  wanted: number | undefined,
  { json, timeout, partition }: Common & { partition?: 'last' },
  self: Command,
): Promise<void> {
  if (wanted === undefined && partition !== undefined) self.error('error: --partition is for a new size')
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    const device = await open(number, left())
    const size = await closing(device, () =>
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
}

export async function setAction(number: number, flags: SetFlags, self: Command): Promise<void> {
  const { json, timeout, directIo, blockSize, ...change } = flags
  const changesStatus = Object.keys(change).length > 0
  if (!changesStatus && directIo === undefined && blockSize === undefined) self.error('error: nothing to set')
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    const device = await open(number, left())
    await closing(device, async () => {
      if (changesStatus) await device.setStatus(change, left())
      if (blockSize !== undefined) await device.setBlockSize(blockSize, left())
      if (directIo !== undefined) await device.setDirectIO(directIo, left())
      if (json) await printJson(await device.status(left()))
    })
  })
}

export async function partitionsAction(
  named: number | string,
  { json, timeout, rescan }: Common & { rescan?: true },
  self: Command,
): Promise<void> {
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    const what = typeof named === 'number' ? named : await deviceOrFile(named, left)
    if (typeof what === 'string' && rescan) self.error('error: --rescan is for a device, not for a file')
    if (typeof what === 'string') {
      const found = await readPartitionTable(fileArgument(what), left())
      if (json) return printJson(found)
      printWarnings(found.warnings)
      return printPartitions('NUMBER', found.partitions)
    }
    const device = await open(what, left())
    const partitions = await closing(device, () =>
      rescan ? device.rescanPartitions(left()) : device.partitions(left()),
    )
    if (json) return printJson(partitions)
    printWarnings(device.warnings)
    return printPartitions('DEVICE', partitions)
  })
}

/** A link to a device is that device; every other path is a file. */
async function deviceOrFile(path: string, left: () => Wait): Promise<number | string> {
  const { bound } = checkDeadline(left(), LOOKING)
  const found = await explained(() => numberOfNode(path, bound), path)
  return typeof found === 'number' ? found : path
}

async function printPartitions(title: string, partitions: readonly (Partition | TablePartition)[]): Promise<void> {
  if (partitions.length === 0) return
  const rows = partitions.map((partition) => {
    const { number, start, size, type, typeName, label, bootable } = partition
    const name = 'path' in partition ? partition.path : number
    return [name, start, size, typeName ?? type ?? '-', printable(label ?? '-'), bootable ? 'bootable' : '-']
  })
  await print(table([title, 'START', 'SIZE', 'TYPE', 'LABEL', 'FLAGS'], rows))
}

/** Ends with the reader too: it sees that at the next event. */
export async function watchAction({ json }: Pick<Common, 'json'>): Promise<void> {
  await interruptible(async (signal) => {
    try {
      for await (const event of watch({ signal })) await (json ? printJson(event) : print(eventLine(event)))
    } catch (error) {
      if (!isBrokenPipe(error)) throw error
    }
  })
}

function eventLine(event: LoopEvent): string {
  if (event.type === 'resync') return `resync  ${event.cause}  ${event.devices.length} devices\n`
  const words = [event.type.padEnd('attach'.length), `/dev/loop${event.number}`]
  if (event.type !== 'remove') words.push(`${event.info.size}`, fileOf(event.info))
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
    `${mark(status)} ${name.padEnd(width)}  ${printable(message)}`,
    remedy === undefined ? [] : `  ${' '.repeat(width)}  -> ${printable(remedy)}`,
  ])
  return `${[...lines.flat(), '', `attaching ${canAttach ? 'works' : 'does not work'}`].join('\n')}\n`
}

/** In colour on a terminal: Node looks at that, and at NO_COLOR and FORCE_COLOR. */
function mark(status: keyof typeof MARKS): string {
  const [colour, sign] = MARKS[status]
  return styleText(colour, sign, { stream: process.stdout })
}

/** Milliseconds for the end of a handle whose operation was given up on: the end of this process is its end too. */
const CLOSING_MS = 100

async function closing<T>(device: LoopDevice, operation: () => Promise<T>): Promise<T> {
  try {
    return await operation()
  } finally {
    await device.close({ timeout: CLOSING_MS })
  }
}
