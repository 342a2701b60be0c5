/** The addon as TypeScript sees it. Every call answers a value >= 0 or the negative errno. */

import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'
import { onPool, onPoolWithin } from './pool.ts'
import { observed } from './seam.ts'

/** One line a call, as in native/calls.cc; each exists as `name` and as `nameSync`. */
export interface Calls {
  loopCtlAdd: [controlFd: number, number: number]
  loopCtlRemove: [controlFd: number, number: number]
  loopCtlGetFree: [controlFd: number]
  loopSetFd: [fd: number, backingFd: number]
  loopChangeFd: [fd: number, backingFd: number]
  loopClrFd: [fd: number]
  loopConfigure: [fd: number, backingFd: number, config: Uint8Array]
  loopConfigureProbe: [fd: number]
  loopGetStatus64: [fd: number, info: Uint8Array]
  loopGetFlags: [fd: number]
  loopSetStatus64: [fd: number, info: Uint8Array]
  loopSetCapacity: [fd: number]
  loopSetDirectIo: [fd: number, enabled: number]
  loopSetBlockSize: [fd: number, bytes: number]
  blkGetSize64: [fd: number, bytes: Uint8Array]
  blkGetDiskSeq: [fd: number]
  blkSszGet: [fd: number]
  blkRoGet: [fd: number]
  blkRoSet: [fd: number, readOnly: number]
  blkFlsBuf: [fd: number]
  blkRrPart: [fd: number]
  blkPgAddPartition: [fd: number, number: number, start: bigint, length: bigint]
  blkPgResizePartition: [fd: number, number: number, start: bigint, length: bigint]
  blkPgDelPartition: [fd: number, number: number]
  fcntlGetFl: [fd: number]
  fcntlSetFl: [fd: number, flags: number]
  fcntlGetSeals: [fd: number]
  flock: [fd: number, operation: number]
  leaseProbe: [fd: number]
  ficlone: [toFd: number, fromFd: number]
  fadviseDontNeed: [fd: number]
  statx: [fd: number, stat: Uint8Array]
  statxCached: [fd: number, stat: Uint8Array]
  statxPath: [path: Uint8Array, stat: Uint8Array]
  sysfsLinks: [number: number]
  sysfsBackingFile: [number: number, text: Uint8Array]
  open: [path: Uint8Array, flags: number]
  openRegular: [path: Uint8Array, flags: number]
  openLoop: [number: number, flags: number]
  close: [fd: number]
  fsync: [fd: number]
  dup3: [fromFd: number, toFd: number]
  vacate: [fd: number]
  reopenExclusive: [fd: number, flags: number]
  mknodBlock: [path: Uint8Array, major: number, minor: number]
  nsGetUserNs: [namespaceFd: number, inode: Uint8Array]
  openAt: [folderFd: number, name: Uint8Array, flags: number]
  reopenFile: [pathFd: number, flags: number]
  statxAt: [folderFd: number, name: Uint8Array, flags: number, stat: Uint8Array]
  readLink: [linkFd: number, text: Uint8Array]
  linkFile: [fd: number, folderFd: number, name: Uint8Array]
  linkProcFile: [fd: number, folderFd: number, name: Uint8Array]
  renameAt: [folderFd: number, from: Uint8Array, to: Uint8Array, flags: number]
  unlinkAt: [folderFd: number, name: Uint8Array]
  fchmod: [fd: number, mode: number]
  fchown: [fd: number, user: number, group: number]
  ftruncate: [fd: number, size: bigint]
  fremovexattr: [fd: number, name: Uint8Array]
  syncFileRange: [fd: number, offset: bigint, length: bigint, flags: number]
  fstatfs: [fd: number, numbers: Uint8Array]
  copyExtents: [fromFd: number, toFd: number, copy: Uint8Array]
  compareExtents: [leftFd: number, rightFd: number, comparison: Uint8Array]
  processUse: [pid: number, use: Uint8Array]
  pageSize: []
}

/** What ueventOpenSync gives, to be closed by ueventCloseSync. */
export interface UeventSocket {
  readonly _: unique symbol
}

/** What is not a row of native/calls.cc: native/uevent.cc. */
interface UeventCalls {
  /** `onMessage` is called with the bytes of each uevent, or with a negative errno: the last one, but for ENOBUFS. */
  readonly ueventOpenSync: (onMessage: (message: Buffer | number) => void) => UeventSocket | number
  readonly ueventCloseSync: (socket: UeventSocket) => number
}

export type CallName = keyof Calls

/** Lists of texts that each end in a NUL; what comes back is described in native/sysfs.cc. */
type Lists = [directories: Uint8Array, names: Uint8Array]

export type Binding = {
  readonly [Name in CallName]: (...values: Calls[Name]) => Promise<number>
} & {
  readonly [Name in CallName as `${Name}Sync`]: (...values: Calls[Name]) => number
} & {
  /** native/sequence.cc: sequence.ts makes the tape. */
  readonly sequenceRun: (count: number, tape: Uint8Array) => Promise<void>
  /** Names of calls, in the order in which a tape numbers them. */
  readonly sequenceRows: readonly CallName[]
  readonly sysfsRead: (...lists: Lists) => Promise<Buffer>
  readonly sysfsReadSync: (...lists: Lists) => Buffer
} & UeventCalls

type AnyCall = (...values: unknown[]) => Promise<number>

let addon: Record<string, AnyCall> = {}
let loaded: Binding | undefined

/**
 * The addon, loaded by the first caller: importing loopctl must succeed where there is no loop driver at all.
 *
 * @throws whatever node-gyp-build or the dynamic linker said, where no binary fits
 */
export function binding(): Binding {
  return (loaded ??= load())
}

/** A call that may hang: undefined where it takes more than `ms`, or no thread is to be had for it in that time. */
export function callWithin<Name extends CallName>(
  ms: number,
  name: Name,
  ...values: Calls[Name]
): Promise<number | undefined> {
  binding()
  const call = addon[name] as (...native: Calls[Name]) => Promise<number>
  return onPoolWithin(ms, () => observed(name, call)(...values))
}

/** Of the package. */
export const ROOT: string = fileURLToPath(new URL('../..', import.meta.url))

function load(): Binding {
  const require = createRequire(import.meta.url)
  const fromPackage = require('node-gyp-build') as (root: string) => Record<string, AnyCall>
  addon = fromPackage(ROOT)
  const { sequenceRows, sequenceRun } = addon
  const result: Record<string, unknown> = {
    sequenceRows,
    sequenceRun: (...values: unknown[]) => onPool(async () => sequenceRun?.(...values)),
  }
  for (const [name, call] of Object.entries(addon)) {
    // What a sequence calls is observed call by call.
    if (name in result) continue
    const now = observed(name, call)
    result[name] = name.endsWith('Sync') ? now : (...values: unknown[]) => onPool(() => now(...values))
  }
  return result as unknown as Binding
}
