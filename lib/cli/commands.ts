/** The command's words, and what each of them does. */

import { createRequire } from 'node:module'
import { styleText } from 'node:util'
import { Command, InvalidArgumentError, Option } from 'commander'
import type { AttachOptions } from '../attach.ts'
import { LoopControl } from '../control.ts'
import { attach, type LoopDevice, open } from '../device.ts'
import { doctor, type DoctorReport } from '../doctor.ts'
import { find, list, type LoopInfo } from '../list.ts'
import type { DeviceRef } from '../open.ts'
import { LOWER_TAG } from '../stack.ts'
import { type LoopEvent, watch } from '../watch.ts'
import { bashCompletion } from './completion.ts'
import { withProgress } from './progress.ts'
import { runWithDevice } from './run.ts'
import {
  Exit,
  EXIT_FAILED,
  interruptible,
  parseDevice,
  parseDevices,
  parseSize,
  parseSwitch,
  parseWholeNumber,
  isBrokenPipe,
  print,
  printable,
  printJson,
  report,
  table,
} from './terminal.ts'

const { version } = createRequire(import.meta.url)('../../package.json') as { version: string }

interface Json {
  json?: true
}

export function makeProgram(): Command {
  const program = new Command('loopctl')
    .description('Linux loop devices: a file becomes a block device')
    .version(version)
    .exitOverride()
    .showHelpAfterError('(loopctl --help tells the usage)')
    .addHelpText('after', () => `\n${NOTES.map(([title, text]) => `${title}: ${text}`).join('\n')}`)

  withAttachOptions(command(program, 'attach', 'attach a file, and print the device'))
    .argument('<file>', FILE)
    .action(attachAction)
  withAttachOptions(
    command(program, 'run', 'attach a file for as long as a command runs, with the device in LOOP_DEVICE'),
  )
    .usage('[options] <file> -- <command...>')
    .argument('<file>', FILE)
    .argument('<command...>', 'what to run; signals and the exit status are passed on')
    .action(runAction)
  command(program, 'detach', 'detach, and tell whether it happened')
    .argument('[devices...]', DEVICE, parseDevices)
    .option('--lazy', 'where it is in use, leave it to the kernel to detach it after that')
    .option('--timeout <ms>', 'how long to wait for what passes by itself (default: 5000)', parseWholeNumber)
    .option('--file <file>', 'the devices attached to this file')
    .action(detachAction)
  command(program, 'list', 'the attached devices')
    .argument('[file]', 'only those attached to this file')
    .option('--all', 'the free devices too')
    .action(listAction)
  command(program, 'status', 'everything about one attached device')
    .argument('<device>', DEVICE, parseDevice)
    .action(statusAction)
  command(program, 'change', 'another backing file of the same content, for a read-only device')
    .argument('<device>', DEVICE, parseDevice)
    .argument('<file>', FILE)
    .option('--verify', 'compare the contents first')
    .option('--force', 'even under a mounted filesystem, which the kernel may shut down')
    .action(changeAction)
  command(program, 'migrate', 'move the backing file to another place, under the running system')
    .argument('<device>', DEVICE, parseDevice)
    .argument('<destination>', 'where the copy goes: a file that does not exist')
    .option('--no-verify', 'do not read the copy back and compare it')
    .option('--no-sparse', 'write zeros where there are holes')
    .option('--overwrite', 'replace a file that is there')
    .option('--force', 'even under a mounted filesystem, which the kernel may shut down')
    .action(migrateAction)
  command(program, 'resize', 'take over the new size of the backing file, and print it')
    .argument('<device>', DEVICE, parseDevice)
    .action(resizeAction)
  command(program, 'set', 'change settings of an attached device')
    .argument('<device>', DEVICE, parseDevice)
    .option('--direct-io <on|off>', 'bypass the page cache for the backing file', parseSwitch)
    .option('--block-size <bytes>', 'logical block size', parseSize)
    .option('--offset <bytes>', 'where in the file the device begins', parseSize)
    .option('--size-limit <bytes>', 'how much of the file it shows at most; 0: all', parseSize)
    .option('--autoclear <on|off>', 'detach when the last user closes it', parseSwitch)
    .option('--partscan', 'let the kernel look for partitions')
    .option('--reference <tag>', 'a tag of at most 63 bytes')
    .action(setAction)
  command(program, 'partitions', 'the partitions of an attached device')
    .argument('<device>', DEVICE, parseDevice)
    .option('--rescan', 'look for them again first')
    .action(partitionsAction)
  command(program, 'add', 'make a device, and print it')
    .argument('[device]', `${DEVICE}; without it the next unused one`, parseDevice)
    .action(addAction)
  command(program, 'remove', 'remove free devices').argument('<devices...>', DEVICE, parseDevices).action(removeAction)
  command(program, 'free', 'print a free device; nothing is reserved').action(freeAction)
  command(program, 'watch', 'what happens to the devices, a line each, until Ctrl-C').action(watchAction)
  command(program, 'doctor', 'whether attaching works here, and what stands in its way').action(doctorAction)
  program
    .command('completion')
    .description('print the completion script for bash')
    .action(() => print(bashCompletion(program)))
  return program
}

/** What holds for every command: below the help, and in the manual page. */
export const NOTES = [
  ['Devices', '7, loop7 or /dev/loop7.'],
  ['Sizes', 'bytes, or with a unit: 1M and 1MiB are 1024 * 1024, 1MB is 1000 * 1000.'],
  ['Exit status', '0 done, 1 failed, 2 wrong usage, 130 interrupted, after undoing; of run that of its command.'],
  ['Environment', 'Colours are for terminals; NO_COLOR=1 turns them off, FORCE_COLOR=1 on.'],
] as const

const FILE = 'an image, or any file or block device'
const DEVICE = '7, loop7 or /dev/loop7'

function command(program: Command, name: string, description: string): Command {
  return program.command(name).description(description).option('--json', 'print JSON, also of an error')
}

function withAttachOptions(target: Command): Command {
  return target
    .option('-r, --read-only', 'attach read-only')
    .option('-o, --offset <bytes>', 'where in the file the device begins', parseSize)
    .option('-s, --size-limit <bytes>', 'how much of the file it shows at most', parseSize)
    .option('-b, --block-size <bytes|auto>', 'logical block size; auto: that of the image’s GPT', parseBlockSize)
    .addOption(
      new Option('--direct-io [=prefer]', 'bypass the page cache for the file; prefer: where it can be').argParser(
        parseDirectIO,
      ),
    )
    .addOption(
      new Option(
        '-P, --partscan [=user]',
        'look for partitions; user: where the kernel cannot read the table',
      ).argParser(parsePartscan),
    )
    .option('--no-create-node', 'do not make a node that is missing in /dev')
    .option('-n, --number <n>', 'this device, made if there is none', parseDevice)
    .addOption(
      new Option('--overlap <mode>', 'what about other attachments of the same bytes').choices([
        'refuse',
        'allow',
        'reuse',
      ]),
    )
    .option('--reference <tag>', 'a tag of at most 63 bytes')
    .option('--swappable', 'a stack of two, so that change and migrate spare a mounted ext4 or xfs; needs --read-only')
}

function parseDirectIO(text: string): true | 'prefer' {
  if (text === 'true') return true
  if (text === 'prefer') return text
  throw new InvalidArgumentError('With a value it is --direct-io=prefer.')
}

function parsePartscan(text: string): true | 'user' {
  if (text === 'true') return true
  if (text === 'user') return text
  throw new InvalidArgumentError('With a value it is --partscan=user.')
}

function parseBlockSize(text: string): number | 'auto' {
  return text === 'auto' ? text : parseSize(text)
}

type AttachFlags = Json & { directIo?: true | 'prefer'; createNode: boolean } & Omit<
    AttachOptions,
    'directIO' | 'createNode'
  >

function attachOptions({ json, directIo: directIO, createNode, ...options }: AttachFlags): AttachOptions {
  return { ...options, directIO, createNode: createNode ? 'auto' : false }
}

/** Released only when the path has been written: nobody must be left with a device whose name was never told. */
async function attachAction(file: string, flags: AttachFlags): Promise<void> {
  await interruptible(async (signal) => {
    const device = await attach(file, { ...attachOptions(flags), signal })
    try {
      // Released it will have no autoclear any more.
      await (flags.json ? printJson({ ...(await device.status()), autoclear: false }) : print(`${device.path}\n`))
      signal.throwIfAborted()
      await device.release()
    } finally {
      await device[Symbol.asyncDispose]()
    }
  })
}

async function runAction(file: string, words: string[], flags: AttachFlags): Promise<void> {
  process.exitCode = await runWithDevice(file, attachOptions(flags), words)
}

interface DetachFlags extends Json {
  lazy?: true
  timeout?: number
  file?: string
}

async function detachAction(
  numbers: number[] = [],
  { json, file, ...options }: DetachFlags,
  self: Command,
): Promise<void> {
  if ((numbers.length === 0) === (file === undefined)) self.error('error: name devices, or a file with --file')
  const refs: readonly DeviceRef[] = file === undefined ? numbers : await findTopmost(file)
  await interruptible(async (signal) => {
    const results = []
    let status = 0
    // One that cannot be detached must not keep the others.
    for (const ref of refs) {
      try {
        const device = await open(ref, { signal })
        const result = await closing(device, () => device.detach({ ...options, signal }))
        results.push({ number: device.number, path: device.path, result })
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
  const [found, lowers, all] = [await find(file), await find({ reference: LOWER_TAG }), await list()]
  return found.map((info) => {
    const isLower = lowers.some(({ number }) => number === info.number)
    return (isLower && all.find(({ lower }) => lower === info.number)) || info
  })
}

async function listAction(file: string | undefined, { json, all }: Json & { all?: true }): Promise<void> {
  const infos = file === undefined ? await list({ all }) : await find(file)
  if (json) return printJson(infos)
  if (infos.length > 0) await print(listTable(infos))
}

/** Of a device on top of another the real file is said too. */
function listTable(infos: LoopInfo[]): string {
  const head = ['DEVICE', 'SIZE', 'OFFSET', 'LIMIT', 'BLOCK', 'FLAGS', 'BACKING FILE']
  return table(
    head,
    infos.map((info) => [
      info.path,
      info.size,
      info.offset,
      info.sizeLimit,
      info.blockSize,
      flagsOf(info),
      fileOf(info) + fileBelow(info, infos),
    ]),
  )
}

function flagsOf({ readOnly, autoclear, partscan, directIO }: LoopInfo): string {
  const flags = [
    readOnly && 'read-only',
    autoclear && 'autoclear',
    partscan && 'partscan',
    directIO && 'direct-io',
  ].filter((flag) => flag !== false)
  return flags.join(',') || '-'
}

function fileBelow({ lower }: LoopInfo, infos: LoopInfo[]): string {
  const below = infos.find(({ number }) => number === lower)
  return below === undefined ? '' : ` -> ${fileOf(below)}${fileBelow(below, infos)}`
}

function fileOf({ attached, backingFile, backingDeleted }: LoopInfo): string {
  if (!attached) return '-'
  return `${printable(backingFile ?? '?')}${backingDeleted ? ' (deleted)' : ''}`
}

async function statusAction(number: number, { json }: Json): Promise<void> {
  const device = await open(number)
  const status = await closing(device, () => device.status())
  if (json) return printJson(status)
  await print(
    Object.entries(status)
      .map(([key, value]) => `${key}: ${printable(String(value ?? '-'))}\n`)
      .join(''),
  )
}

async function changeAction(
  number: number,
  file: string,
  { json, ...options }: Json & { verify?: true; force?: true },
): Promise<void> {
  await interruptible(async (signal) => {
    const device = await open(number, { signal })
    await closing(device, async () => {
      await withProgress((onProgress) => device.changeBackingFile(file, { ...options, signal, onProgress }))
      if (json) await printJson(await device.status())
    })
  })
}

interface MigrateFlags extends Json {
  verify: boolean
  sparse: boolean
  overwrite?: true
  force?: true
}

async function migrateAction(number: number, destination: string, { json, ...options }: MigrateFlags): Promise<void> {
  await interruptible(async (signal) => {
    const device = await open(number, { signal })
    await closing(device, async () => {
      const result = await withProgress((onProgress) => device.migrate(destination, { ...options, signal, onProgress }))
      if (json) await printJson(result)
    })
  })
}

async function resizeAction(number: number, { json }: Json): Promise<void> {
  const device = await open(number)
  const size = await closing(device, () => device.refreshCapacity())
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

async function setAction(number: number, flags: SetFlags, self: Command): Promise<void> {
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

async function partitionsAction(number: number, { json, rescan }: Json & { rescan?: true }): Promise<void> {
  await interruptible(async (signal) => {
    const device = await open(number, { signal })
    const partitions = await closing(device, () => (rescan ? device.rescanPartitions({ signal }) : device.partitions()))
    if (json) return printJson(partitions)
    if (partitions.length === 0) return
    const rows = partitions.map(({ path, start, size, type, typeName, label, bootable }) => {
      return [path, start, size, typeName ?? type ?? '-', printable(label ?? '-'), bootable ? 'bootable' : '-']
    })
    await print(table(['DEVICE', 'START', 'SIZE', 'TYPE', 'LABEL', 'FLAGS'], rows))
  })
}

async function addAction(number: number | undefined, { json }: Json): Promise<void> {
  await printDevice(await withControl((control) => control.add(number)), json)
}

async function removeAction(numbers: number[], { json }: Json): Promise<void> {
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

async function freeAction({ json }: Json): Promise<void> {
  await printDevice(await withControl((control) => control.getFree()), json)
}

/** Ends with the reader too: it sees that at the next event. */
async function watchAction({ json }: Json): Promise<void> {
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

async function doctorAction({ json }: Json): Promise<void> {
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
