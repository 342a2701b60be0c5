/**
 * The usual attach in one hop to a thread. What is not as expected ends it, and attach.ts goes on from there step by
 * step: races are tried again, the kernel's bugs mended, and errors explained.
 */

import { CONTROL } from './allocate.ts'
import { type Backing, describeRegular } from './backing.ts'
import { compareInfo, encodeSettings, type Settings } from './configure.ts'
import { binding } from './kernel/binding.ts'
import { knownFeatures, observeDiskSeq } from './kernel/features.ts'
import { close, O_RDONLY, O_RDWR } from './kernel/files.ts'
import { Sequence, type Step } from './kernel/sequence.ts'
import * as sysfs from './kernel/sysfs.ts'
import { decodeInfo, decodeStat, encodePath, type LoopInfo64, newInfo, newStat } from './kernel/uapi.ts'
import { LOCK_EX, LOCK_NB, LOCK_UN } from './lock.ts'

const CONTROL_PATH = encodePath(CONTROL)

/** Where and how to attach. */
export interface Order {
  /** Undefined: any free one. */
  number: number | undefined
  settings: Settings
}

/** A device as ordered; `fd` is open read-only, and the only descriptor of it. */
export interface Attached {
  fd: number
  info: LoopInfo64
  diskSeq: number | undefined
}

/** What became of it. Neither `attached` nor `configured`: nothing is attached. */
export interface Outcome {
  /** The device that was tried, where it came to that. */
  number: number | undefined
  attached?: Attached
  /** Attached, and then something was not as expected: the descriptor that was given to LOOP_CONFIGURE. */
  configured?: number
}

/** Whether it can be told what to expect: an attach step by step has shown it, or an earlier one. */
export function canAttachAtOnce({ directIO }: Settings): boolean {
  const { loopConfigure, diskSeq } = knownFeatures()
  const isKnown = loopConfigure === true && diskSeq === true && sysfs.linksWithoutPartitions('free') !== undefined
  // The kernel drops that flag without a word, and then there is more to be tried.
  return isKnown && directIO === false
}

/** What is still open where it is not all done. */
interface Opened {
  backing: Backing | undefined
  /** -1: is not. */
  control: number
}

/**
 * From the path on, under the lock of loop-control; `probe`: for other users of the file.
 *
 * @throws what {@link compareInfo} throws, after undoing
 */
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
  sequence.try('flock', control, LOCK_UN)
  const unlocked = sequence.call('close', control)
  const finish = planCheck(sequence, order, device)
  const closed = sequence.call('close', file)
  await sequence.run()

  const isLocked = unlocked.answer === undefined && control.succeeded
  if (isLocked) binding().flockSync(control.fd, LOCK_UN)
  if (!ready.succeeded && file.succeeded) await close(file.fd)
  const backing = ready.succeeded
    ? describeRegular(file.fd, decodeStat(stat), given.toString(), !settings.readOnly)
    : undefined
  return {
    device: await finish(backing),
    backing: closed.answer === undefined ? backing : undefined,
    control: isLocked ? control.fd : -1,
  }
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

/** Read back, and the descriptor exchanged for one that is open read-only; then compared. */
function planCheck(
  sequence: Sequence,
  { settings }: Order,
  { number, fd, before, configured }: Device,
): (backing: Backing | undefined) => Promise<Outcome> {
  const bytes = newInfo()
  const after = sequence.call('blkGetDiskSeq', fd)
  sequence.call('loopGetStatus64', fd, bytes)
  if (settings.blockSize !== undefined) sequence.expect(settings.blockSize, 'blkSszGet', fd)
  // K5
  if (!settings.readOnly) sequence.expect(0, 'blkRoGet', fd)
  const kept = sequence.call('openLoop', number, O_RDONLY)
  const closed = sequence.call('close', fd)

  return async (backing) => {
    const answer = typeof number === 'number' ? number : number.answer
    if (backing === undefined || answer === undefined || answer < 0) return { number: undefined }
    if (after.succeeded) observeDiskSeq(before.answer, after.answer)
    if (closed.answer === undefined) {
      if (configured.succeeded) return { number: answer, configured: fd.fd }
      if (fd.succeeded) await close(fd.fd)
      return { number: answer }
    }
    const info = decodeInfo(bytes)
    try {
      compareInfo({ number: answer, backing, settings }, info)
    } catch (error) {
      await binding().loopClrFd(kept.fd)
      await close(kept.fd)
      throw error
    }
    return { number: answer, attached: { fd: kept.fd, info, diskSeq: after.answer } }
  }
}
