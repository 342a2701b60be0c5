/**
 * What the kernel answers, per ioctl: its errnos in the order of its checks, on all versions, and for each the reasons
 * that are right where nothing is wrong but that answer.
 */

import type { LoopErrorReason } from '../../lib/index.ts'

type Reasons = readonly LoopErrorReason[]

/** `raw`: the calls of loopctl/ioctl that make it, by the names of the addon. */
interface Listed {
  raw: readonly string[]
  errnos: Readonly<Record<string, Reasons>>
}

const NOT_ATTACHED: Reasons = ['not-attached', 'detaching']
/** What the kernel says of wrong arguments, which this library does not make: it understands something else then. */
const OF_A_CALLER: Reasons = ['unsupported-kernel']

const attaching: Readonly<Record<string, Reasons>> = {
  EFAULT: OF_A_CALLER,
  EBADF: ['backed-by-itself', 'closed'],
  EINVAL: ['not-a-file-or-block-device', 'backing-loop-not-attached', 'block-size', 'unsupported-kernel'],
  EBUSY: ['already-attached', 'in-use', 'detaching', 'contention'],
  // Another one is tried then, and in the end they all went
  ENXIO: ['no-such-device', 'contention'],
  ENOMEM: ['resources'],
  EOVERFLOW: ['size-mismatch'],
  EPERM: ['permission'],
  EACCES: ['permission'],
}

export const LISTED: Readonly<Record<string, Listed>> = {
  LOOP_CTL_ADD: {
    raw: ['loopCtlAdd'],
    errnos: { ENOMEM: ['resources'], EEXIST: ['device-exists', 'contention'], EINVAL: ['resources'] },
  },
  LOOP_CTL_REMOVE: {
    raw: ['loopCtlRemove'],
    errnos: { EINVAL: ['no-such-device'], ENODEV: ['no-such-device', 'contention'], EBUSY: ['in-use'] },
  },
  LOOP_CTL_GET_FREE: { raw: ['loopCtlGetFree'], errnos: { ENOMEM: ['resources'], EINVAL: ['resources'] } },
  LOOP_CONFIGURE: { raw: ['loopConfigure'], errnos: attaching },
  LOOP_SET_FD: { raw: ['loopSetFd'], errnos: { ...attaching, EFBIG: ['unsupported-kernel'] } },
  LOOP_CLR_FD: { raw: ['loopClrFd'], errnos: { ENXIO: NOT_ATTACHED } },
  LOOP_CHANGE_FD: {
    raw: ['loopChangeFd'],
    errnos: {
      EBADF: ['backed-by-itself', 'closed'],
      EINVAL: ['not-read-only', 'not-a-file-or-block-device', 'backing-loop-not-attached', 'size-mismatch'],
      ENXIO: NOT_ATTACHED,
    },
  },
  LOOP_SET_STATUS64: {
    raw: ['loopSetStatus64'],
    errnos: {
      EPERM: ['permission'],
      EFAULT: OF_A_CALLER,
      // Between LOOP_SET_FD and this somebody else detached it, and at every other device as well
      ENXIO: [...NOT_ATTACHED, 'contention'],
      EAGAIN: ['dirty-cache'],
      EINVAL: OF_A_CALLER,
      EOVERFLOW: ['size-mismatch'],
      EFBIG: ['unsupported-kernel'],
    },
  },
  LOOP_GET_STATUS64: {
    raw: ['loopGetStatus64'],
    errnos: {
      EINVAL: OF_A_CALLER,
      ENXIO: NOT_ATTACHED,
      ESTALE: ['io'],
      EIO: ['io'],
      EFAULT: OF_A_CALLER,
    },
  },
  LOOP_SET_CAPACITY: {
    raw: ['loopSetCapacity'],
    errnos: { EPERM: ['permission'], ENXIO: NOT_ATTACHED, EFBIG: ['unsupported-kernel'] },
  },
  LOOP_SET_DIRECT_IO: {
    raw: ['loopSetDirectIo'],
    errnos: { EPERM: ['permission'], ENXIO: NOT_ATTACHED, EINVAL: ['direct-io-unavailable'] },
  },
  LOOP_SET_BLOCK_SIZE: {
    raw: ['loopSetBlockSize'],
    errnos: {
      EPERM: ['permission'],
      EBUSY: ['in-use'],
      ENXIO: NOT_ATTACHED,
      EINVAL: ['block-size'],
      EAGAIN: ['dirty-cache'],
    },
  },
  BLKGETSIZE64: { raw: ['blkGetSize64'], errnos: { EFAULT: OF_A_CALLER } },
  BLKSSZGET: { raw: ['blkSszGet'], errnos: { EFAULT: OF_A_CALLER } },
  BLKROGET: { raw: ['blkRoGet'], errnos: { EFAULT: OF_A_CALLER } },
  BLKROSET: { raw: ['blkRoSet'], errnos: { EFAULT: OF_A_CALLER, EACCES: ['permission'] } },
  BLKFLSBUF: { raw: ['blkFlsBuf'], errnos: { EACCES: ['permission'] } },
  BLKRRPART: {
    raw: ['blkRrPart'],
    errnos: { EINVAL: ['partscan-off', 'bad-partition-table'], EACCES: ['permission'], EBUSY: ['in-use'], EIO: ['io'] },
  },
  BLKPG: {
    raw: ['blkPgAddPartition', 'blkPgResizePartition', 'blkPgDelPartition'],
    errnos: {
      EFAULT: OF_A_CALLER,
      EACCES: ['permission'],
      EINVAL: ['bad-partition-table'],
      ENXIO: ['no-such-device'],
      EBUSY: ['in-use', 'overlap', 'device-exists'],
    },
  },
  BLKGETDISKSEQ: { raw: ['blkGetDiskSeq'], errnos: { EFAULT: OF_A_CALLER, EINVAL: ['unsupported-kernel'] } },
}

/** Tried with every ioctl. Where the kernel is not known to answer so, `unknown` is no mistake. */
export const ANYWHERE: Readonly<Record<string, Reasons>> = {
  EPERM: ['permission'],
  ENOMEM: ['resources'],
  EIO: ['io'],
  ENOSYS: ['unsupported-kernel'],
  EINTR: ['unknown'],
}
