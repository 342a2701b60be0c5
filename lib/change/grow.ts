/** Making a device larger: its file, its window on that, its last partition. */

import { constants } from 'node:os'
import { conflicts, overlapError, scanAttachments } from '../attach/overlap.ts'
import { type Bytes, checkBytes, checkOptions, outOfRange, wrongValue } from '../common/arguments.ts'
import { CHANGING, checkDeadline, type Deadline, type Wait } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Handle, Info } from '../handle/handle.ts'
import { readBlockSize, readSize } from '../handle/size.ts'
import { within } from '../kernel/bounded.ts'
import { openDevice } from '../kernel/devnode.ts'
import * as files from '../kernel/files.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { LO_FLAGS_READ_ONLY, patchInfo } from '../kernel/uapi.ts'
import { extendLastPartition } from '../partitions/extend.ts'

const { EOPNOTSUPP } = constants.errno

export interface GrowOptions extends Wait {
  /**
   * `'last'`: the partition with the highest start grows to the new end too, in the table (GPT, or a primary partition
   * of an MBR) and in the kernel, also while it is mounted. Its filesystem is not grown: use resize2fs or xfs_growfs.
   */
  partition?: 'last' | undefined
}

/**
 * Grows the backing file, the size limit where there is one, and the device; resolves to the new size in bytes. Where a
 * later step fails the file keeps its new length.
 */
export async function grow(handle: Handle, size: Bytes, options?: GrowOptions): Promise<number> {
  const given = checkOptions(options, ['partition', 'signal', 'timeout'])
  const wanted = checkBytes('size', size)
  if (wanted % 512n !== 0n) throw outOfRange('size', 'a multiple of 512', size)
  if (given.partition !== undefined && given.partition !== 'last') throw wrongValue('partition', "must be 'last'")
  const deadline = checkDeadline(given, CHANGING)
  return handle.run(async () => {
    deadline.throwIfAborted()
    const before = await handle.readInfo()
    assertGrowable(handle, before, wanted)
    if (wanted > readSize(handle)) {
      await growFile(handle, before, wanted, deadline)
      deadline.throwIfAborted()
      await growWindow(handle, wanted)
    }
    if (given.partition === 'last') await growLastPartition(handle)
    return Number(readSize(handle))
  }, deadline)
}

function assertGrowable(handle: Handle, { info }: Info, wanted: bigint): void {
  const { path } = handle
  if ((info.flags & LO_FLAGS_READ_ONLY) !== 0) {
    throw refusal('backing-not-writable', 'ioctl', 'the device is read-only', { path })
  }
  if (info.rdevice !== 0n) {
    throw refusal('size-mismatch', 'ioctl', 'it is backed by a block device, which has the size that it has', {
      path,
      hint: 'grow what is below it, and call refreshCapacity()',
    })
  }
  if (handle.isShared) {
    throw refusal('in-use', 'ioctl', "it was attached by another handle, and is shared (overlap: 'reuse')", { path })
  }
  const size = readSize(handle)
  if (wanted >= size) return
  throw refusal('size-mismatch', 'ioctl', `it has ${size} bytes, and nothing is made smaller (${wanted})`, { path })
}

/** By its path, where that leads to the file of the device. */
async function growFile(handle: Handle, { info }: Info, wanted: bigint, deadline: Deadline): Promise<void> {
  const { bound } = handle
  const path = await sysfs.readBackingFile(handle.number)
  if (path === undefined) throw refusal('not-attached', 'open', 'the device has no backing file', { path: handle.path })
  const failed = (call: string, errno: number) => explain({ call, errno, path, backingFile: path }, 'open backing file')
  const stat = await files.stat(path, bound)
  if (typeof stat === 'number') throw failed('stat', stat)
  const otherFile = () =>
    refusal('replaced', 'open', 'is not the file of the device any more', { path: handle.path, backingFile: path })
  if (!stat.isFile() || stat.dev !== info.device || stat.ino !== info.inode) throw otherFile()
  const fd = await files.open(path, files.O_RDWR | files.O_NONBLOCK, 0, bound)
  if (fd < 0) throw failed('open', fd)
  try {
    const opened = await files.fstat(fd, bound)
    if (typeof opened === 'number') throw failed('fstat', opened)
    if (opened.dev !== info.device || opened.ino !== info.inode) throw otherFile()
    await assertNoOverlap(handle, { info }, wanted, { fd, path })
    deadline.throwIfAborted()
    const end = info.offset + wanted
    if (opened.size >= end) return
    // Unlike ftruncate(2) it never makes the file shorter, if somebody else has made it longer by now.
    let answer = await within(bound, path).fallocate(fd, 0, end - 1n, 1n)
    if (answer === -EOPNOTSUPP) answer = await files.truncate(fd, Number(end), bound)
    if (answer < 0) throw explain({ call: 'fallocate', errno: answer, path, backingFile: path }, 'create destination')
  } finally {
    await files.close(fd)
  }
}

/** Without a limit the device takes all bytes to the end of the file already. */
async function assertNoOverlap(
  { number, path: device, deadline }: Handle,
  { info }: Pick<Info, 'info'>,
  wanted: bigint,
  { fd, path }: { fd: number; path: string },
): Promise<void> {
  if (info.sizeLimit === 0n) return
  const identity = { path, fd, device: info.device, inode: info.inode, rdevice: undefined, opened: true }
  const claim = { offset: info.offset, sizeLimit: wanted, readOnly: false }
  const before = { ...claim, sizeLimit: info.sizeLimit }
  // What overlaps already was allowed.
  const found = (await scanAttachments(identity, deadline.bound)).filter(
    (other) => other.number !== number && !conflicts(other, before),
  )
  const other = found.find((one) => conflicts(one, claim))
  if (other) throw overlapError('LOOP_SET_STATUS64', device, identity, other)
}

/** LOOP_SET_STATUS64 where there is a limit, else LOOP_SET_CAPACITY: both work under a mount. */
async function growWindow(handle: Handle, wanted: bigint): Promise<void> {
  const { bytes, info } = await handle.readInfo()
  handle.assertOpen()
  if (info.sizeLimit === 0n) {
    const answer = await handle.write('loopSetCapacity')
    if (answer < 0) throw handle.explain('LOOP_SET_CAPACITY', answer)
  } else {
    patchInfo(bytes, { sizeLimit: wanted })
    const answer = await handle.write('loopSetStatus64', bytes)
    if (answer < 0) throw handle.explain('LOOP_SET_STATUS64', answer)
    await handle.renewDetach()
  }
  const size = readSize(handle)
  if (size >= wanted) return
  throw refusal('size-mismatch', 'ioctl', `it has ${size} bytes now, not ${wanted}: the file was changed meanwhile`, {
    path: handle.path,
  })
}

async function growLastPartition(handle: Handle): Promise<void> {
  const { number, path, bound } = handle
  const fd = await openDevice(number, files.O_RDWR, bound)
  if (fd < 0) throw handle.explain('open', fd)
  try {
    const {
      number: index,
      start,
      size,
    } = await extendLastPartition({
      read: async (position, length) => {
        const bytes = new Uint8Array(length)
        const count = await files.readAt(fd, bytes, length, position, bound)
        if (count < 0) throw explain({ call: 'read', errno: count, path })
        return bytes.subarray(0, count)
      },
      write: async (position, bytes) => {
        const count = await files.writeAt(fd, bytes, bytes.length, position, bound)
        if (count === bytes.length) return
        throw count < 0
          ? explain({ call: 'write', errno: count, path })
          : refusal('io', 'write', `${count} of ${bytes.length} bytes were written`, { path })
      },
      flush: async () => {
        const answer = await files.fsync(fd, bound)
        if (answer < 0) throw explain({ call: 'fsync', errno: answer, path })
      },
      size: Number(readSize(handle)),
      blockSize: readBlockSize(handle),
      path,
    })
    const known = sysfs.readPartitions(number).find((one) => one.number === index)
    // The kernel would make it smaller too, under a mounted filesystem.
    if (known === undefined || known.start !== start || known.size >= size) return
    const answer = await handle.calls.blkPgResizePartition(fd, index, BigInt(start), BigInt(size))
    const asked = { partition: { number: index, start: BigInt(start), length: BigInt(size) } }
    if (answer < 0) throw explain(handle.failure('BLKPG', answer, { asked }), 'BLKPG resize')
  } finally {
    await files.close(fd)
  }
}
