/** The backing file: opened so that nothing can block or be harmed, and looked at before the kernel gets it. */

import { constants } from 'node:os'
import { type FileArgument, wrongValue } from '../common/arguments.ts'
import { backoff, type Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Bound } from '../kernel/bounded.ts'
import { binding } from '../kernel/binding.ts'
import * as files from '../kernel/files.ts'
import { pathOfDescriptor } from '../kernel/process.ts'
import { isReadOnlySync, readBlockDeviceSize } from '../kernel/sysfs.ts'
import { formatDevice, type Stat } from '../kernel/uapi.ts'

const { EACCES, EAGAIN, EPERM, EROFS, ETXTBSY } = constants.errno
const R_OK = 4
const F_SEAL_WRITE = 8
const F_SEAL_FUTURE_WRITE = 16

export interface Backing {
  /** Ours or the caller's. */
  readonly fd: number
  /** For messages; for a descriptor where it can be found out. */
  readonly path: string
  readonly writable: boolean
  readonly device: bigint
  readonly inode: bigint
  /** For a block device, which is the same through every node of it. */
  readonly rdevice: bigint | undefined
  /** Bytes; a block device's too. */
  readonly size: bigint
  /** Opened here, and by nobody else as far as this process knows: it can be probed for other openers. */
  readonly opened: boolean
  /** Lets go of what was opened here. A descriptor of the caller's stays open. */
  close(): Promise<void>
}

/**
 * @param readOnly undefined where the caller left it open: then a path is wanted writable, and a descriptor is what it is
 * @throws `no-such-file`, `permission`, `backing-not-writable`, `not-a-file-or-block-device`, `resources`, `io`;
 *   TypeError for a descriptor that cannot be read
 */
export async function openBacking(
  file: FileArgument,
  readOnly: boolean | undefined,
  deadline: Deadline,
): Promise<Backing> {
  return 'fd' in file
    ? takeDescriptor(file.fd, readOnly, deadline.bound)
    : openPath(file.path, readOnly === true, deadline)
}

async function openPath(given: string | Buffer, readOnly: boolean, deadline: Deadline): Promise<Backing> {
  const path = given.toString()
  // Before opening: that can block (a FIFO), or do something to a device (rewind a tape).
  const stat = await files.stat(given, deadline.bound)
  if (typeof stat === 'number') throw explain({ call: 'stat', errno: stat, path, backingFile: path }, ROLE)
  refuseOtherTypes(stat, path)

  const access = readOnly ? files.O_RDONLY : files.O_RDWR
  let fd = await files.open(given, access | files.O_NONBLOCK, 0, deadline.bound)
  // Somebody has a lease on it, if only for the instant of a probe like that of overlap.ts.
  for (let attempt = 1; fd === -EAGAIN && (await deadline.pause(backoff(attempt))); attempt++) {
    fd = await files.open(given, access | files.O_NONBLOCK, 0, deadline.bound)
  }
  if (fd < 0) throw await openError(given, fd, readOnly, deadline.bound)
  try {
    const opened = await files.fstat(fd, deadline.bound)
    if (typeof opened === 'number') throw explain({ call: 'fstat', errno: opened, path, backingFile: path }, ROLE)
    refuseOtherTypes(opened, path)
    clearNonBlocking(fd, path)
    if (!readOnly && isReadOnlyDevice(opened)) throw readOnlyDevice('open', path)
    return await describe(fd, opened, path, !readOnly, true, () => files.closeSoon(fd))
  } catch (error) {
    await files.closeSoon(fd)
    throw error
  }
}

const ROLE = 'open backing file'

async function openError(given: string | Buffer, errno: number, readOnly: boolean, bound: Bound): Promise<Error> {
  const path = given.toString()
  const couldBeRead = !readOnly && NOT_WRITABLE.has(errno) && (await files.access(given, R_OK, bound)) === 0
  if (!couldBeRead) return explain({ call: 'open', errno, path, backingFile: path }, ROLE)
  return explain({ call: 'open', errno, path, backingFile: path }, 'open backing file for writing')
}

const NOT_WRITABLE = new Set([-EACCES, -EPERM, -EROFS, -ETXTBSY])

async function takeDescriptor(given: number, readOnly: boolean | undefined, bound: Bound): Promise<Backing> {
  const flags = binding().fcntlGetFlSync(given)
  const path = pathOfDescriptor(given)
  if (flags < 0) throw explain({ call: 'fcntl', errno: flags, path, backingFile: path }, ROLE)
  if ((flags & files.O_PATH) !== 0) throw wrongValue('file', 'must not be a descriptor opened with O_PATH')
  const access = flags & files.O_ACCMODE
  if (access === files.O_WRONLY) throw wrongValue('file', 'must not be a descriptor open for writing only')

  const stat = await files.fstat(given, bound)
  if (typeof stat === 'number') throw explain({ call: 'fstat', errno: stat, path, backingFile: path }, ROLE)
  refuseOtherTypes(stat, path)
  const isOpenForWriting = access === files.O_RDWR
  const writable = isOpenForWriting && !isReadOnlyDevice(stat)
  if (readOnly === false && isOpenForWriting && !writable) throw readOnlyDevice('fcntl', path)
  if (readOnly === false && !writable) {
    throw refusal('backing-not-writable', 'fcntl', 'the descriptor is open for reading only', {
      path,
      backingFile: path,
      hint: 'open it for reading and writing, or attach with readOnly: true',
    })
  }
  if (writable && readOnly !== true) refuseSealed(given, path)

  // Kernels before 6.15 append a loop device's writes to such a file, wherever they belong.
  if (writable && (flags & files.O_APPEND) !== 0) return reopen(given, stat, path, bound)
  return describe(given, stat, path, writable, false, async () => {})
}

/** The same file through a descriptor of our own, without the O_APPEND of the caller's. */
async function reopen(given: number, stat: files.FileStat, path: string, bound: Bound): Promise<Backing> {
  const fd = await files.open(`/proc/self/fd/${given}`, files.O_RDWR, 0, bound)
  if (fd < 0) throw explain({ call: 'open', errno: fd, path, backingFile: path }, ROLE)
  return describe(fd, stat, path, true, false, () => files.closeSoon(fd))
}

/** It can be opened for writing, and every write to it is then lost with EIO: only BLKROGET tells. */
function isReadOnlyDevice(stat: files.FileStat): boolean {
  return stat.isBlockDevice() && isReadOnlySync(formatDevice(stat.rdev))
}

function readOnlyDevice(call: string, path: string): Error {
  return refusal('backing-not-writable', call, 'the block device is read-only', {
    path,
    backingFile: path,
    hint: 'attach with readOnly: true',
  })
}

/** K10, 6.15 to 6.17: one that the kernel refuses for what it is stays open for ever. */
function refuseOtherTypes(stat: files.FileStat, path: string): void {
  if (stat.isFile() || stat.isBlockDevice()) return
  const type = stat.isDirectory() ? 'a directory' : stat.isFIFO() ? 'a FIFO' : 'neither a file nor a block device'
  throw refusal('not-a-file-or-block-device', 'stat', `is ${type}`, { path, backingFile: path })
}

/** The kernel would attach a sealed memfd writable, and fail every write. */
function refuseSealed(fd: number, path: string): void {
  const seals = binding().fcntlGetSealsSync(fd)
  if (seals < 0 || (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) === 0) return
  throw refusal('backing-not-writable', 'fcntl', 'the memfd is sealed against writing', {
    path,
    backingFile: path,
    hint: 'attach with readOnly: true',
  })
}

function clearNonBlocking(fd: number, path: string): void {
  const errno = binding().fcntlSetFlSync(fd, 0)
  if (errno < 0) throw explain({ call: 'fcntl', errno, path, backingFile: path }, ROLE)
}

/** A file that was opened otherwise, and is regular. */
export function describeRegular(fd: number, { device, inode, size }: Stat, path: string, writable: boolean): Backing {
  const close = (): Promise<void> => files.closeSoon(fd)
  return { fd, path, writable, device, inode, rdevice: undefined, size, opened: true, close }
}

async function describe(
  fd: number,
  stat: files.FileStat,
  path: string,
  writable: boolean,
  opened: boolean,
  letGo: () => Promise<void>,
): Promise<Backing> {
  const size = stat.isBlockDevice() ? await readBlockDeviceSize(formatDevice(stat.rdev)) : stat.size
  const rdevice = stat.isBlockDevice() ? stat.rdev : undefined
  return { fd, path, writable, device: stat.dev, inode: stat.ino, rdevice, size, opened, close: letGo }
}
