/**
 * From (call, errno) to the cause. One table, in the kernel's own order of checks; the first entry that applies wins.
 * It is looked at only after a failure, it only reads, and the kernel's errno is kept whatever it finds. The readings
 * are those of evidence.ts. A new cause is one entry.
 */

import { hasLoopConfigure } from '../kernel/features.ts'
import { LO_FLAGS_READ_ONLY, LOOP_NUMBER_MAX } from '../kernel/uapi.ts'
import { MOUNT_CAUSES } from './causes-mount.ts'
import { OPEN_CAUSES } from './causes-open.ts'
import { PARTITION_CAUSES } from './causes-partition.ts'
import { sandbox, notAllowed, beingDetached, inUse } from './causes-shared.ts'
import {
  backingFileOf,
  backingIsOpen,
  backingIsPathOnly,
  type Cause,
  compareSizes,
  describeAlignment,
  describeBlockSize,
  describeType,
  deviceIsClosed,
  filesystemOf,
  freeLoopUnder,
  isAttached,
  isGoing,
  isImpossibleBlockSize,
  isLoopDevice,
  isNeitherFileNorBlockDevice,
  isReadOnly,
  isSysfsMounted,
  isThere,
  sizeDifference,
} from './evidence.ts'
import { describeHolders } from './holders.ts'

export { type Failure } from './evidence.ts'

const CONFIGURE_FLAGS = 0x1d

const notAttached: Cause[] = [
  beingDetached,
  { reason: 'not-attached', detail: 'the device has no backing file', hint: 'attach a file first' },
]

const badBacking: Cause[] = [
  { reason: 'closed', when: deviceIsClosed, detail: 'the descriptor is not open' },
  {
    reason: 'closed',
    when: backingIsPathOnly,
    detail: 'the descriptor of the backing file was opened with O_PATH, and cannot be read',
    hint: 'open it for reading',
  },
  {
    reason: 'backed-by-itself',
    when: backingIsOpen,
    detail: ({ backingFile, number }) => `${backingFile ?? 'the backing file'} leads back to /dev/loop${number} itself`,
    hint: 'take a file, or a device that is not backed by this one',
  },
  { reason: 'closed', detail: 'the descriptor of the backing file is not open' },
]

const unusableBacking: Cause[] = [
  {
    reason: 'backing-loop-not-attached',
    when: (failure) => freeLoopUnder(failure) !== undefined,
    detail: (failure) => `the backing file rests on ${freeLoopUnder(failure)}, which has no backing file itself`,
    hint: (failure) => `attach a file to ${freeLoopUnder(failure)} first`,
  },
  {
    reason: 'not-a-file-or-block-device',
    when: isNeitherFileNorBlockDevice,
    detail: describeType,
    hint: 'take a regular file or a block device',
  },
]

/** In sysfs it looks attached until it is gone. */
const restsOnLoop: Cause = {
  reason: 'backing-loop-not-attached',
  when: isLoopDevice,
  detail: 'the backing file rests on a loop device that is just being detached',
}

/** What is left of EINVAL when everything else was ruled out: kernels 6.15 and later want read_iter and write_iter. */
const oddFilesystem: Cause = {
  reason: 'not-a-file-or-block-device',
  detail: (failure) =>
    `the driver cannot read or write files of that filesystem (${filesystemOf(failure) ?? 'unknown'})`,
  hint: 'copy it to an ordinary filesystem',
}

const dirtyCache: Cause = {
  reason: 'dirty-cache',
  detail: 'the page cache of the device could not be emptied: somebody is reading it',
  hint: 'try again when the reader, often udev, is done',
}

const encryption: Cause = {
  reason: 'unsupported-kernel',
  detail: 'encryption was taken out of the loop driver',
  hint: 'encrypt with dm-crypt on top of the device',
}

const impossibleBlockSize: Cause = {
  reason: 'block-size',
  detail: describeBlockSize,
  hint: 'leave out the block size, and the kernel chooses one',
}

const beyondSectors: Cause = {
  reason: 'unsupported-kernel',
  detail: 'this 32-bit kernel counts fewer sectors than the file has',
}

const beyondLongLong: Cause = {
  reason: 'size-mismatch',
  detail: 'offset or size limit is beyond 2^63 - 1',
}

const otherLayout: Cause = {
  reason: 'unsupported-kernel',
  detail: 'the kernel, or a sandbox in its place, cannot read the structure',
}

const setStatus: Record<string, Cause[]> = {
  EPERM: notAllowed,
  ENXIO: notAttached,
  EAGAIN: [dirtyCache],
  EINVAL: [otherLayout],
  EOVERFLOW: [beyondLongLong],
  EFBIG: [beyondSectors],
}

const configure: Record<string, Cause[]> = {
  EBADF: badBacking,
  EBUSY: [
    {
      reason: 'already-attached',
      when: isAttached,
      detail: (failure) => `the device is attached already, to ${backingFileOf(failure)}`,
      hint: 'leave out the number to get a free device',
    },
    beingDetached,
    inUse,
  ],
  ENXIO: [{ reason: 'no-such-device', detail: 'the device was removed just now' }],
  EINVAL: [
    {
      reason: 'unsupported-kernel',
      when: ({ call, fd }) => call === 'LOOP_CONFIGURE' && fd !== undefined && !hasLoopConfigure(fd),
      detail: 'LOOP_CONFIGURE came with kernel 5.8',
      hint: 'use LOOP_SET_FD and LOOP_SET_STATUS64, as attach() does',
    },
    ...unusableBacking,
    {
      reason: 'unsupported-kernel',
      when: ({ asked }) => ((asked?.flags ?? 0) & ~CONFIGURE_FLAGS) !== 0,
      detail: ({ asked }) =>
        `LOOP_CONFIGURE does not accept flags ${hex((asked?.flags ?? 0) & ~CONFIGURE_FLAGS)}, only ${hex(CONFIGURE_FLAGS)}`,
    },
    { ...impossibleBlockSize, when: isImpossibleBlockSize },
    { ...encryption, when: ({ asked }) => asked?.encryption === true },
    restsOnLoop,
    oddFilesystem,
  ],
  EOVERFLOW: [beyondLongLong],
  EFBIG: [beyondSectors],
}

const needsAdministrator: Record<string, Cause[]> = { EACCES: notAllowed }

/** Per call or role, per errno. What is not here is looked up in {@link ANY_CALL}. */
export const CAUSES: Record<string, Record<string, Cause[]>> = {
  ...OPEN_CAUSES,
  ...MOUNT_CAUSES,
  ...PARTITION_CAUSES,
  'LOOP_CTL_ADD': {
    EEXIST: [
      {
        reason: 'contention',
        when: (failure) => failure.number !== undefined && isSysfsMounted() && !isThere(failure),
        detail: ({ number }) => `/dev/loop${number} is just being removed`,
        hint: 'try again in a moment',
      },
      {
        reason: 'device-exists',
        detail: ({ number }) =>
          number === undefined
            ? 'this kernel adds no device while another one is free'
            : `/dev/loop${number} exists already`,
        hint: 'use it, or leave out the number to get a new one',
      },
    ],
    EINVAL: [
      {
        reason: 'resources',
        detail: ({ number }) =>
          `the kernel has no minor number left for ${number === undefined ? 'another device' : `device ${number}`} (there are ${LOOP_NUMBER_MAX + 1}, shared with partitions)`,
      },
    ],
  },
  'LOOP_CTL_REMOVE': {
    EINVAL: [{ reason: 'no-such-device', detail: 'the kernel does not accept that number' }],
    ENODEV: [
      {
        reason: 'contention',
        when: isThere,
        detail: ({ number }) => `/dev/loop${number} is just being made or removed`,
        hint: 'try again in a moment',
      },
      { reason: 'no-such-device', detail: 'there is no device of that number' },
    ],
    EBUSY: [
      {
        reason: 'in-use',
        when: isGoing,
        detail: (failure) => `the device is attached to ${backingFileOf(failure)}`,
        hint: 'detach it first',
      },
      {
        ...inUse,
        detail: ({ holders }) => (holders?.length ? describeHolders(holders) : 'somebody has the device open'),
      },
    ],
  },
  'LOOP_CTL_GET_FREE': {
    EINVAL: [
      {
        reason: 'resources',
        detail: `all minor numbers are in use (there are ${LOOP_NUMBER_MAX + 1}, shared with partitions)`,
      },
    ],
  },
  'LOOP_CONFIGURE': configure,
  'LOOP_SET_FD': configure,
  'LOOP_CHANGE_FD': {
    EBADF: badBacking,
    ENXIO: notAttached,
    EINVAL: [
      {
        reason: 'not-read-only',
        when: (failure) =>
          failure.status
            ? (failure.status.flags & LO_FLAGS_READ_ONLY) === 0
            : failure.status !== null && !isReadOnly(failure),
        detail: 'the backing file of a writable device cannot be changed',
        hint: 'attach with readOnly: true',
      },
      { ...oddFilesystem, when: (failure) => PSEUDO_FILESYSTEMS.has(filesystemOf(failure) ?? '') },
      ...unusableBacking,
      {
        reason: 'size-mismatch',
        when: (failure) => {
          const sizes = compareSizes(failure)
          return sizes !== undefined && sizes.now !== sizes.next
        },
        detail: (failure) => {
          const sizes = compareSizes(failure)
          return sizes && sizeDifference(sizes.now, sizes.next)
        },
        hint: 'make the new file as long as the present one, or attach with a size limit that fits both',
      },
      restsOnLoop,
      {
        reason: 'size-mismatch',
        when: (failure) => compareSizes(failure) !== undefined,
        detail: 'the present backing file has another size than when it was attached',
        hint: 'call refreshCapacity() first, and use a file of that size',
      },
      { reason: 'size-mismatch', detail: 'the new backing file has another size than the present one' },
    ],
  },
  'LOOP_CLR_FD': { ENXIO: notAttached },
  'LOOP_GET_STATUS64': {
    ENXIO: notAttached,
    EINVAL: [{ reason: 'unsupported-kernel', detail: 'the kernel, or a sandbox in its place, does not know the call' }],
    EOVERFLOW: [
      { reason: 'unsupported-kernel', detail: 'the values do not fit into the structure in which the kernel answers' },
    ],
  },
  'LOOP_SET_STATUS64': setStatus,
  'LOOP_SET_CAPACITY': { EPERM: notAllowed, ENXIO: notAttached, EFBIG: [beyondSectors] },
  'LOOP_SET_DIRECT_IO': {
    EPERM: notAllowed,
    ENXIO: notAttached,
    EINVAL: [
      {
        reason: 'direct-io-unavailable',
        detail: (failure) => `the backing file takes no direct I/O as it is attached (${describeAlignment(failure)})`,
        hint: "a logical block size of 4096 and an offset that is a multiple of it may help, else directIO: 'prefer'",
      },
    ],
  },
  'LOOP_SET_BLOCK_SIZE': {
    EPERM: notAllowed,
    EBUSY: [inUse],
    ENXIO: notAttached,
    EINVAL: [impossibleBlockSize],
    EAGAIN: [dirtyCache],
  },
  'BLKROSET': needsAdministrator,
  'BLKFLSBUF': needsAdministrator,
  'BLKGETDISKSEQ': {
    EINVAL: [{ reason: 'unsupported-kernel', detail: 'disk sequence numbers came with kernel 5.15' }],
  },
  'read /sys': {
    ENOENT: [
      {
        reason: 'unsupported-platform',
        detail: 'sysfs is not mounted at /sys',
        hint: 'mount it: mount -t sysfs sysfs /sys',
      },
    ],
  },
}

/** Filesystems whose files have no content of their own that the driver could read. */
const PSEUDO_FILESYSTEMS = new Set(['proc', 'debugfs', 'tracefs'])

export const ANY_CALL: Record<string, Cause[]> = {
  EPERM: [sandbox],
  EACCES: [sandbox],
  EBADF: [{ reason: 'closed', detail: 'the descriptor is not open' }],
  ENOTTY: [
    {
      reason: 'not-a-loop-device',
      detail: ({ call }) =>
        `the descriptor is not that of ${call.startsWith('LOOP_CTL') ? '/dev/loop-control' : 'a whole loop device'}`,
    },
  ],
  EMFILE: [{ reason: 'resources', hint: 'raise the limit of open files (ulimit -n)' }],
  ENFILE: [{ reason: 'resources', hint: "raise the machine's limit of open files (sysctl fs.file-max)" }],
  ENOMEM: [{ reason: 'resources', hint: 'free memory, or raise the limit of this process or its container' }],
  EFAULT: [otherLayout],
  ENOSYS: [{ reason: 'unsupported-kernel', detail: 'the kernel, or a sandbox in its place, does not know the call' }],
  EAGAIN: [{ reason: 'contention' }],
  ENOSPC: [{ reason: 'no-space' }],
  EIO: [{ reason: 'io', hint: 'see what the kernel log says of the disk' }],
  ...Object.fromEntries(
    ['ESTALE', 'ENOTCONN', 'ETIMEDOUT', 'EHOSTDOWN', 'EREMOTEIO'].map((code) => [
      code,
      [{ reason: 'io' as const, hint: 'see whether the server of the filesystem is still there' }],
    ]),
  ),
}

/** Which rows a call belongs to: the same errno means another thing for the device than for the image. */
export type Role =
  | 'open /dev/loop-control'
  | 'open device'
  | 'open backing file'
  | 'open backing file for writing'
  | 'create destination'
  | 'make node'
  | 'target'
  | 'read /sys'
  | 'BLKPG add'
  | 'BLKPG resize'
  | 'BLKPG delete'

function hex(flags: number): string {
  return `0x${(flags >>> 0).toString(16)}`
}
