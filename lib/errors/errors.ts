/** LoopError: what went wrong, in the shape of Node's own system errors, and which of the causes it was. */

import { constants } from 'node:os'
import type { getSystemErrorMap } from 'node:util'
import { limitStack, OWN_FRAMES, restoreStackLimit } from '../common/stack.ts'
import { Bundled } from '../kernel/addon.ts'
import { binding } from '../kernel/binding.ts'
import { listPrebuilds } from '../kernel/prebuilds.ts'
import { decide } from '../kernel/trace.ts'
import type { Holder } from './holders.ts'

/**
 * Why an operation failed. Programs can rely on the reasons; messages may improve. One errno can have many reasons
 * (EINVAL from LOOP_CONFIGURE has eight causes), and one reason can come with several codes.
 */
export type LoopErrorReason =
  | 'permission'
  | 'no-loop-driver'
  | 'node-missing'
  | 'no-such-device'
  | 'device-exists'
  | 'not-attached'
  | 'already-attached'
  | 'detaching'
  | 'in-use'
  | 'not-read-only'
  | 'size-mismatch'
  | 'would-shut-down-filesystem'
  | 'no-such-file'
  | 'backing-not-writable'
  | 'not-a-file-or-block-device'
  | 'backed-by-itself'
  | 'backing-loop-not-attached'
  | 'overlap'
  | 'direct-io-unavailable'
  | 'block-size'
  | 'dirty-cache'
  | 'replaced'
  | 'contention'
  | 'content-differs'
  | 'destination-exists'
  | 'bad-partition-table'
  | 'no-such-partition'
  | 'partscan-off'
  | 'not-a-loop-device'
  | 'closed'
  | 'timeout'
  | 'unsupported-kernel'
  | 'unsupported-platform'
  | 'resources'
  | 'no-space'
  | 'io'
  | 'unknown-filesystem'
  | 'filesystem-refused'
  | 'not-mounted'
  | 'target'
  | 'unknown'

/** What a {@link LoopError} is made of. */
export interface LoopErrorFields {
  reason: LoopErrorReason
  /** Negative, as the kernel gave it. */
  errno: number
  syscall: string
  /** What happened, without the code and the call. */
  detail: string
  ioctl?: string | undefined
  path?: string | undefined
  backingFile?: string | undefined
  hint?: string | undefined
  holders?: Holder[] | undefined
  cause?: unknown
}

/** Every failure of this library that is not a wrong argument (those are TypeError and RangeError) or an abort. */
export class LoopError extends Error {
  static {
    // On the prototype, as with Node's own errors: not an own property that every print of the error repeats.
    Object.defineProperty(this.prototype, 'name', { value: 'LoopError', configurable: true, writable: true })
  }

  /** The errno's name, `EBUSY`. */
  readonly code: string
  /** The errno as Node gives it: negative. */
  readonly errno: number
  /** The call that failed: `ioctl`, `open`, `stat`, ... */
  readonly syscall: string
  /** The name of the ioctl that failed, if it was an ioctl: `LOOP_CHANGE_FD`. */
  declare readonly ioctl?: string
  /** The path for which the call failed: the device, or the image if opening the image failed. */
  declare readonly path?: string
  /** The backing file of the operation. */
  declare readonly backingFile?: string
  /** Which of the possible causes it was. */
  readonly reason: LoopErrorReason
  /** What to do about it, in one sentence. */
  declare readonly hint?: string
  /** Who uses the device, if that is the reason. */
  declare readonly holders?: Holder[]

  constructor(fields: LoopErrorFields) {
    const { reason, errno, syscall, detail, ioctl, path, backingFile, hint, holders, cause } = fields
    const code = errnoName(errno)
    const subject = [ioctl ?? syscall, path].filter((word) => word !== undefined).join(' ')
    // What the caller has to see comes after all frames of this library.
    const limit = limitStack(Error.stackTraceLimit + OWN_FRAMES)
    super(`${code}: ${subject}: ${detail}`, cause === undefined ? undefined : { cause })
    restoreStackLimit(limit)
    this.code = code
    this.errno = errno
    this.syscall = syscall
    this.reason = reason
    if (ioctl !== undefined) this.ioctl = ioctl
    if (path !== undefined) this.path = path
    if (backingFile !== undefined) this.backingFile = backingFile
    if (hint !== undefined) this.hint = hint
    if (holders !== undefined) this.holders = holders
    decide(() => `${reason}: ${this.message}`)
  }

  /** Whether `error` is a LoopError, and, if you give a reason, whether it has that reason. */
  static is<Reason extends LoopErrorReason = LoopErrorReason>(
    error: unknown,
    reason?: Reason,
  ): error is LoopError & { readonly reason: Reason } {
    return error instanceof LoopError && (reason === undefined || error.reason === reason)
  }
}

/** For a refusal of our own, where no kernel call failed: the code that goes with the reason. */
type OwnReason =
  | 'in-use'
  | 'overlap'
  | 'contention'
  | 'already-attached'
  | 'detaching'
  | 'would-shut-down-filesystem'
  | 'replaced'
  | 'closed'
  | 'timeout'
  | 'content-differs'
  | 'destination-exists'
  | 'bad-partition-table'
  | 'no-such-partition'
  | 'no-space'
  | 'size-mismatch'
  | 'not-read-only'
  | 'block-size'
  | 'direct-io-unavailable'
  | 'not-a-file-or-block-device'
  | 'backing-not-writable'
  | 'not-attached'
  | 'no-such-device'
  | 'not-a-loop-device'
  | 'unsupported-kernel'
  | 'unsupported-platform'
  | 'io'
  | 'unknown-filesystem'
  | 'filesystem-refused'
  | 'not-mounted'
  | 'target'
  | 'unknown'

const OWN_CODES: Record<OwnReason, keyof typeof constants.errno> = {
  'in-use': 'EBUSY',
  'overlap': 'EBUSY',
  'contention': 'EBUSY',
  'already-attached': 'EBUSY',
  'detaching': 'EBUSY',
  'would-shut-down-filesystem': 'EBUSY',
  'replaced': 'ESTALE',
  'closed': 'EBADF',
  'timeout': 'ETIMEDOUT',
  'content-differs': 'EILSEQ',
  'destination-exists': 'EEXIST',
  'bad-partition-table': 'EINVAL',
  'no-such-partition': 'ENOENT',
  'no-space': 'ENOSPC',
  'size-mismatch': 'EINVAL',
  'not-read-only': 'EINVAL',
  'block-size': 'EINVAL',
  'direct-io-unavailable': 'EINVAL',
  'not-a-file-or-block-device': 'EINVAL',
  'backing-not-writable': 'EACCES',
  'not-attached': 'ENXIO',
  'no-such-device': 'ENODEV',
  'not-a-loop-device': 'ENOTTY',
  'unsupported-kernel': 'ENOTSUP',
  'unsupported-platform': 'ENOTSUP',
  'io': 'EIO',
  'unknown-filesystem': 'EINVAL',
  'filesystem-refused': 'EINVAL',
  'not-mounted': 'EINVAL',
  'target': 'EINVAL',
  'unknown': 'EIO',
}

/** An error that no kernel call reported: a rule of this library, checked before the kernel could do harm. */
export function refusal(
  reason: OwnReason,
  syscall: string,
  detail: string,
  more: Pick<LoopErrorFields, 'path' | 'backingFile' | 'hint' | 'holders' | 'ioctl' | 'cause'> = {},
): LoopError {
  return new LoopError({ reason, errno: -constants.errno[OWN_CODES[reason]], syscall, detail, ...more })
}

let systemErrors: ReturnType<typeof getSystemErrorMap> | undefined

/** Node builds a new map at every call, which takes 20 us: it is kept. Imported, node:util would delay every start. */
function knownErrors(): ReturnType<typeof getSystemErrorMap> {
  return (systemErrors ??= process.getBuiltinModule('node:util').getSystemErrorMap())
}

const otherNames = new Map<number, string>([
  ...Object.entries(constants.errno).map(([name, value]) => [-value, name] as const),
  // The kernel's, and neither libuv's nor in node:os
  [-15, 'ENOTBLK'],
  [-117, 'EUCLEAN'],
  [-123, 'ENOMEDIUM'],
  [-124, 'EMEDIUMTYPE'],
])

/** `EBUSY` for -16; of two names for one number that of Node's own errors. */
export function errnoName(errno: number): string {
  return knownErrors().get(errno)?.[0] ?? otherNames.get(errno) ?? `E${-errno}`
}

/** `resource busy or locked` for -16. */
export function errnoDescription(errno: number): string {
  return knownErrors().get(errno)?.[1] ?? 'unknown error'
}

/** Rejects every public call where there is no loop driver to be had: another system, or no binary for this one. */
export function assertSupported(): void {
  if (process.platform !== 'linux') {
    throw refusal('unsupported-platform', 'load', `loop devices exist on Linux only, this is ${process.platform}`)
  }
  try {
    binding()
  } catch (cause) {
    if (cause instanceof Bundled) {
      throw refusal('unsupported-platform', 'load', cause.message, {
        hint: "keep it out of the bundle with external: ['loopctl'], and install it beside that",
        cause,
      })
    }
    const said = cause instanceof Error ? cause.message.split('\n', 1)[0] : String(cause)
    const detail = `no usable binary for linux-${process.arch}; there is ${listPrebuilds().join(', ') || 'none'}: ${said}`
    throw refusal('unsupported-platform', 'load', detail, {
      hint: 'build one in a checkout of the sources on such a machine: npm ci && npx prebuildify --napi --tag-libc && npm pack',
      cause,
    })
  }
}
