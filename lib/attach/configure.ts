/** One free device, opened: set up, and then looked at for what is really in effect. */

import { constants } from 'node:os'
import { backoff, type Deadline } from '../common/deadline.ts'
import type { Failure } from '../errors/causes.ts'
import { refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { type Bound, type Bounded, UNDOING, within } from '../kernel/bounded.ts'
import { binding } from '../kernel/binding.ts'
import { devicePath } from '../kernel/devnode.ts'
import { hasLoopConfigure, pageSize } from '../kernel/features.ts'
import {
  decodeInfo,
  decodeU64,
  LO_FLAGS_AUTOCLEAR,
  LO_FLAGS_DIRECT_IO,
  LO_FLAGS_PARTSCAN,
  LO_FLAGS_READ_ONLY,
  type LoopInfo64,
  newConfig,
  newInfo,
  newU64,
  patchInfo,
  type Place,
  placeOf,
  visibleSize,
  writeConfig,
} from '../kernel/uapi.ts'
import type { Backing } from './backing.ts'

const { EAGAIN } = constants.errno

/** What the device is to be like. */
export interface Settings {
  readOnly: boolean
  offset: bigint
  sizeLimit: bigint
  blockSize: number | undefined
  directIO: boolean | 'prefer'
  partscan: boolean
  autoclear: boolean
  reference: string
}

/** The device that is being set up. */
export interface Target {
  number: number
  /** Open for writing, or for reading only where it is to be read-only: the kernel goes by that. */
  fd: number
  backing: Backing
  settings: Settings
  /** The end that the calls have. */
  bound: Bound
}

function callsOf({ number, bound }: Target): Bounded {
  return within(bound, number)
}

/** What the kernel takes where nothing else is asked for. */
const DEFAULT_BLOCK_SIZE = 512

/** Into a zeroed struct loop_config. */
export function writeSettings(config: Place, settings: Settings): void {
  const { readOnly, blockSize, directIO, offset, sizeLimit, reference } = settings
  // With that flag alone LOOP_CONFIGURE takes a larger block size where direct I/O needs one (6.15, 6.12.31).
  const keepsBlocks = directIO === 'prefer' ? DEFAULT_BLOCK_SIZE : 0
  const flags =
    statusFlags(settings) | (readOnly ? LO_FLAGS_READ_ONLY : 0) | (directIO === false ? 0 : LO_FLAGS_DIRECT_IO)
  writeConfig(config, blockSize ?? keepsBlocks, { offset, sizeLimit, fileName: reference, flags })
}

/** Attaches. Undefined: it is. A failure is the kernel's; nothing is attached then, also where this throws. */
export async function configure(target: Target, deadline: Deadline): Promise<Failure | undefined> {
  const { fd, backing, settings } = target
  if (!hasLoopConfigure(fd)) return setFd(target, deadline)
  // K16, 6.15 and later: it flushes the file first. So it runs on a thread, as every call that takes a file.
  const config = newConfig()
  writeSettings(placeOf(config), settings)
  const answer = await callsOf(target).loopConfigure(fd, backing.fd, config)
  return answer < 0 ? failureOf(target, 'LOOP_CONFIGURE', answer) : undefined
}

/** Before 5.8, in two steps: a process killed between them leaves the device attached. */
async function setFd(target: Target, deadline: Deadline): Promise<Failure | undefined> {
  const { fd, backing, settings } = target
  const set = await callsOf(target).loopSetFd(fd, backing.fd)
  if (set < 0) return failureOf(target, 'LOOP_SET_FD', set)
  const { offset, sizeLimit, reference } = settings
  const status = patchInfo(newInfo(), { offset, sizeLimit, fileName: reference, flags: statusFlags(settings) })
  let complete = false
  try {
    for (let attempt = 1; ; attempt++) {
      const answer = await callsOf(target).loopSetStatus64(fd, status)
      complete = answer >= 0
      if (complete) return undefined
      // Up to 5.17: pages that another reader, udev mostly, left in the cache of the device.
      if (answer !== -EAGAIN || !(await deadline.pause(backoff(attempt)))) {
        return failureOf(target, 'LOOP_SET_STATUS64', answer)
      }
    }
  } finally {
    // The time may be up, or the signal aborted.
    if (!complete) await within(UNDOING, target.number).loopClrFd(fd)
  }
}

/** The two flags that LOOP_SET_STATUS64 can set too. */
function statusFlags({ autoclear, partscan }: Settings): number {
  return (autoclear ? LO_FLAGS_AUTOCLEAR : 0) | (partscan ? LO_FLAGS_PARTSCAN : 0)
}

/** Looks at what is in effect, mends what the kernel's bugs left, and refuses what is not as asked. */
export async function verify(target: Target): Promise<LoopInfo64> {
  const bytes = newInfo()
  const answer = await callsOf(target).loopGetStatus64(target.fd, bytes)
  if (answer < 0) throw explain(failureOf(target, 'LOOP_GET_STATUS64', answer))
  const info = decodeInfo(bytes)
  compareInfo(target, info)
  await applyBlockSize(target)
  await applyDirectIO(target, info)
  await compareSize(target)
  await allowWriting(target)
  return info
}

export function compareInfo({ number, backing, settings }: Omit<Target, 'fd' | 'bound'>, info: LoopInfo64): void {
  const where = { path: devicePath(number), backingFile: backing.path, ioctl: 'LOOP_GET_STATUS64' }
  if (info.device !== backing.device || info.inode !== backing.inode) {
    throw refusal('unknown', 'ioctl', 'the kernel attached another file: was the descriptor closed?', where)
  }
  if (info.number !== number || info.offset !== settings.offset || info.sizeLimit !== settings.sizeLimit) {
    throw refusal('unknown', 'ioctl', 'the kernel attached it otherwise than asked', where)
  }
  if (!settings.readOnly && (info.flags & LO_FLAGS_READ_ONLY) !== 0) {
    throw refusal('backing-not-writable', 'ioctl', 'the kernel attached it read-only', {
      ...where,
      hint: 'its filesystem takes no writes: attach with readOnly: true',
    })
  }
}

/** Only where it could not be given to LOOP_CONFIGURE: elsewhere it is in effect already. */
async function applyBlockSize(target: Target): Promise<void> {
  const { fd, settings } = target
  if (settings.blockSize === undefined || binding().blkSszGetSync(fd) === settings.blockSize) return
  const answer = await callsOf(target).loopSetBlockSize(fd, settings.blockSize)
  if (answer < 0) throw explain(failureOf(target, 'LOOP_SET_BLOCK_SIZE', answer))
}

/** The kernel drops the flag without a word where it cannot; before 6.15 also where a larger block size would do. */
async function applyDirectIO(target: Target, info: LoopInfo64): Promise<void> {
  const { fd, settings } = target
  if (settings.directIO === false || (info.flags & LO_FLAGS_DIRECT_IO) !== 0) return
  const first = await callsOf(target).loopSetDirectIo(fd, 1)
  if (first >= 0) return
  if (settings.directIO === true && settings.blockSize === undefined) {
    const before = binding().blkSszGetSync(fd)
    const raised = before < 0 ? before : await callsOf(target).loopSetBlockSize(fd, pageSize())
    if (raised >= 0 && (await callsOf(target).loopSetDirectIo(fd, 1)) >= 0) return
    if (raised >= 0) await callsOf(target).loopSetBlockSize(fd, before)
  }
  if (settings.directIO === true) throw explain(failureOf(target, 'LOOP_SET_DIRECT_IO', first))
}

/** K6, 5.8.0 to 5.8.10: LOOP_CONFIGURE computed the size before it applied offset and size limit. */
async function compareSize(target: Target): Promise<void> {
  const { fd, backing, settings } = target
  const bytes = newU64()
  const answer = binding().blkGetSize64Sync(fd, bytes)
  const expected = visibleSize(backing.size, settings.offset, settings.sizeLimit)
  if (answer >= 0 && decodeU64(bytes) === expected) return
  const updated = await callsOf(target).loopSetCapacity(fd)
  if (updated < 0) throw explain(failureOf(target, 'LOOP_SET_CAPACITY', updated))
}

/** K5, 5.12 and later: BLKROSET outlives the attachment it was set for. */
async function allowWriting(target: Target): Promise<void> {
  if (target.settings.readOnly || binding().blkRoGetSync(target.fd) !== 1) return
  const answer = await callsOf(target).blkRoSet(target.fd, 0)
  if (answer < 0) throw explain(failureOf(target, 'BLKROSET', answer))
}

function failureOf({ number, fd, backing, settings }: Target, call: string, errno: number): Failure {
  const asked = { blockSize: settings.blockSize, offset: settings.offset, sizeLimit: settings.sizeLimit }
  return { call, errno, path: devicePath(number), number, fd, backingFd: backing.fd, backingFile: backing.path, asked }
}
