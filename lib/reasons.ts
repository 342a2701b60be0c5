/**
 * From (call, errno) to the cause. One table, in the kernel's own order of checks; the first entry that applies wins.
 * It is looked at only after a failure, it only reads, and the kernel's errno is kept whatever it finds.
 */

import { errnoDescription, errnoName, LoopError, type LoopErrorReason } from './errors.ts'
import type { Holder } from './holders.ts'
import { binding } from './kernel/binding.ts'
import { existsSync, fstatSync, readLinkSync } from './kernel/files.ts'
import * as sysfs from './kernel/sysfs.ts'
import { decodeInfo, LO_FLAGS_READ_ONLY, type LoopInfo64, newInfo } from './kernel/uapi.ts'

/** A failed call and what is known of its circumstances. */
export interface Failure {
  /** An ioctl's name (`LOOP_CHANGE_FD`) or a system call's (`open`). */
  call: string
  /** Negative. */
  errno: number
  /** What the call was given, for the message. */
  path?: string | undefined
  /** The loop device's number, and an open descriptor of it. */
  number?: number | undefined
  fd?: number | undefined
  /** The backing file: its path for the message, its descriptor where it is open. */
  backingFile?: string | undefined
  backingFd?: number | undefined
  /** For LOOP_CHANGE_FD: what the device shows now and what it would show, in bytes. */
  sizes?: { now: bigint; then: bigint } | undefined
  holders?: Holder[] | undefined
  /** What was tried before giving up, for the message. */
  effort?: string | undefined
}

interface Cause {
  reason: LoopErrorReason
  /** The reading that tells it from the causes after it; without one it always applies. */
  when?: (failure: Failure) => boolean
  detail?: string | ((failure: Failure) => string)
  hint?: string | ((failure: Failure) => string)
}

const PRIVILEGES = 'run as root, or with CAP_SYS_ADMIN and access to /dev/loop-control and /dev/loopN'

const notAttached: Cause[] = [
  { reason: 'detaching', when: isGoing, detail: 'the device is being detached, and still held by another process' },
  { reason: 'not-attached', detail: 'the device has no backing file' },
]

const inUse: Cause = { reason: 'in-use', detail: 'somebody else holds the device' }

const badBacking: Cause[] = [
  { reason: 'closed', when: deviceIsClosed, detail: 'the descriptor is not open' },
  { reason: 'backed-by-itself', when: backingIsOpen, detail: 'the backing file leads back to this device' },
  { reason: 'closed', detail: 'the descriptor of the backing file is not open' },
]

const unusableBacking: Cause[] = [
  {
    reason: 'not-a-file-or-block-device',
    when: (failure) => backingIsOpen(failure) && !isFileOrBlockDevice(failure.backingFd),
    detail: 'the backing file is neither a regular file nor a block device',
  },
  {
    reason: 'backing-loop-not-attached',
    when: backingIsFreeLoop,
    detail: 'the backing file is a loop device that has no backing file itself',
  },
]

const openedBefore: Cause[] = [
  {
    reason: 'already-attached',
    when: (failure) => attachedInfo(failure) !== undefined,
    detail: ({ number }) => `the device is attached already, to ${backingFileOf(number)}`,
    hint: 'leave out the number to get a free device',
  },
  { reason: 'detaching', when: isGoing, detail: 'the device is being detached, and still held by another process' },
  inUse,
]

const permission: Cause = { reason: 'permission', hint: PRIVILEGES }

const backingNotWritable: Cause[] = [
  {
    reason: 'backing-not-writable',
    detail: 'cannot be opened for writing',
    hint: 'it can be read: attach with readOnly: true, or make it writable',
  },
]

const setStatus: Record<string, Cause[]> = {
  EPERM: [permission],
  ENXIO: notAttached,
  EAGAIN: [{ reason: 'dirty-cache', detail: 'the page cache of the device could not be emptied' }],
}

const configure: Record<string, Cause[]> = {
  EBADF: badBacking,
  EBUSY: openedBefore,
  EINVAL: unusableBacking,
}

/** Per call, per errno. What is not here is looked up in {@link ANY_CALL}. */
const CAUSES: Record<string, Record<string, Cause[]>> = {
  'LOOP_CTL_ADD': {
    EEXIST: [{ reason: 'device-exists', detail: 'there is a device of that number' }],
    EINVAL: [{ reason: 'resources', detail: 'the number is beyond what the kernel has minors for' }],
  },
  'LOOP_CTL_REMOVE': {
    ENODEV: [{ reason: 'no-such-device', detail: 'there is no device of that number' }],
    EBUSY: [
      {
        reason: 'in-use',
        when: ({ number }) => number !== undefined && sysfs.isBound(number),
        detail: ({ number }) => `the device is attached to ${backingFileOf(number)}`,
        hint: 'detach it first',
      },
      { reason: 'in-use', detail: 'somebody has the device open' },
    ],
  },
  'LOOP_CTL_GET_FREE': {
    EINVAL: [{ reason: 'resources', detail: 'all minors are in use' }],
  },
  'LOOP_CONFIGURE': configure,
  'LOOP_SET_FD': configure,
  'LOOP_CHANGE_FD': {
    EBADF: badBacking,
    ENXIO: notAttached,
    EINVAL: [
      {
        reason: 'not-read-only',
        when: (failure) => ((attachedInfo(failure)?.flags ?? LO_FLAGS_READ_ONLY) & LO_FLAGS_READ_ONLY) === 0,
        detail: 'the backing file of a writable device cannot be changed',
        hint: 'attach with readOnly: true',
      },
      ...unusableBacking,
      {
        reason: 'size-mismatch',
        when: ({ sizes }) => sizes !== undefined && sizes.now !== sizes.then,
        detail: ({ sizes }) => (sizes ? sizeDifference(sizes.now, sizes.then) : ''),
      },
    ],
  },
  'LOOP_CLR_FD': { ENXIO: notAttached },
  'LOOP_GET_STATUS64': { ENXIO: notAttached },
  'LOOP_SET_STATUS64': setStatus,
  'LOOP_SET_CAPACITY': { EPERM: [permission], ENXIO: notAttached },
  'LOOP_SET_DIRECT_IO': {
    EPERM: [permission],
    ENXIO: notAttached,
    EINVAL: [
      {
        reason: 'direct-io-unavailable',
        detail: 'the backing file takes no direct I/O at this block size and offset',
        hint: "a logical block size of 4096 may help, else use directIO: 'prefer' for buffered I/O",
      },
    ],
  },
  'LOOP_SET_BLOCK_SIZE': {
    EPERM: [permission],
    EBUSY: [inUse],
    ENXIO: notAttached,
    EINVAL: [{ reason: 'block-size', detail: 'this kernel does not take that logical block size' }],
    EAGAIN: [{ reason: 'dirty-cache', detail: 'the page cache of the device could not be emptied' }],
  },
  'BLKGETDISKSEQ': {
    EINVAL: [{ reason: 'unsupported-kernel', detail: 'disk sequence numbers came with kernel 5.15' }],
  },
  'BLKRRPART': {
    EBUSY: [{ reason: 'in-use', detail: 'a partition is in use' }],
  },
  'open /dev/loop-control': {
    ENOENT: [
      {
        reason: 'no-loop-driver',
        detail: 'there is no such node',
        hint: 'load the module (modprobe loop); in a container, pass the device in: --device /dev/loop-control',
      },
    ],
    ENODEV: [{ reason: 'no-loop-driver', detail: 'the kernel has no loop driver and could not load one' }],
    ENXIO: [{ reason: 'no-loop-driver', detail: 'the kernel has no loop driver and could not load one' }],
  },
  'open device': {
    ENOENT: [
      {
        reason: 'node-missing',
        when: ({ number }) => number !== undefined && sysfs.deviceExists(number),
        detail: 'the kernel has the device, but /dev has no node for it',
        hint: ({ number }) => `make the node: mknod /dev/loop${number} b ${nodeNumbers(number)}`,
      },
      { reason: 'no-such-device', detail: 'there is no such device' },
    ],
    ENXIO: [
      { reason: 'detaching', when: isGoing, detail: 'the device is being detached, and still held by another process' },
      { reason: 'no-such-device', detail: 'the node is there, but the kernel has no such device' },
    ],
    EBUSY: [inUse],
    ENOTTY: [
      {
        reason: 'not-a-loop-device',
        detail: ({ number }) => `the node is another one than that of loop device ${number}`,
        hint: ({ number }) => `it should be b ${nodeNumbers(number)}`,
      },
    ],
  },
  'open backing file': {
    ENOENT: [{ reason: 'no-such-file' }],
    ENOTDIR: [{ reason: 'no-such-file' }],
    ELOOP: [{ reason: 'no-such-file' }],
    ENAMETOOLONG: [{ reason: 'no-such-file' }],
    EACCES: [{ reason: 'permission' }],
    EPERM: [{ reason: 'permission' }],
    EISDIR: [{ reason: 'not-a-file-or-block-device' }],
    ENXIO: [{ reason: 'not-a-file-or-block-device', detail: 'the node has no device behind it' }],
  },
  'create destination': {
    ENOENT: [{ reason: 'no-such-file', detail: 'the folder does not exist' }],
    ENOTDIR: [{ reason: 'no-such-file' }],
    ENAMETOOLONG: [{ reason: 'no-such-file' }],
    ELOOP: [{ reason: 'no-such-file' }],
    EROFS: [{ reason: 'permission', detail: 'the filesystem is mounted read-only' }],
    EACCES: [{ reason: 'permission' }],
    EPERM: [{ reason: 'permission' }],
    EEXIST: [{ reason: 'destination-exists' }],
    EDQUOT: [{ reason: 'no-space' }],
    EFBIG: [{ reason: 'no-space', detail: 'the filesystem takes no file of that size' }],
  },
  // Used only where the same file can be opened for reading.
  'open backing file for writing': {
    EACCES: backingNotWritable,
    EPERM: backingNotWritable,
    EROFS: backingNotWritable,
    ETXTBSY: backingNotWritable,
  },
}

const ANY_CALL: Record<string, Cause[]> = {
  EPERM: [permission],
  EACCES: [permission],
  EBADF: [{ reason: 'closed', detail: 'the descriptor is not open' }],
  ENOTTY: [{ reason: 'not-a-loop-device', detail: 'the descriptor is not that of a whole loop device' }],
  EMFILE: [{ reason: 'resources', hint: 'raise the limit of open files (ulimit -n)' }],
  ENFILE: [{ reason: 'resources' }],
  ENOMEM: [{ reason: 'resources' }],
  EAGAIN: [{ reason: 'contention' }],
  ENOSPC: [{ reason: 'no-space' }],
  EIO: [{ reason: 'io' }],
}

/** Which rows a system call belongs to: the same errno means another thing for the device than for the image. */
export type OpenRole =
  | 'open /dev/loop-control'
  | 'open device'
  | 'open backing file'
  | 'open backing file for writing'
  | 'create destination'

/** The LoopError for a call that the kernel refused. */
export function explain(failure: Failure, role?: OpenRole): LoopError {
  const { call, errno, path, backingFile, holders, effort } = failure
  const code = errnoName(errno)
  const candidates = [...(CAUSES[role ?? call]?.[code] ?? []), ...(ANY_CALL[code] ?? [])]
  const cause = candidates.find(({ when }) => when === undefined || when(failure))
  const detail = said(cause?.detail, failure) ?? errnoDescription(errno)
  const isIoctl = /^[A-Z]/.test(call)
  return new LoopError({
    reason: cause?.reason ?? 'unknown',
    errno,
    syscall: isIoctl ? 'ioctl' : call,
    ioctl: isIoctl ? call : undefined,
    path,
    backingFile,
    holders,
    detail: effort === undefined ? detail : `${detail} (${effort})`,
    hint: said(cause?.hint, failure),
  })
}

function said(text: Cause['detail'], failure: Failure): string | undefined {
  return typeof text === 'function' ? text(failure) : text
}

/** `new backing file is 4096 bytes larger (10240, must be 6144)`. */
export function sizeDifference(now: bigint, then: bigint): string {
  const difference = then > now ? `${then - now} bytes larger` : `${now - then} bytes smaller`
  return `new backing file is ${difference} (${then}, must be ${now})`
}

// The readings. Each answers from one look at the kernel's state.

function attachedInfo({ fd }: Failure): LoopInfo64 | undefined {
  if (fd === undefined) return undefined
  const info = newInfo()
  return binding().loopGetStatus64Sync(fd, info) < 0 ? undefined : decodeInfo(info)
}

function isGoing({ number }: Failure): boolean {
  return number !== undefined && sysfs.isBound(number)
}

function deviceIsClosed({ fd }: Failure): boolean {
  return fd !== undefined && typeof fstatSync(fd) === 'number'
}

function backingIsOpen({ backingFd }: Failure): boolean {
  return backingFd !== undefined && typeof fstatSync(backingFd) !== 'number'
}

function isFileOrBlockDevice(fd: number | undefined): boolean {
  if (fd === undefined) return false
  const stat = fstatSync(fd)
  return typeof stat !== 'number' && (stat.isFile() || stat.isBlockDevice())
}

function backingIsFreeLoop({ backingFd }: Failure): boolean {
  // Any answer but ENXIO: it is no loop device, or it is attached.
  return backingFd !== undefined && binding().loopGetStatus64Sync(backingFd, newInfo()) === -6
}

function backingFileOf(number: number | undefined): string {
  const text = number === undefined ? undefined : sysfs.readBackingFileSync(number)
  return text ?? 'another file'
}

function nodeNumbers(number: number | undefined): string {
  const numbers = number === undefined ? undefined : sysfs.readDeviceNumbers(number)
  return (numbers ?? `7:${number}`).replace(':', ' ')
}

/** A path for messages about something that was given as a descriptor. */
export function pathOfDescriptor(fd: number): string {
  const target = readLinkSync(`/proc/self/fd/${fd}`)
  return typeof target === 'string' && existsSync(target) ? target : `descriptor ${fd}`
}
