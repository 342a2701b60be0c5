/** The addon as TypeScript sees it. Every call answers a value >= 0 or the negative errno. */

import { loadAddon } from './addon.ts'
import { observed } from './observe-calls.ts'

export { ROOT } from './addon.ts'

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
  leaseProbeRead: [fd: number]
  ficlone: [toFd: number, fromFd: number]
  fadviseDontNeed: [fd: number]
  statx: [fd: number, stat: Uint8Array]
  statxCached: [fd: number, stat: Uint8Array]
  statxPath: [path: Uint8Array, stat: Uint8Array]
  statxLink: [path: Uint8Array, stat: Uint8Array]
  create: [path: Uint8Array, flags: number, mode: number]
  pread: [fd: number, buffer: Uint8Array, position: bigint]
  pwrite: [fd: number, buffer: Uint8Array, position: bigint]
  ftruncate: [fd: number, size: bigint]
  fchmod: [fd: number, mode: number]
  access: [path: Uint8Array, mode: number]
  link: [existing: Uint8Array, path: Uint8Array]
  rename: [from: Uint8Array, to: Uint8Array]
  unlink: [path: Uint8Array]
  sysfsLinks: [number: number]
  sysfsLoop: [number: number]
  sysfsAutoclear: [number: number]
  sysfsSectorsWritten: [number: number]
  sysfsBackingFile: [number: number, text: Uint8Array]
  sysfsBackingFileShort: [number: number, text: Uint8Array]
  open: [path: Uint8Array, flags: number]
  openRegular: [path: Uint8Array, flags: number]
  openLoop: [number: number, flags: number]
  close: [fd: number]
  fsync: [fd: number]
  dup3: [fromFd: number, toFd: number]
  vacate: [fd: number]
  mknodBlockAt: [folderFd: number, name: Uint8Array, major: number, minor: number]
  mknodBlock: [path: Uint8Array, major: number, minor: number]
  nsGetUserNs: [namespaceFd: number, inode: Uint8Array]
  fsopen: [fsType: Uint8Array]
  fsconfigFlag: [contextFd: number, key: Uint8Array]
  fsconfigString: [contextFd: number, key: Uint8Array, value: Uint8Array]
  fsconfigCreate: [contextFd: number]
  fsMessage: [contextFd: number, text: Uint8Array]
  fsmount: [contextFd: number, attributes: number]
  moveMount: [mountFd: number, targetFd: number]
  umountAt: [folderFd: number, name: Uint8Array, flags: number]
  statxMount: [folderFd: number, path: Uint8Array, flags: number, stat: Uint8Array]
  statxMountUnique: [folderFd: number, path: Uint8Array, flags: number, stat: Uint8Array]
  openat: [folderFd: number, path: Uint8Array, flags: number]
  mkdirat: [folderFd: number, path: Uint8Array, mode: number]
  unlinkat: [folderFd: number, path: Uint8Array, flags: number]
  readLink: [fd: number, text: Uint8Array]
  fallocate: [fd: number, mode: number, offset: bigint, length: bigint]
  createat: [folderFd: number, name: Uint8Array, flags: number]
  reopenFile: [pathFd: number, flags: number]
  linkFile: [fd: number, folderFd: number, name: Uint8Array]
  linkProcFile: [fd: number, folderFd: number, name: Uint8Array]
  renameat2: [folderFd: number, from: Uint8Array, to: Uint8Array, flags: number]
  fchown: [fd: number, user: number, group: number]
  fremovexattr: [fd: number, name: Uint8Array]
  syncFileRange: [fd: number, range: Uint8Array, flags: number]
  fstatfs: [fd: number, numbers: Uint8Array]
  copyExtents: [fromFd: number, toFd: number, copy: Uint8Array]
  compareExtents: [leftFd: number, rightFd: number, comparison: Uint8Array]
  processUse: [pid: number, use: Uint8Array]
  signalSender: [number: number]
  exitAtOnce: [status: number]
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

/** The threads of the process: how many there are, by what they do, and how many calls they were given so far. */
export interface Workers {
  working: number
  idle: number
  writtenOff: number
  /** Calls that were given up on and have not come back. */
  givenUp: number
  /** Calls that wait for a thread. */
  queued: number
  made: number
}

/** native/workers.cc: for bounded.ts. */
interface WorkerCalls {
  /** What the call that was started last is called by `giveUpSync`. */
  readonly lastCallSync: () => number
  /** Its answer, once it has come back; null: it has not in that time. The thread of JavaScript does nothing else. */
  readonly waitSync: (call: number, ms: number) => unknown
  /** 0: it has come back; 1: it had not begun and never will; 2: it is left to its thread. */
  readonly giveUpSync: (call: number) => number
  /** 1: the thread of a call that was given up on closes the descriptor; 0: no such call uses it. */
  readonly leaveSync: (fd: number) => number
  readonly workersSync: () => Workers
}

export type CallName = keyof Calls

/** Lists of texts that each end in a NUL; what comes back is described in native/sysfs.cc. */
type Lists = [directories: Uint8Array, names: Uint8Array]

export type Binding = {
  readonly [Name in CallName]: (...values: Calls[Name]) => Promise<number>
} & {
  readonly [Name in CallName as `${Name}Sync`]: (...values: Calls[Name]) => number
} & {
  /** native/sequence.cc: sequence.ts makes the tape. `closes`: it may begin although many calls do not come back. */
  readonly sequenceRun: (count: number, tape: Uint8Array, closes: boolean) => Promise<void>
  /** Names of calls, in the order in which a tape numbers them. */
  readonly sequenceRows: readonly CallName[]
  readonly sysfsRead: (...lists: Lists) => Promise<Buffer>
  readonly sysfsReadSync: (...lists: Lists) => Buffer
  /** native/reading.cc: a file; the names in a directory, each with a NUL at the end. */
  readonly readWhole: (path: Uint8Array) => Promise<Buffer | number>
  readonly readNames: (path: Uint8Array) => Promise<Buffer | number>
} & UeventCalls &
  WorkerCalls

type AnyCall = (...values: unknown[]) => unknown

let loaded: Binding | undefined

/**
 * The addon, loaded by the first caller: importing loopctl must succeed where there is no loop driver at all.
 *
 * @throws what {@link loadAddon} throws, where no binary fits
 */
export function binding(): Binding {
  return (loaded ??= load())
}

function load(): Binding {
  const addon = loadAddon() as Record<string, AnyCall>
  const result: Record<string, unknown> = {}
  for (const [name, call] of Object.entries(addon)) {
    // What a sequence calls is observed call by call.
    const now = UNOBSERVED.has(name) ? call : observed(name, call)
    result[name] = typeof call !== 'function' || name.endsWith('Sync') ? now : rejecting(now)
  }
  return result as unknown as Binding
}

/** No thread is to be had for a call that can wait: there are none, or 128 calls that were given up on do not come back. */
export class NoThread extends Error {
  override readonly name = 'NoThread'
}

function rejecting(call: AnyCall): AnyCall {
  return (...values) => {
    try {
      return call(...values)
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException
      return Promise.reject(code === 'EAGAIN' ? new NoThread(message) : (error as Error))
    }
  }
}

const UNOBSERVED: ReadonlySet<string> = new Set([
  'sequenceRows',
  'sequenceRun',
  'lastCallSync',
  'waitSync',
  'giveUpSync',
  'leaveSync',
  'workersSync',
])
