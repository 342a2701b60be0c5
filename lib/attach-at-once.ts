/**
 * The usual attach in one hop to the pool. What is not as expected ends it; then nothing is attached, and attach.ts goes
 * on step by step: there races are tried again, the kernel's bugs mended, and errors explained.
 */

import { CONTROL } from './allocate.ts'
import { type Backing, describeRegular } from './backing.ts'
import { encodeSettings, type Settings } from './configure.ts'
import { visibleSize } from './evidence.ts'
import { binding } from './kernel/binding.ts'
import { knownFeatures, observeDiskSeq } from './kernel/features.ts'
import { close, O_RDONLY, O_RDWR } from './kernel/files.ts'
import { Sequence, type Step } from './kernel/sequence.ts'
import * as sysfs from './kernel/sysfs.ts'
import {
  decodeInfo,
  decodeStat,
  decodeU64,
  encodePath,
  isRegular,
  LO_FLAGS_READ_ONLY,
  type LoopInfo64,
  newInfo,
  newStat,
  newU64,
} from './kernel/uapi.ts'

const CONTROL_PATH = encodePath(CONTROL)
const LOCK_EX = 2
const LOCK_NB = 4
const LOCK_UN = 8

/** Where and how to attach. */
export interface Order {
  /** Undefined: any free one. */
  number: number | undefined
  settings: Settings
}

/** An attached device; `fd` is open read-only, and the only descriptor of it. */
export interface Attached {
  fd: number
  info: LoopInfo64
  diskSeq: number | undefined
}

/** What became of it. */
export interface Outcome {
  /** The device that was tried, where it came to that. */
  number: number | undefined
  attached: Attached | undefined
}

/** Whether it can be told what to expect: an attach step by step has shown it, or an earlier one. */
export function canAttachAtOnce({ directIO }: Settings): boolean {
  const { loopConfigure, diskSeq } = knownFeatures()
  const isKnown = loopConfigure === true && diskSeq === true && sysfs.linksWithoutPartitions('free') !== undefined
  // The kernel drops that flag without a word, and then there is more to be tried.
  return isKnown && directIO === false
}

/** What is still open where it did not come to an attachment. */
interface Opened {
  backing: Backing | undefined
  /** -1: is not. */
  control: number
}

/** From the path on, under the lock of loop-control; `probe`: for other users of the file. */
export async function attachPathAtOnce(
  given: string | Buffer,
  order: Order,
  probe: boolean,
): Promise<Opened & { device: Outcome }> {
  const { settings } = order
  const sequence = new Sequence()
  const stat = newStat()
  const file = sequence.call('openRegular', encodePath(given), settings.readOnly ? O_RDONLY : O_RDWR)
  sequence.call('statx', file, stat)
  const ready = sequence.call('fcntlSetFl', file, 0)
  const control = sequence.call('open', CONTROL_PATH, O_RDWR)
  sequence.call('flock', control, LOCK_EX | LOCK_NB)
  if (probe) sequence.call('leaseProbe', file)
  const device = planDevice(sequence, order, control, file)
  // And with it the lock.
  sequence.call('close', control)
  const finish = planCheck(sequence, order, device)
  const closed = sequence.call('close', file)
  await sequence.run()

  const backing =
    ready.fd < 0 || !isRegular(decodeStat(stat))
      ? undefined
      : describeRegular(file.fd, decodeStat(stat), given.toString(), !settings.readOnly)
  const outcome = await finish(backing)
  const isOpen = device.configured.fd < 0
  if (isOpen && control.fd >= 0) binding().flockSync(control.fd, LOCK_UN)
  const opened = { device: outcome, control: isOpen ? control.fd : -1 }
  if (closed.answer !== undefined) return { ...opened, backing: undefined }
  if (backing === undefined && file.fd >= 0) await close(file.fd)
  return { ...opened, backing }
}

/** From the device on: the lock is held, the file open, and nobody else has its bytes. */
export async function attachOpenAtOnce(control: number, backing: Backing, order: Order): Promise<Outcome> {
  const sequence = new Sequence()
  const finish = planCheck(sequence, order, planDevice(sequence, order, control, backing.fd))
  await sequence.run()
  return finish(backing)
}

interface Device {
  number: number | Step
  fd: Step
  before: Step
  configured: Step
}

/** A free device without leftovers (K3), opened and configured. */
function planDevice(
  sequence: Sequence,
  { number: wanted, settings }: Order,
  control: Step | number,
  file: Step | number,
): Device {
  const number = wanted ?? sequence.call('loopCtlGetFree', control)
  sequence.expect(sysfs.linksWithoutPartitions('free') ?? -1, 'sysfsLinks', number)
  const fd = sequence.call('openLoop', number, settings.readOnly ? O_RDONLY : O_RDWR)
  const before = sequence.call('blkGetDiskSeq', fd)
  const configured = sequence.call('loopConfigure', fd, file, encodeSettings(settings))
  return { number, fd, before, configured }
}

/** Read back, and the descriptor exchanged for one that is open read-only; then compared, or undone. */
function planCheck(
  sequence: Sequence,
  { settings }: Order,
  { number, fd, before, configured }: Device,
): (backing: Backing | undefined) => Promise<Outcome> {
  const [bytes, size] = [newInfo(), newU64()]
  const after = sequence.call('blkGetDiskSeq', fd)
  sequence.call('loopGetStatus64', fd, bytes)
  sequence.call('blkGetSize64', fd, size)
  if (settings.blockSize !== undefined) sequence.expect(settings.blockSize, 'blkSszGet', fd)
  if (!settings.readOnly) sequence.expect(0, 'blkRoGet', fd)
  const kept = sequence.call('openLoop', number, O_RDONLY)
  const closed = sequence.call('close', fd)

  return async (backing) => {
    const tried = typeof number === 'number' ? number : number.answer
    if (after.answer !== undefined) observeDiskSeq(before.answer, after.answer)
    if (closed.answer !== undefined && backing !== undefined && tried !== undefined) {
      const info = decodeInfo(bytes)
      if (isAsOrdered(info, tried, backing, settings) && decodeU64(size) === expectedSize(backing, settings)) {
        return { number: tried, attached: { fd: kept.fd, info, diskSeq: after.answer } }
      }
    }
    await undo(configured, fd, kept, closed)
    return { number: tried, attached: undefined }
  }
}

function isAsOrdered(info: LoopInfo64, number: number, backing: Backing, settings: Settings): boolean {
  return (
    info.device === backing.device &&
    info.inode === backing.inode &&
    info.number === number &&
    info.offset === settings.offset &&
    info.sizeLimit === settings.sizeLimit &&
    (settings.readOnly || (info.flags & LO_FLAGS_READ_ONLY) === 0)
  )
}

function expectedSize({ size }: Backing, { offset, sizeLimit }: Settings): bigint {
  return visibleSize(size, offset, sizeLimit)
}

async function undo(configured: Step, fd: Step, kept: Step, closed: Step): Promise<void> {
  const open = [closed.answer === undefined ? fd.fd : -1, kept.fd].filter((each) => each >= 0)
  const [any] = open
  // Only what was attached here: otherwise this would detach the winner of the race.
  if (configured.answer !== undefined && configured.answer >= 0 && any !== undefined) await binding().loopClrFd(any)
  for (const each of open) await close(each)
}
