/**
 * From (call, errno) to the cause. One table, in the kernel's own order of checks; the first entry that applies wins.
 * It is looked at only after a failure, it only reads, and the kernel's errno is kept whatever it finds. The readings
 * are those of evidence.ts. A new cause is one entry.
 */

import { constants } from 'node:os'
import { errnoDescription, errnoName, LoopError } from './errors.ts'
import {
  askStatus,
  backingFileOf,
  backingIsOpen,
  backingIsPathOnly,
  canMakeNodes,
  type Cause,
  compareSizes,
  describeAlignment,
  describeBlockSize,
  describeNodeOf,
  describePrivileges,
  describeSandbox,
  describeType,
  deviceIsClosed,
  type Failure,
  filesystemOf,
  freeLoopUnder,
  inUserNamespace,
  isAdministrator,
  isAttached,
  isDriverLoaded,
  isGoing,
  isImpossibleBlockSize,
  isLoopDevice,
  isNeitherFileNorBlockDevice,
  isReadOnly,
  isScanned,
  isSysfsMounted,
  isThere,
  nodeNumbersOf,
  nodevMount,
  overridesModes,
  partitionFault,
  partitionIsThere,
  partitionPath,
  sizeDifference,
  type Text,
} from './evidence.ts'
import { adviseHolders, describeHolders, findHoldersSoon } from './holders.ts'
import { hasLoopConfigure } from './kernel/features.ts'
import { LO_FLAGS_READ_ONLY, LOOP_NUMBER_MAX } from './kernel/uapi.ts'

export type { Failure } from './evidence.ts'

const CONFIGURE_FLAGS = 0x1d

const RUN_AS_ROOT = 'run as root or add CAP_SYS_ADMIN'
const LEAVE_USER_NAMESPACE =
  'run it in the initial user namespace: as root, in a container without rootless mode and without a user namespace'
const ALLOW_DEVICES =
  "allow the devices: docker run --device-cgroup-rule 'b 7:* rmw' --device-cgroup-rule 'b 259:* rmw' --device-cgroup-rule 'c 10:237 rwm'"
const ALLOW_MKNOD =
  "let the container make nodes: docker or podman run --cap-add MKNOD --device-cgroup-rule 'b 7:* rmw' --device-cgroup-rule 'b 259:* rmw'; Kubernetes: securityContext.capabilities.add: [MKNOD]"
const ALLOW_CALLS = 'let the sandbox allow the ioctls of loop devices, in docker with --security-opt seccomp=PROFILE'
const LOAD_DRIVER = 'load the module (modprobe loop); in a container, pass the node in: --device /dev/loop-control'

const inUserNamespaceCause: Cause = {
  reason: 'permission',
  when: inUserNamespace,
  detail: 'a user namespace has no rights on the devices of the machine',
  hint: LEAVE_USER_NAMESPACE,
}

/** The kernel's own order: the mount, the node's mode, the device cgroup, a security module. */
const openRefused: Cause[] = [
  {
    reason: 'permission',
    when: ({ errno }) => errno === -constants.errno.EPERM,
    detail: 'the device cgroup of this process denies it',
    hint: ALLOW_DEVICES,
  },
  {
    reason: 'permission',
    when: (failure) => nodevMount(failure) !== undefined,
    detail: (failure) => `${nodevMount(failure)} is mounted nodev`,
    hint: (failure) => `mount it without nodev: mount -o remount,dev ${nodevMount(failure)}`,
  },
  inUserNamespaceCause,
  {
    reason: 'permission',
    when: overridesModes,
    detail: 'a security module (AppArmor, SELinux) denies it',
    hint: 'let its profile allow the node, in docker with --security-opt apparmor=PROFILE',
  },
  {
    reason: 'permission',
    detail: () => `the node's mode denies it: ${describePrivileges()}`,
    hint: 'run as root, or as a member of the group that the node belongs to',
  },
]

const notAdministrator: Cause = {
  reason: 'permission',
  when: () => !isAdministrator(),
  detail: describePrivileges,
  hint: RUN_AS_ROOT,
}

const sandbox: Cause = { reason: 'permission', detail: describeSandbox, hint: ALLOW_CALLS }

/** Calls that want CAP_SYS_ADMIN, or a descriptor open for writing. */
const notAllowed: Cause[] = [inUserNamespaceCause, notAdministrator, sandbox]

const beingDetached: Cause = {
  reason: 'detaching',
  when: isGoing,
  detail: 'the device is being detached, and still held by another process',
  hint: 'wait until it is gone, or leave out the number to get another device',
}

const notAttached: Cause[] = [
  beingDetached,
  { reason: 'not-attached', detail: 'the device has no backing file', hint: 'attach a file first' },
]

const inUse: Cause = {
  reason: 'in-use',
  detail: ({ holders }) => (holders?.length ? describeHolders(holders) : 'somebody else holds the device'),
  hint: ({ holders }) =>
    holders?.length ? adviseHolders(holders) : 'see who holds it with holders(), and let go of it there',
}

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
  hint: 'leave it out for the choice of the kernel',
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
        `flags ${hex((asked?.flags ?? 0) & ~CONFIGURE_FLAGS)} are none that LOOP_CONFIGURE takes (${hex(CONFIGURE_FLAGS)})`,
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

const badPartition: Cause[] = [
  {
    reason: 'bad-partition-table',
    when: (failure) => partitionFault(failure) !== undefined,
    detail: partitionFault,
  },
  { reason: 'bad-partition-table', detail: 'the kernel does not take that partition' },
]

const noPartition: Cause[] = [
  { reason: 'no-such-device', detail: (failure) => `there is no partition ${failure.asked?.partition?.number ?? ''}` },
]

const partitionOverlaps: Cause = {
  reason: 'overlap',
  detail: 'the partition overlaps with another one',
  hint: 'see the others with partitions()',
}

/** Per call or role, per errno. What is not here is looked up in {@link ANY_CALL}. */
const CAUSES: Record<string, Record<string, Cause[]>> = {
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
            ? 'this kernel adds no device while there is a free one'
            : `/dev/loop${number} is there already`,
        hint: 'use it, or leave out the number to get a new one',
      },
    ],
    EINVAL: [
      {
        reason: 'resources',
        detail: ({ number }) =>
          `the kernel has no minor for ${number === undefined ? 'another device' : `number ${number}`} (of ${LOOP_NUMBER_MAX + 1}, shared with partitions)`,
      },
    ],
  },
  'LOOP_CTL_REMOVE': {
    EINVAL: [{ reason: 'no-such-device', detail: 'the kernel does not take that number' }],
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
    EINVAL: [{ reason: 'resources', detail: `all minors are in use (${LOOP_NUMBER_MAX + 1}, shared with partitions)` }],
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
        hint: 'make it as long as the present one, or attach with a size limit that both have',
      },
      restsOnLoop,
      {
        reason: 'size-mismatch',
        when: (failure) => compareSizes(failure) !== undefined,
        detail: 'the present backing file has another size than when it was attached',
        hint: 'refreshCapacity() first, and take a file of that size',
      },
      { reason: 'size-mismatch', detail: 'the new backing file has another size than the present one' },
    ],
  },
  'LOOP_CLR_FD': { ENXIO: notAttached },
  'LOOP_GET_STATUS64': {
    ENXIO: notAttached,
    EINVAL: [{ reason: 'unsupported-kernel', detail: 'the kernel, or a sandbox in its place, does not know the call' }],
    EOVERFLOW: [{ reason: 'unsupported-kernel', detail: 'the kernel answers in a form that is too small' }],
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
  'BLKRRPART': {
    EINVAL: [
      { reason: 'not-attached', when: (failure) => !isAttached(failure), detail: 'the device has no backing file' },
      {
        reason: 'bad-partition-table',
        when: isScanned,
        detail: 'the kernel cannot read the partition table',
      },
      {
        reason: 'partscan-off',
        detail: 'the device was attached without partition scan',
        hint: 'attach with partscan: true, or setStatus({ partscan: true })',
      },
    ],
    EACCES: notAllowed,
    EBUSY: [
      { ...inUse, detail: ({ holders }) => (holders?.length ? describeHolders(holders) : 'a partition is in use') },
    ],
    EIO: [{ reason: 'io', detail: 'the partition table could not be read' }],
  },
  'BLKPG add': {
    EACCES: notAllowed,
    EINVAL: badPartition,
    ENXIO: [{ reason: 'no-such-device', detail: 'the device is going' }],
    EBUSY: [
      {
        reason: 'device-exists',
        when: partitionIsThere,
        detail: (failure) => `${partitionPath(failure)} is there already`,
      },
      partitionOverlaps,
    ],
  },
  'BLKPG resize': { EACCES: notAllowed, EINVAL: badPartition, ENXIO: noPartition, EBUSY: [partitionOverlaps] },
  'BLKPG delete': {
    EACCES: notAllowed,
    EINVAL: badPartition,
    ENXIO: noPartition,
    EBUSY: [{ ...inUse, detail: (failure) => `${partitionPath(failure)} is in use` }],
  },
  'BLKGETDISKSEQ': {
    EINVAL: [{ reason: 'unsupported-kernel', detail: 'disk sequence numbers came with kernel 5.15' }],
  },
  'open /dev/loop-control': {
    EACCES: openRefused,
    EPERM: openRefused,
    ENOENT: [
      {
        reason: 'node-missing',
        when: isDriverLoaded,
        detail: 'the kernel has the loop driver, but /dev has no node for it',
        hint: 'in a container, pass the node in: --device /dev/loop-control; elsewhere: mknod /dev/loop-control c 10 237',
      },
      { reason: 'no-loop-driver', detail: 'there is no such node', hint: LOAD_DRIVER },
    ],
    ENODEV: [
      { reason: 'no-loop-driver', detail: 'the kernel has no loop driver and could not load one', hint: LOAD_DRIVER },
    ],
    ENXIO: [
      { reason: 'no-loop-driver', detail: 'the kernel has no loop driver and could not load one', hint: LOAD_DRIVER },
    ],
  },
  'open device': {
    EACCES: openRefused,
    EPERM: openRefused,
    ENOENT: [
      {
        reason: 'node-missing',
        when: isThere,
        detail: 'the kernel has the device, but /dev has no node for it',
        hint: (failure) =>
          `make the node: mknod ${failure.path} b ${nodeNumbersOf(failure)}; attach() does where it may`,
      },
      { reason: 'no-such-device', detail: 'there is no such device' },
    ],
    ENXIO: [
      beingDetached,
      { reason: 'no-such-device', detail: 'the node is there, but the kernel has no such device' },
    ],
    EBUSY: [inUse],
    ENOTTY: [
      {
        reason: 'not-a-loop-device',
        detail: describeNodeOf,
        hint: (failure) => `it should be b ${nodeNumbersOf(failure)}`,
      },
    ],
  },
  'make node': {
    EPERM: [
      {
        reason: 'node-missing',
        when: inUserNamespace,
        detail: 'this /dev has no node for it, and root of a user namespace can make none',
        hint: LEAVE_USER_NAMESPACE,
      },
      {
        reason: 'node-missing',
        when: () => !canMakeNodes(),
        detail: 'this /dev has no node for it, and making one needs CAP_MKNOD',
        hint: ALLOW_MKNOD,
      },
      {
        reason: 'node-missing',
        detail: 'this /dev has no node for it, and the device cgroup denies making one',
        hint: ALLOW_DEVICES,
      },
    ],
    EACCES: [
      {
        reason: 'node-missing',
        detail: () => `this /dev has no node for it, and none may be made: ${describePrivileges()}`,
        hint: ALLOW_MKNOD,
      },
    ],
    EROFS: [
      {
        reason: 'node-missing',
        detail: 'this /dev has no node for it, and is read-only',
        hint: (failure) => `make the node where /dev comes from: mknod ${failure.path} b ${nodeNumbersOf(failure)}`,
      },
    ],
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
  'open backing file': {
    ENOENT: [{ reason: 'no-such-file' }],
    ENOTDIR: [{ reason: 'no-such-file' }],
    ELOOP: [{ reason: 'no-such-file' }],
    ENAMETOOLONG: [{ reason: 'no-such-file' }],
    EACCES: [{ reason: 'permission', detail: () => `the file may not be opened: ${describePrivileges()}` }],
    EPERM: [{ reason: 'permission', detail: () => `the file may not be opened: ${describePrivileges()}` }],
    EISDIR: [{ reason: 'not-a-file-or-block-device' }],
    EBUSY: [
      {
        reason: 'in-use',
        detail: 'the block device is mounted or held otherwise',
        hint: 'unmount it first, or attach with readOnly: true',
      },
    ],
    ENXIO: [{ reason: 'not-a-file-or-block-device', detail: 'the node has no device behind it' }],
  },
  'create destination': {
    ENOENT: [{ reason: 'no-such-file', detail: 'the folder does not exist' }],
    ENOTDIR: [{ reason: 'no-such-file' }],
    ENAMETOOLONG: [{ reason: 'no-such-file' }],
    ELOOP: [{ reason: 'no-such-file' }],
    EROFS: [{ reason: 'permission', detail: 'the filesystem is mounted read-only' }],
    EACCES: [{ reason: 'permission', detail: () => `the file may not be made: ${describePrivileges()}` }],
    EPERM: [{ reason: 'permission', detail: () => `the file may not be made: ${describePrivileges()}` }],
    EEXIST: [{ reason: 'destination-exists' }],
    EDQUOT: [{ reason: 'no-space' }],
    EFBIG: [{ reason: 'no-space', detail: 'the filesystem takes no file of that size' }],
  },
  // Used only where the same file can be opened for reading.
  'open backing file for writing': Object.fromEntries(
    ['EACCES', 'EPERM', 'EROFS', 'ETXTBSY'].map((code) => [
      code,
      [
        {
          reason: 'backing-not-writable' as const,
          detail: 'cannot be opened for writing',
          hint: 'it can be read: attach with readOnly: true, or make it writable',
        },
      ],
    ]),
  ),
}

/** Filesystems whose files have no content of their own that the driver could read. */
const PSEUDO_FILESYSTEMS = new Set(['proc', 'debugfs', 'tracefs'])

const ANY_CALL: Record<string, Cause[]> = {
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
  | 'read /sys'
  | 'BLKPG add'
  | 'BLKPG resize'
  | 'BLKPG delete'

/** The LoopError for a call that the kernel refused. Reads what does not wait. */
export function explain(failure: Failure, role?: Role): LoopError {
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

/** Failures whose cause LOOP_GET_STATUS64 helps to tell. */
const ASKED_FOR = new Set(['EBUSY', 'EINVAL'])

/** The failure, with what the device says of itself within 50 ms where that helps to tell the cause. */
export async function withStatus(failure: Failure): Promise<Failure> {
  if (failure.status !== undefined || !ASKED_FOR.has(errnoName(failure.errno))) return failure
  return { ...failure, status: await askStatus(failure) }
}

/** {@link explain}, after asking the device what it is and, where somebody uses it, looking who. */
export async function diagnose(failure: Failure, role?: Role): Promise<LoopError> {
  const known = await withStatus(failure)
  const error = explain(known, role)
  const { number, fd, holders } = failure
  if (error.reason !== 'in-use' || number === undefined || holders) return error
  const found = await findHoldersSoon(number, fd === undefined ? [] : [fd])
  return found.length > 0 ? explain({ ...known, holders: found }, role) : error
}

function said(text: Text | undefined, failure: Failure): string | undefined {
  return typeof text === 'function' ? text(failure) : text
}

function hex(flags: number): string {
  return `0x${(flags >>> 0).toString(16)}`
}
