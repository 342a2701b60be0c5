/** What the commands do, list apart. Loaded when one of them is run. */

import type { Command } from 'commander'
import { styleText } from 'node:util'
import type { AttachOptions } from '../attach/options.ts'
import { readPartitionTable } from '../attach/window.ts'
import { LoopControl } from '../control.ts'
import { attach, type LoopDevice, open } from '../device.ts'
import { doctor, type DoctorReport } from '../doctor/doctor.ts'
import { refusal } from '../errors/errors.ts'
import { LOWER_TAG } from '../handle/lower.ts'
import type { DeviceRef } from '../handle/open.ts'
import type { LoopEvent } from '../observe/events.ts'
import { find } from '../observe/find.ts'
import { list, type LoopInfo } from '../observe/list.ts'
import { watch } from '../observe/watch.ts'
import type { TablePartition } from '../partitions/disk.ts'
import type { Partition } from '../partitions/partitions.ts'
import { fileOf, findAttached } from './listing.ts'
import { withProgress } from './progress.ts'
import {
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

export { createAction, mountAction, umountAction } from './mount-actions.ts'

interface Json {
  json?: true
}

type AttachFlags = Json & { directIo?: true | 'prefer'; createNode: boolean } & Omit<
    AttachOptions,
    'directIO' | 'createNode'
  >

function attachOptions({ json, directIo: directIO, createNode, ...options }: AttachFlags): AttachOptions {
  return { ...options, directIO, createNode: createNode ? 'auto' : false }
}

/** Released only when the path has been written: nobody must be left with a device whose name was never told. */
export async function attachAction(file: string, flags: AttachFlags): Promise<void> {
  await interruptible(async (signal) => {
    const device = await attach(fileArgument(file), { ...attachOptions(flags), signal })
    try {
      if (!flags.json) printWarnings(device.warnings)
      // Released it will have no autoclear any more.
      await (flags.json ? printJson({ ...(await device.status()), autoclear: false }) : print(`${device.path}\n`))
      signal.throwIfAborted()
      if (!device.owned) {
        warn(`${device.path} was attached already and is shared: it goes when whoever attached it detaches it`)
      }
      await device.release()
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
  process.exitCode = await runWithDevice(file, attachOptions(rest), words, target, { options })
}

interface DetachFlags extends Json {
  lazy?: true
  unmount?: true
  timeout?: number
  file?: string
}

export async function detachAction(
  numbers: number[] = [],
  { json, file, ...options }: DetachFlags,
  self: Command,
): Promise<void> {
  if ((numbers.length === 0) === (file === undefined)) self.error('error: name devices, or a file with --file')
  const refs: readonly DeviceRef[] = file === undefined ? numbers : await findTopmost(file)
  if (file !== undefined && refs.length === 0) {
    throw refusal('not-attached', 'ioctl', 'nothing is attached to it', {
      path: file,
      hint: 'loopctl list shows what is attached',
    })
  }
  await interruptible(async (signal) => {
    const results = []
    let status = 0
    // One that cannot be detached must not keep the others.
    for (const ref of refs) {
      try {
        const device = await open(ref, { signal })
        const unmounted: string[] = []
        const onUnmount = (path: string) => {
          unmounted.push(path)
          if (!json) warn(`unmounted ${path}`)
        }
        const result = await closing(device, () => device.detach({ ...options, onUnmount, signal }))
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
async function findTopmost(file: string): Promise<LoopInfo[]> {
  const [found, lowers, all] = [await findAttached(file), await find({ reference: LOWER_TAG }), await list()]
  return found.map((info) => {
    const isLower = lowers.some(({ number }) => number === info.number)
    return (isLower && all.find(({ lower }) => lower === info.number)) || info
  })
}

export async function statusAction(number: number, { json }: Json): Promise<void> {
  const device = await open(number)
  const status = await closing(device, () => device.status())
  if (json) return printJson(status)
  const { warnings, ...fields } = status
  printWarnings(warnings)
  await print(
    Object.entries(fields)
      .map(([key, value]) => `${key}: ${printable(String(value ?? '-'))}\n`)
      .join(''),
  )
}

interface ChangeFlags extends Json {
  force?: true
  overlap?: 'refuse' | 'allow'
  timeout?: number
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
  { json, partition }: Json & { partition?: 'last' },
  self: Command,
): Promise<void> {
  if (wanted === undefined && partition !== undefined) self.error('error: --partition is for a new size')
  const device = await open(number)
  const size = await closing(device, () =>
    wanted === undefined ? device.refreshCapacity() : device.grow(wanted, { partition }),
  )
  await (json ? printJson({ number: device.number, path: device.path, size }) : print(`${size}\n`))
}

interface SetFlags extends Json {
  directIo?: boolean
  blockSize?: number
  offset?: number
  sizeLimit?: number
  autoclear?: boolean
  partscan?: true
  reference?: string
}

export async function setAction(number: number, flags: SetFlags, self: Command): Promise<void> {
  const { json, directIo, blockSize, ...change } = flags
  const changesStatus = Object.keys(change).length > 0
  if (!changesStatus && directIo === undefined && blockSize === undefined) self.error('error: nothing to set')
  const device = await open(number)
  await closing(device, async () => {
    if (changesStatus) await device.setStatus(change)
    if (blockSize !== undefined) await device.setBlockSize(blockSize)
    if (directIo !== undefined) await device.setDirectIO(directIo)
    if (json) await printJson(await device.status())
  })
}

export async function partitionsAction(
  what: number | string,
  { json, rescan }: Json & { rescan?: true },
  self: Command,
): Promise<void> {
  if (typeof what === 'string' && rescan) self.error('error: --rescan is for a device, not for a file')
  await interruptible(async (signal) => {
    if (typeof what === 'string') {
      const found = await readPartitionTable(fileArgument(what), { signal })
      if (json) return printJson(found)
      printWarnings(found.warnings)
      return printPartitions('NUMBER', found.partitions)
    }
    const device = await open(what, { signal })
    const partitions = await closing(device, () => (rescan ? device.rescanPartitions({ signal }) : device.partitions()))
    if (json) return printJson(partitions)
    printWarnings(device.warnings)
    return printPartitions('DEVICE', partitions)
  })
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

export async function addAction(number: number | undefined, { json }: Json): Promise<void> {
  await printDevice(await withControl((control) => control.add(number)), json)
}

export async function removeAction(numbers: number[], { json }: Json): Promise<void> {
  await interruptible((signal) =>
    withControl(async (control) => {
      const removed: number[] = []
      let status = 0
      for (const number of numbers) {
        try {
          removed.push(await control.remove(number, { signal }))
        } catch (error) {
          status = report(error, json === true)
          if (signal.aborted) break
        }
      }
      if (json) await printJson(removed.map((number) => ({ number, path: `/dev/loop${number}` })))
      if (status !== 0) throw new Exit(status)
    }),
  )
}

export async function freeAction({ json }: Json): Promise<void> {
  await printDevice(await withControl((control) => control.getFree()), json)
}

/** Ends with the reader too: it sees that at the next event. */
export async function watchAction({ json }: Json): Promise<void> {
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

export async function doctorAction({ json }: Json): Promise<void> {
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

function printDevice(number: number, json: true | undefined): Promise<void> {
  const path = `/dev/loop${number}`
  return json ? printJson({ number, path }) : print(`${path}\n`)
}

async function withControl<T>(operation: (control: LoopControl) => Promise<T>): Promise<T> {
  const control = await LoopControl.open()
  try {
    return await operation(control)
  } finally {
    await control.close()
  }
}

async function closing<T>(device: LoopDevice, operation: () => Promise<T>): Promise<T> {
  try {
    return await operation()
  } finally {
    await device.close()
  }
}
