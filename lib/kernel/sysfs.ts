/** /sys/block/loopN: what can be known of a device without opening it, and without privileges. */

import { constants } from 'node:os'
import {
  close,
  existsSync,
  O_WRONLY,
  open,
  readDirectory,
  readDirectorySync,
  readFile,
  readFileSync,
  statSync,
  writeAt,
} from './files.ts'
import { binding } from './binding.ts'
import { little } from './uapi.ts'

const { EMFILE, ENAMETOOLONG, ENFILE, ENOMEM } = constants.errno

const BLOCK = '/sys/block'

/** Numbers of all loop devices there are, attached or not, in order; or the negative errno. */
export async function readNumbers(): Promise<number[] | number> {
  return numbersOf(await readDirectory(BLOCK))
}

export function readNumbersSync(): number[] | number {
  return numbersOf(readDirectorySync(BLOCK))
}

function numbersOf(names: string[] | number): number[] | number {
  if (typeof names === 'number') return names
  return names
    .map((name) => /^loop(\d+)$/.exec(name)?.[1])
    .filter((digits) => digits !== undefined)
    .map(Number)
    .toSorted((a, b) => a - b)
}

/** Has the kernel tell udev of the device once more. Nothing comes of it where sysfs cannot be written. */
export async function announce(number: number): Promise<void> {
  const fd = await open(`${BLOCK}/loop${number}/uevent`, O_WRONLY)
  if (fd < 0) return
  const change = Buffer.from('change')
  await writeAt(fd, change, change.length, 0)
  await close(fd)
}

/** Errors that say that this process lacks something, and nothing of the device. */
export const LACKING: ReadonlySet<number> = new Set([-EMFILE, -ENFILE, -ENOMEM])

/** How many uevents the kernel has sent: an attach is one of them (K9: not from 5.18 to 6.14). */
export function readUeventCount(): number | undefined {
  return optionalNumber(readFileSync('/sys/kernel/uevent_seqnum'))
}

/** The disk sequence number; undefined before kernel 5.15, or where there is no such device. */
export function readDiskSeqSync(number: number): number | undefined {
  return optionalNumber(readFileSync(`${deviceDirectory(number)}/diskseq`))
}

/** The path of the backing file; undefined where there is none to be read. */
export async function readBackingFile(number: number): Promise<string | undefined> {
  return backingFileOf(await readFile(`${deviceDirectory(number)}/loop/backing_file`)) ?? undefined
}

/** A partition as the kernel has it. */
export interface KnownPartition {
  /** The M of /dev/loopNpM. */
  number: number
  /** `/dev/loopNpM`, whether there is such a node or not. */
  path: string
  /** `major:minor`, which has nothing to do with the device's. */
  device: string
  /** Where it begins in the device, and how long it is, in bytes. */
  start: number
  size: number
  readOnly: boolean
}

/** The partitions of a device, by number. Read at once: they can vanish between two looks. */
export function readPartitions(number: number): KnownPartition[] {
  const directory = deviceDirectory(number)
  const names = readDirectorySync(directory)
  if (typeof names === 'number') return []
  const own = names.filter((name) => name.startsWith(`loop${number}p`))
  if (own.length === 0) return []
  const directories = own.map((name) => `${directory}/${name}`)
  const files = readAttributesSync(directories, PARTITION_FILES)
  return own
    .flatMap((name, i) => toPartition(name, files.slice(i * PARTITION_FILES.length)))
    .toSorted((a, b) => a.number - b.number)
}

const PARTITION_FILES = ['dev', 'partition', 'start', 'size', 'ro']

function toPartition(
  name: string,
  [device, index, start, size, ro]: readonly (string | undefined)[],
): KnownPartition | [] {
  if (device === undefined || index === undefined || start === undefined || size === undefined) return []
  return {
    number: Number(index),
    path: `/dev/${name}`,
    device,
    start: Number(start) * 512,
    size: Number(size) * 512,
    readOnly: ro === '1',
  }
}

/** The files of these names in each of the directories, in one call; undefined where one cannot be read. */
function readAttributesSync(directories: readonly string[], names: readonly string[]): (string | undefined)[] {
  const answers = decodeTexts(binding().sysfsReadSync(encodeList(directories), encodeList(names)))
  return answers.map((answer) => (typeof answer === 'number' ? undefined : answer.trimEnd()))
}

/** What the addon's sysfsRead answers, in the order in which it was asked: each text as latin1, or -errno. */
export function decodeTexts(bytes: Buffer): (string | number)[] {
  const lengths = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  // Once for all: a conversion for each of thousands of files costs more than to read them.
  const all = bytes.toString('latin1')
  const answers: (string | number)[] = []
  for (let at = 0; at < bytes.length;) {
    const length = lengths.getInt32(at, little)
    at += 4
    answers.push(length < 0 ? length : all.slice(at, at + length))
    at += Math.max(0, length)
  }
  return answers
}

/** Texts that each end in a NUL, as the addon takes them. */
export function encodeList(texts: readonly string[]): Uint8Array {
  return Buffer.from(texts.map((value) => `${value}\0`).join(''))
}

/** Links of the directory of a device without partitions, attached and free: every directory in it is one. */
const links: Record<'attached' | 'free', number | undefined> = { attached: undefined, free: undefined }

/** Links of the directory of a device without partitions; undefined where none such has been seen yet. */
export function linksWithoutPartitions(of: 'attached' | 'free'): number | undefined {
  return links[of]
}

/** Whether the device has partitions: to be asked at every attach and detach, so mostly by two stat(). */
export function hasPartitions(number: number): boolean {
  const before = lookAtLinks(number)
  if (before === undefined || before.nlink === links[before.state]) return false
  const names = readDirectorySync(deviceDirectory(number))
  const found = typeof names !== 'number' && names.some((name) => name.startsWith(`loop${number}p`))
  // Attached or detached meanwhile, the links would be those of the other state: it is learnt where two looks agree.
  const after = lookAtLinks(number)
  if (!found && after?.state === before.state && after.nlink === before.nlink) links[before.state] = before.nlink
  return found
}

function lookAtLinks(number: number): { state: 'attached' | 'free'; nlink: number } | undefined {
  const bound = isBound(number)
  const directory = statSync(deviceDirectory(number))
  if (typeof directory === 'number' || bound !== isBound(number)) return undefined
  return { state: bound ? 'attached' : 'free', nlink: Number(directory.nlink) }
}

/** Where a block device lies: a partition on its disk, a whole device on itself. */
export interface OnDisk {
  /** `major:minor` of the disk. */
  disk: string
  /** Bytes. */
  start: bigint
  size: bigint
}

/** By the `major:minor` of the device; undefined where sysfs does not show it. */
export function readPlaceOnDisk(device: string): OnDisk | undefined {
  const directory = `/sys/dev/block/${device}`
  const sectors = optionalText(`${directory}/size`)
  if (sectors === undefined) return undefined
  const size = BigInt(sectors) * 512n
  if (!existsSync(`${directory}/partition`)) return { disk: device, start: 0n, size }
  const [disk, start] = [optionalText(`${directory}/../dev`), optionalText(`${directory}/start`)]
  return disk === undefined || start === undefined ? undefined : { disk, start: BigInt(start) * 512n, size }
}

/** Names of the block devices (dm-0, md127) that are built on the device or, where named, on its partition. */
export async function readHolderNames(number: number, name: string): Promise<string[]> {
  const partition = name === `loop${number}` ? '' : `/${name}`
  const names = await readDirectory(`${deviceDirectory(number)}${partition}/holders`)
  return typeof names === 'number' ? [] : names
}

/** Bytes of any block device, by its `major:minor`; 0 where it cannot be read. */
export async function readBlockDeviceSize(device: string): Promise<bigint> {
  const sectors = text(await readFile(`/sys/dev/block/${device}/size`))
  return sectors === undefined ? 0n : BigInt(sectors) * 512n
}

export function readBlockDeviceSizeSync(device: string): bigint {
  const sectors = optionalText(`/sys/dev/block/${device}/size`)
  return sectors === undefined ? 0n : BigInt(sectors) * 512n
}

/** Logical block size of any block device or partition, by its `major:minor`. */
export function readBlockSizeSync(device: string): number | undefined {
  const directory = `/sys/dev/block/${device}`
  return optionalNumber(
    readFileSync(`${directory}${existsSync(`${directory}/partition`) ? '/..' : ''}/queue/logical_block_size`),
  )
}

/** Block devices that have bytes of this one: itself, its disk, its partitions. By `major:minor`, with their names. */
export function readSharingDevices(device: string): ReadonlyMap<string, string> {
  const directory = `/sys/dev/block/${device}`
  const found = new Map<string, string>()
  const add = (path: string): void => {
    const [numbers, name] = [optionalText(`${path}/dev`), optionalText(`${path}/uevent`)]
    if (numbers !== undefined) found.set(numbers, `/dev/${/^DEVNAME=(.*)$/m.exec(name ?? '')?.[1] ?? numbers}`)
  }
  add(directory)
  if (existsSync(`${directory}/partition`)) add(`${directory}/..`)
  else {
    const names = readDirectorySync(directory)
    if (typeof names === 'number') return found
    for (const name of names) if (existsSync(`${directory}/${name}/partition`)) add(`${directory}/${name}`)
  }
  return found
}

/** Whether the kernel refuses writes to a block device or partition, as BLKROGET tells. */
export function isReadOnlySync(device: string): boolean {
  const directory = `/sys/dev/block/${device}`
  const whole = existsSync(`${directory}/partition`) ? optionalText(`${directory}/../ro`) : undefined
  return optionalText(`${directory}/ro`) === '1' || whole === '1'
}

/** Bytes that the device shows. */
export function readSizeSync(number: number): bigint | undefined {
  const sectors = optionalText(`${deviceDirectory(number)}/size`)
  return sectors === undefined ? undefined : BigInt(sectors) * 512n
}

export function readOffsetSync(number: number): bigint | undefined {
  const bytes = optionalText(`${deviceDirectory(number)}/loop/offset`)
  return bytes === undefined ? undefined : BigInt(bytes)
}

export function readSizeLimitSync(number: number): bigint | undefined {
  const bytes = optionalText(`${deviceDirectory(number)}/loop/sizelimit`)
  return bytes === undefined ? undefined : BigInt(bytes)
}

/** LO_FLAGS_AUTOCLEAR; undefined where it cannot be read. */
export function readAutoclearSync(number: number): boolean | undefined {
  const answer = binding().sysfsAutoclearSync(number)
  return answer < 0 ? undefined : answer === 1
}

/** LO_FLAGS_PARTSCAN. */
export function isScannedSync(number: number): boolean {
  return optionalText(`${deviceDirectory(number)}/loop/partscan`) === '1'
}

/** Whether it is attached, and goes with its last user. */
export function isAutoclearSync(number: number): boolean {
  return optionalText(`${deviceDirectory(number)}/loop/autoclear`) === '1'
}

export function partitionExists(number: number, partition: number): boolean {
  return existsSync(`${deviceDirectory(number)}/loop${number}p${partition}`)
}

/** Whether the kernel has loop-control, and so the driver. */
export function isControlThere(): boolean {
  return existsSync('/sys/class/misc/loop-control')
}

/** Whether sysfs is where it belongs. */
export function isMounted(): boolean {
  return existsSync(BLOCK)
}

/** Whether the kernel has a device of that number, attached or not. */
export function deviceExists(number: number): boolean {
  return existsSync(deviceDirectory(number))
}

/** Whether it is attached; true also while a detach is under way, until the last user has closed it. */
export function isBound(number: number): boolean {
  return existsSync(`${deviceDirectory(number)}/loop`)
}

/** `major:minor` of the whole device. */
export function readDeviceNumbers(number: number): string | undefined {
  return text(readFileSync(`${deviceDirectory(number)}/dev`))
}

/** The path of the backing file, without waiting; undefined where there is none to be read. */
export function readBackingFileSync(number: number): string | undefined {
  return backingFileOf(readFileSync(`${deviceDirectory(number)}/loop/backing_file`)) ?? undefined
}

export function deviceDirectory(number: number): string {
  return `${BLOCK}/loop${number}`
}

function text(value: Buffer | number | undefined): string | undefined {
  return value instanceof Buffer ? value.toString().trimEnd() : undefined
}

function optionalText(path: string): string | undefined {
  return text(readFileSync(path))
}

function optionalNumber(value: Buffer | number): number | undefined {
  const digits = text(value)
  return digits === undefined ? undefined : Number(digits)
}

/** Bytes that the addon reads of an attribute of a device; and where it is to be short, as most paths are. */
export const ATTRIBUTE_SIZE: number = 4_096
export const SHORT_SIZE: number = 256

export function newAttribute(): Buffer {
  return Buffer.alloc(ATTRIBUTE_SIZE)
}

/** Of the attribute and its length: undefined where it could not be read, null where it is too long to be told. */
export function decodeBackingFile(bytes: Buffer, length: number | undefined): string | null | undefined {
  // As long as there is room for: there may be more, where pages are larger.
  if (length === -ENAMETOOLONG || length === bytes.length) return null
  return length === undefined || length < 0 ? undefined : (backingFileOf(bytes.subarray(0, length)) ?? undefined)
}

/** Exactly one newline is the kernel's; any other character may be part of the name. An empty file: detaching. */
export function backingFileOf(value: Buffer | number | undefined): string | null | undefined {
  if (value === -ENAMETOOLONG) return undefined
  if (!(value instanceof Buffer) || value.length === 0) return null
  return value.toString('utf8', 0, value.at(-1) === 0x0a ? value.length - 1 : value.length)
}
