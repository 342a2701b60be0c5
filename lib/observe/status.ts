/** One attached device: what it is set to, and setting it. */

import type { Handle } from '../handle/handle.ts'
import { checkWait, LOOKING, type Wait } from '../common/deadline.ts'
import type { Warning } from '../common/warnings.ts'
import { OF_DEVICE } from '../handle/open.ts'
import { findSwappableLower } from '../handle/lower.ts'
import { minorOfDevice } from '../kernel/features.ts'
import { GivenUp } from '../kernel/bounded.ts'
import { Sequence } from '../kernel/sequence.ts'
import * as sysfs from '../kernel/sysfs.ts'
import {
  decodeU64,
  formatDevice,
  INFO_SIZE,
  LO_FLAGS_AUTOCLEAR,
  LO_FLAGS_DIRECT_IO,
  LO_FLAGS_PARTSCAN,
  LOOP_MAJOR,
  type LoopInfo64,
  U64_SIZE,
} from '../kernel/uapi.ts'
import { describeBackingFile, isMarkedDeleted, type LoopInfo, requireInfo } from './list.ts'

/** A {@link LoopInfo}, with what only LOOP_GET_STATUS64 knows. */
export interface LoopStatus extends LoopInfo {
  /** The tag given at the attach (`lo_file_name`); losetup writes the file's path there. Null: see `unanswered`. */
  reference: string | null
  /** `major:minor` of the filesystem that has the backing file. */
  backingDevice: string | null
  /** Inode of the backing file, as decimal text, because it can be too large for a number. */
  backingInode: string | null
  /** Whether this is the upper device of a stack: see `swappable` of {@link attach}. */
  swappable: boolean
  /**
   * Why LOOP_GET_STATUS64 has not answered, if the filesystem of the backing file does not answer or is gone. Then
   * `reference`, `backingDevice` and `backingInode` are null, and the rest is from sysfs.
   */
  unanswered?: string
  /** What this handle has found odd about the device: see {@link Warning}. */
  warnings: readonly Warning[]
}

/** @throws `not-attached`, `replaced`, `timeout` */
export async function readStatus(handle: Handle, options?: Wait): Promise<LoopStatus> {
  const deadline = checkWait(options, LOOKING)
  return handle.run(async () => {
    const status = await readAll(handle)
    const lower = handle.lowerNumber
    if (lower !== undefined) {
      status.lower = lower
      status.swappable = (await findSwappableLower(handle)) !== undefined
    }
    return status
  }, deadline)
}

/** Readings that are not of one moment, because somebody changed the device meanwhile, are made again so often. */
const TRIES = 8

/** In one hop to a thread: all that sysfs has, but for the path, can be asked of the open device too. Without `lower`. */
async function readAll(handle: Handle): Promise<LoopStatus> {
  const { number, descriptor } = handle
  let pathSize = sysfs.SHORT_SIZE
  for (let tries = TRIES; ; tries--) {
    const sequence = new Sequence()
    const info = sequence.room(INFO_SIZE)
    const size = sequence.room(U64_SIZE)
    const path = sequence.room(pathSize)
    const before = sequence.try('blkGetDiskSeq', descriptor)
    const status = sequence.call('loopGetStatus64', descriptor, info)
    const sized = sequence.try('blkGetSize64', descriptor, size)
    const blockSize = sequence.try('blkSszGet', descriptor)
    const readOnly = sequence.try('blkRoGet', descriptor)
    const isShort = pathSize === sysfs.SHORT_SIZE
    const length = sequence.try(isShort ? 'sysfsBackingFileShort' : 'sysfsBackingFile', number, path)
    const after = sequence.try('blkGetDiskSeq', descriptor)
    const silence = await runUntilHalfTime(sequence, handle)
    if (silence !== undefined) return readWithoutFilesystem(handle, silence)
    const answer = status.answer ?? 0
    if (answer < 0 && !OF_DEVICE.has(-answer) && sysfs.isBound(number)) {
      return readWithoutFilesystem(handle, handle.explain('LOOP_GET_STATUS64', answer).message)
    }
    const loop = handle.takeOver(info, answer, after.succeeded ? after.answer : undefined)
    const isCut = isShort && length.answer === pathSize
    const text = isCut ? undefined : sysfs.decodeBackingFile(path.bytes, length.answer)
    const bytes = Number(decodeU64(size))
    sequence.giveBack()
    if (isCut) pathSize = sysfs.ATTRIBUTE_SIZE
    if ((before.answer !== after.answer || text === undefined) && tries > 0) continue
    if (!sized.succeeded || !blockSize.succeeded || !readOnly.succeeded) return readFromSysfs(handle, loop)
    const { flags } = loop
    const { diskSeq } = handle.ref
    const file = isMarkedDeleted(text) ? await describeBackingFile(text) : undefined
    // In one piece: an object that is put together of others takes as long to make as all the rest.
    const found: LoopStatus = {
      number,
      path: handle.path,
      device: `${LOOP_MAJOR}:${minorOfDevice(number)}`,
      diskSeq: diskSeq ?? 0,
      attached: true,
      backingFile: file === undefined ? (text ?? null) : file.backingFile,
      backingDeleted: file?.backingDeleted ?? false,
      offset: Number(loop.offset),
      sizeLimit: Number(loop.sizeLimit),
      size: bytes,
      blockSize: blockSize.answer ?? 0,
      readOnly: readOnly.answer === 1,
      autoclear: (flags & LO_FLAGS_AUTOCLEAR) !== 0,
      partscan: (flags & LO_FLAGS_PARTSCAN) !== 0,
      directIO: (flags & LO_FLAGS_DIRECT_IO) !== 0,
      reference: loop.fileName,
      backingDevice: formatDevice(loop.device),
      backingInode: loop.inode.toString(),
      swappable: false,
      warnings: handle.warnings.list,
    }
    // Before kernel 5.15.
    if (diskSeq === undefined) delete found.diskSeq
    return found
  }
}

/** Half of the time, so that the rest can be told where the filesystem does not answer. Undefined: it has. */
async function runUntilHalfTime(sequence: Sequence, { deadline, number }: Handle): Promise<string | undefined> {
  try {
    await sequence.run({ left: deadline.bound.left / 2, signal: deadline.bound.signal }, number)
    return undefined
  } catch (error) {
    if (!(error instanceof GivenUp) || error.isAborted) throw error
    return 'the filesystem of the backing file does not answer'
  }
}

async function readWithoutFilesystem(handle: Handle, unanswered: string): Promise<LoopStatus> {
  handle.assertAttachment()
  handle.warnings.add('not-answering', `${handle.path}: ${unanswered}`)
  return { ...(await readFromSysfs(handle, undefined)), unanswered }
}

async function readFromSysfs({ number, warnings }: Handle, loop: LoopInfo64 | undefined): Promise<LoopStatus> {
  const { lower: _, ...info } = await requireInfo(number)
  return {
    ...info,
    reference: loop?.fileName ?? null,
    backingDevice: loop === undefined ? null : formatDevice(loop.device),
    backingInode: loop?.inode.toString() ?? null,
    swappable: false,
    warnings: warnings.list,
  }
}
