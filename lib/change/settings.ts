/** What can be set on an attached device: offset, size limit, flags, block size, direct I/O, and its capacity. */

import { conflicts, overlapError, scanAttachments } from '../attach/overlap.ts'
import { readBackingFileSync } from '../kernel/sysfs.ts'
import { constants } from 'node:os'
import {
  type Bytes,
  checkBlockSize,
  checkBoolean,
  checkBytes,
  checkObject,
  checkOptions,
  checkReference,
  wrongValue,
} from '../common/arguments.ts'
import { backoff, CHANGING, checkDeadline, checkWait, type Wait } from '../common/deadline.ts'
import { findHolders } from '../errors/holders.ts'
import type { Handle } from '../handle/handle.ts'
import { readSize } from '../handle/size.ts'
import { openDevice } from '../kernel/devnode.ts'
import { close, fsync, O_EXCL, O_RDONLY, O_RDWR } from '../kernel/files.ts'
import {
  LO_FLAGS_AUTOCLEAR,
  LO_FLAGS_PARTSCAN,
  LO_FLAGS_READ_ONLY,
  type LoopInfo64,
  patchInfo,
} from '../kernel/uapi.ts'
import { assertScannable, showPartitions } from '../partitions/scan.ts'

const { EAGAIN, EBUSY, EPERM } = constants.errno

/** The settings to change. Settings that you leave out stay as they are. */
export interface StatusChange {
  /** Bytes. */
  offset?: Bytes | undefined
  /** Bytes; 0: to the end of the file. */
  sizeLimit?: Bytes | undefined
  autoclear?: boolean | undefined
  /** It can only be turned on; the kernel keeps it until the device is detached. */
  partscan?: true | undefined
  /** The new tag, at most 63 bytes. */
  reference?: string | undefined
}

export interface SetStatusOptions extends Wait {
  /**
   * What to do if the device would show bytes of the file that another device has attached too, and one of the two can
   * write. `'refuse'`, the default: rejects with `overlap`. `'allow'`: does not check.
   */
  overlap?: 'refuse' | 'allow' | undefined
  /** Milliseconds; default 10 000. */
  timeout?: number | undefined
}

/** LOOP_GET_STATUS64, the named fields changed, LOOP_SET_STATUS64. */
export async function setStatus(handle: Handle, change: StatusChange, options?: SetStatusOptions): Promise<void> {
  const given = checkOptions(checkObject('change', change), [
    'offset',
    'sizeLimit',
    'autoclear',
    'partscan',
    'reference',
  ])
  const offset = given.offset === undefined ? undefined : checkBytes('offset', given.offset)
  const sizeLimit = given.sizeLimit === undefined ? undefined : checkBytes('sizeLimit', given.sizeLimit)
  const fileName = given.reference === undefined ? undefined : checkReference(given.reference)
  const autoclear = given.autoclear === undefined ? undefined : checkBoolean('autoclear', given.autoclear)
  if (given.partscan !== undefined && !checkBoolean('partscan', given.partscan)) {
    throw wrongValue('partscan', 'can be switched on only: the kernel keeps it until the device is detached')
  }
  const { overlap = 'refuse', ...wait } = checkOptions(options, ['overlap', 'signal', 'timeout'])
  if (overlap !== 'refuse' && overlap !== 'allow') throw wrongValue('overlap', "must be 'refuse' or 'allow'")
  const deadline = checkDeadline(wait, CHANGING)
  return handle.run(async () => {
    const { bytes, info } = await handle.readInfo()
    let { flags } = info
    if (autoclear !== undefined) flags = autoclear ? flags | LO_FLAGS_AUTOCLEAR : flags & ~LO_FLAGS_AUTOCLEAR
    if (given.partscan) flags |= LO_FLAGS_PARTSCAN
    const window = { offset: offset ?? info.offset, sizeLimit: sizeLimit ?? info.sizeLimit }
    const isMoved = window.offset !== info.offset || window.sizeLimit !== info.sizeLimit
    if (given.partscan) assertScannable(handle)
    if (isMoved && overlap === 'refuse') await refuseOverlap(handle, info, window)
    patchInfo(bytes, {
      flags,
      ...(offset !== undefined && { offset }),
      ...(sizeLimit !== undefined && { sizeLimit }),
      ...(fileName !== undefined && { fileName }),
    })
    const answer = await handle.changeIdentity(
      { ...info, offset: offset ?? info.offset, fileName: fileName ?? info.fileName },
      () =>
        retryDirty(handle, async () => {
          handle.assertOpen()
          return handle.write('loopSetStatus64', bytes)
        }),
    )
    if (answer < 0) throw handle.explain('LOOP_SET_STATUS64', answer)
    await handle.renewDetach()
    // With the flag the kernel looks for partitions, and drops those that it does not find.
    if (given.partscan && (info.flags & LO_FLAGS_PARTSCAN) === 0) {
      await showPartitions(handle, 'any', deadline)
    }
  }, deadline)
}

/** Where the window would come to lie on bytes that another device has too. What overlapped before was allowed. */
async function refuseOverlap(
  handle: Handle,
  info: LoopInfo64,
  window: { offset: bigint; sizeLimit: bigint },
): Promise<void> {
  const { device, inode, flags } = info
  const rdevice = info.rdevice === 0n ? undefined : info.rdevice
  const path = readBackingFileSync(handle.number) ?? handle.path
  const backing = { path, fd: -1, device, inode, rdevice, opened: false }
  const readOnly = (flags & LO_FLAGS_READ_ONLY) !== 0
  const before = { offset: info.offset, sizeLimit: info.sizeLimit, readOnly }
  const other = (await scanAttachments(backing, handle.deadline.bound)).find(
    (found) => found.number !== handle.number && conflicts(found, { ...window, readOnly }) && !conflicts(found, before),
  )
  if (other) throw overlapError('LOOP_SET_STATUS64', handle.path, backing, other)
}

/** LOOP_SET_CAPACITY, after the backing file grew or shrank. Partitions are not looked at again. */
export async function refreshCapacity(handle: Handle, options?: Wait): Promise<number> {
  const deadline = checkWait(options, CHANGING)
  return handle.run(async () => {
    await handle.readInfo()
    const answer = await handle.write('loopSetCapacity')
    if (answer < 0) throw handle.explain('LOOP_SET_CAPACITY', answer)
    return Number(readSize(handle))
  }, deadline)
}

/** LOOP_SET_DIRECT_IO. */
export async function setDirectIO(handle: Handle, enabled: boolean, options?: Wait): Promise<void> {
  checkBoolean('enabled', enabled)
  const deadline = checkWait(options, CHANGING)
  return handle.run(async () => {
    await handle.readInfo()
    const answer = await handle.write('loopSetDirectIo', enabled ? 1 : 0)
    if (answer < 0) throw handle.explain('LOOP_SET_DIRECT_IO', answer)
  }, deadline)
}

/**
 * LOOP_SET_BLOCK_SIZE, with the device held exclusively: kernels up to 6.16 (K11) change it under a mounted
 * filesystem.
 */
export async function setBlockSize(handle: Handle, bytes: number, options?: Wait): Promise<void> {
  checkBlockSize('bytes', bytes, 65_536)
  const deadline = checkWait(options, CHANGING)
  return handle.run(async () => {
    await handle.readInfo()
    const refused = await setBlockSizeExclusively(handle, O_RDONLY, bytes)
    if (refused < 0) await setBlockSizeExclusively(handle, O_RDWR, bytes)
  }, deadline)
}

/** 0, or -EPERM for a read-only descriptor: then a writable one may do. Every other failure is thrown. */
async function setBlockSizeExclusively(handle: Handle, access: number, bytes: number): Promise<number> {
  const fd = await openDevice(handle.number, access | O_EXCL, handle.bound)
  if (fd === -EBUSY) {
    const holders = await findHolders(handle.number, [handle.descriptor], handle.bound)
    throw handle.explain('open', fd, { holders })
  }
  if (fd < 0) throw handle.explain('open', fd)
  try {
    const answer = await retryDirty(handle, () => handle.calls.loopSetBlockSize(fd, bytes))
    if (answer < 0 && !(answer === -EPERM && access === O_RDONLY)) {
      throw handle.explain('LOOP_SET_BLOCK_SIZE', answer, { asked: { blockSize: bytes } })
    }
    return answer
  } finally {
    await close(fd)
  }
}

/**
 * Up to 5.17 the kernel answers EAGAIN while the page cache of the device is not empty, which another reader (udev,
 * mostly) can cause at any moment.
 */
async function retryDirty(handle: Handle, call: () => Promise<number>): Promise<number> {
  for (let attempt = 1; ; attempt++) {
    const answer = await call()
    if (answer !== -EAGAIN || !(await handle.deadline.pause(backoff(attempt)))) return answer
    await handle.calls.blkFlsBuf(handle.descriptor)
  }
}

/** What is written to the device is in the backing file, and that on its medium. */
export async function flush(handle: Handle, options?: Wait): Promise<void> {
  const deadline = checkWait(options, CHANGING)
  return handle.run(async () => {
    const answer = await fsync(handle.descriptor, handle.bound)
    if (answer < 0) throw handle.explain('fsync', answer)
  }, deadline)
}
