/** From an image to its files in one call: attach, find the filesystem, mount; and back in one. */

import { attachPlainOrStack } from '../attach/stack.ts'
import { type Backing, openBacking } from '../attach/backing.ts'
import { type AttachOptions, checkWanted, OPTION_NAMES } from '../attach/options.ts'
import { type BackingFile, checkBackingFile, checkOptions, type FileArgument, wrongValue } from '../common/arguments.ts'
import { CHANGING, checkDeadline, type Deadline } from '../common/deadline.ts'
import { dispose } from '../detach/dispose.ts'
import { assertSupported, refusal } from '../errors/errors.ts'
import { fromCaller } from '../errors/from-caller.ts'
import { explained } from '../errors/given-up.ts'
import type { Handle } from '../handle/handle.ts'
import { readAt } from '../kernel/files.ts'
import { visibleSize } from '../kernel/uapi.ts'
import type { PartitionTable } from '../partitions/disk.ts'
import { probeGptBlockSize } from '../partitions/gpt.ts'
import { findPartition } from '../partitions/ref.ts'
import { mountWanted, type OnDevice } from './make.ts'
import type { Mount } from './mount.ts'
import { checkTarget, checkWantedMount, MOUNT_OPTION_NAMES, type MountOptions, type WantedMount } from './options.ts'
import { refuseUnknown } from './refused.ts'
import {
  detectIn,
  type Filesystem,
  filesystemBeside,
  findTableBeside,
  listOf,
  type Readable,
  readTable,
} from './source.ts'

/** The options of {@link attach} and of `device.mount()`. `partition` attaches only that part of the image. */
export type MountImageOptions = AttachOptions & MountOptions

const NAMES = [...new Set([...OPTION_NAMES, ...MOUNT_OPTION_NAMES])]

/**
 * Attaches an image, or a `partition` of it, and mounts it on the folder `target`. Without a folder, or with null, the
 * mount is private, as with `device.mount(null)`. Every unmount also detaches the device: `mount.unmount()`, `await
 * using`, umount(8), and for a private mount the end of the process. If a step fails, the steps before it are undone.
 *
 * Without `partition`, mounts the filesystem at the beginning of the image. If there is a partition table instead,
 * mounts the one partition that has a known filesystem. A filesystem that cannot be written is attached read-only.
 *
 * @throws LoopError the errors of {@link attach} and of `device.mount()`; `unknown-filesystem`, with what was found
 *
 * @example
 * ```ts
 * import { readdirSync } from 'node:fs'
 *
 * await using mount = await mountImage('cd/root.squashfs')
 * console.log(readdirSync(mount.path))
 * ```
 */
export async function mountImage(
  file: BackingFile,
  target: string | null = null,
  options?: MountImageOptions,
): Promise<Mount> {
  return await fromCaller(attachAndMount(file, target, options))
}

async function attachAndMount(
  file: BackingFile,
  target: string | null,
  options: MountImageOptions | undefined,
): Promise<Mount> {
  const given = checkOptions(options, NAMES)
  const argument = checkBackingFile(file)
  const place = checkTarget(target)
  const [forAttach, forMount] = splitOptions(given)
  const wanted = checkWantedMount(forMount)
  checkWanted(forAttach)
  const deadline = checkDeadline(given, CHANGING)
  assertSupported()
  deadline.throwIfAborted()

  const asked = 'path' in argument ? argument.path.toString() : undefined
  const [backing, part] = await explained(() => lookAtImage(argument, forAttach, wanted, deadline), asked)
  const handle = await attachPlainOrStack(file, {
    ...forAttach,
    ...part.window,
    ...(part.isReadOnly && forAttach.readOnly === undefined && { readOnly: true }),
    ...(forAttach.blockSize === 'auto' && { blockSize: part.blockSize }),
    ...deadline.rest,
  })
  try {
    const mount = await handle.run(async () => {
      if (!forAttach.swappable) await assertSameFile(handle, backing)
      return mountWanted(handle, place, { ...wanted, partition: undefined }, deadline, part.known)
    }, deadline)
    return mount.takeDevice()
  } catch (error) {
    await undoAttach(handle)
    throw error
  }
}

/** Where a call on the device is stuck, closing it is all that can be done, and enough with autoclear. */
async function undoAttach(handle: Handle): Promise<void> {
  if (handle.isStuck) {
    handle.closeSync()
    return
  }
  try {
    await dispose(handle)
  } catch {
    // What went wrong first is what the caller has to know.
  }
}

function splitOptions(given: MountImageOptions): [AttachOptions, MountOptions] {
  const { fsType, options, partition, makeTarget, ...forAttach } = given
  if (partition !== undefined) {
    for (const name of ['offset', 'sizeLimit', 'partscan'] as const) {
      if (given[name] !== undefined) throw wrongValue(name, 'cannot be given with a partition, which says it')
    }
  }
  if (given.autoclear === false) throw wrongValue('autoclear', 'cannot be false: the device goes with the mount')
  const { readOnly, signal, timeout } = given
  return [forAttach, { fsType, options, partition, makeTarget, readOnly, signal, timeout }]
}

/** The part of an image that is to be attached. */
interface Part {
  window: Pick<AttachOptions, 'offset' | 'sizeLimit'>
  known: OnDevice | undefined
  /** Of the image's GPT. */
  blockSize: number | undefined
  /** The filesystem cannot be written. */
  isReadOnly: boolean
}

/** Its file, closed again, and what is to be attached of it. */
async function lookAtImage(
  argument: FileArgument,
  forAttach: AttachOptions,
  wanted: WantedMount,
  deadline: Deadline,
): Promise<[Backing, Part]> {
  const backing = await openBacking(argument, true, deadline)
  try {
    return [backing, await findPart(backing, forAttach, wanted, deadline)]
  } finally {
    await backing.close()
  }
}

async function findPart(
  { fd, path, size }: Backing,
  { offset = 0, sizeLimit = 0, blockSize }: AttachOptions,
  { partition, fsType }: WantedMount,
  { bound }: Deadline,
): Promise<Part> {
  const start = Number(offset)
  const image = { fd, path, start, size: Number(visibleSize(size, BigInt(offset), BigInt(sizeLimit))), bound }
  const ofTable = await probeBlockSize(image)
  const readable = { ...image, blockSize: typeof blockSize === 'number' ? blockSize : (ofTable ?? 512) }
  if (partition !== undefined) {
    const found = findPartition(await readTable(readable), partition, path)
    return partAt(readable, found, fsType, ofTable)
  }
  const detected = await detectIn(image)
  const whole = { window: {}, blockSize: ofTable }
  if (fsType !== undefined) return { ...whole, known: { fsType, detected }, isReadOnly: false }
  const table = await findTableBeside(detected, readable)
  const chosen = filesystemBeside(detected, table)
  if (chosen !== undefined) return { ...whole, ...describe(chosen, detected) }
  if (table === undefined) throw refuseUnknown(path, detected.found, undefined)
  return partAt(readable, await findOnly(readable, table), undefined, ofTable)
}

function describe(chosen: Filesystem, detected: OnDevice['detected']): Pick<Part, 'known' | 'isReadOnly'> {
  return { known: { fsType: chosen.fsType, detected }, isReadOnly: chosen.readOnly === true }
}

interface Range {
  start: number
  size: number
}

async function partAt(
  image: Readable,
  { start, size }: Range,
  fsType: string | undefined,
  blockSize: number | undefined,
): Promise<Part> {
  const rest = Math.min(size, Math.max(0, image.size - start))
  const detected = await detectIn({ ...image, start: image.start + start, size: rest })
  const part = { window: { offset: image.start + start, sizeLimit: size }, blockSize }
  if (fsType !== undefined) return { ...part, known: { fsType, detected }, isReadOnly: false }
  const chosen = filesystemBeside(detected, undefined)
  if (chosen === undefined) throw refuseUnknown(image.path, detected.found, undefined)
  return { ...part, ...describe(chosen, detected) }
}

/** The one partition that has a filesystem. */
async function findOnly(image: Readable, table: PartitionTable): Promise<Range> {
  const found: { range: Range; text: string }[] = []
  for (const { number, start, size } of table.partitions) {
    const rest = Math.min(size, Math.max(0, image.size - start))
    const detected = await detectIn({ ...image, start: image.start + start, size: rest })
    const chosen = filesystemBeside(detected, undefined)
    if (chosen !== undefined) found.push({ range: { start, size }, text: `${number} (${chosen.title})` })
  }
  const [only, second] = found
  if (only !== undefined && second === undefined) return only.range
  const others =
    only === undefined
      ? `and none in its partitions: ${listOf(table)}`
      : `but in several partitions: ${found.map(({ text }) => text).join(', ')}`
  throw refuseUnknown(image.path, [], others)
}

/** That of the GPT in the image; undefined where there is none. */
function probeBlockSize({ fd, start, size, bound }: Omit<Readable, 'blockSize'>): Promise<number | undefined> {
  const read = async (position: bigint, length: number): Promise<Uint8Array> => {
    const bytes = Buffer.alloc(length)
    // What cannot be read is no table.
    const count = await readAt(fd, bytes, length, BigInt(start) + position, bound)
    return count < 0 ? bytes : bytes.subarray(0, count)
  }
  return probeGptBlockSize(read, BigInt(size))
}

/** The path can be that of another file since it was looked at. */
async function assertSameFile(handle: Handle, { device, inode, rdevice, path }: Backing): Promise<void> {
  const { info } = await handle.readInfo()
  const same = rdevice === undefined ? info.device === device && info.inode === inode : info.rdevice === rdevice
  if (same) return
  throw refusal('replaced', 'ioctl', `another file than that which was looked at is at ${path} now`, {
    path: handle.path,
    backingFile: path,
  })
}
