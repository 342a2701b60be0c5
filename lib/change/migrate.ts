/**
 * The installer's story in one call: copy the image to another place, flush, verify, switch the device over. At every
 * moment the device is backed by one complete file, and under the destination's name there is nothing or a whole copy.
 */

import { basename, isAbsolute } from 'node:path'
import { checkBoolean, checkOptions, wrongType, wrongValue } from '../common/arguments.ts'
import { checkDeadline, type Deadline } from '../common/deadline.ts'
import { LoopError } from '../errors/errors.ts'
import type { Handle } from '../handle/handle.ts'
import { onBackingDevice } from '../handle/lower.ts'
import { binding } from '../kernel/binding.ts'
import { readBackingFile } from '../kernel/sysfs.ts'
import { CHANGE_OPTIONS, type ChangeOptions, type Checked, checkChange } from './change.ts'
import { compareContents } from './compare.ts'
import { type CopyMethod, type CopyResult, copyWindow, type Source } from './copy.ts'
import { Destination } from './destination.ts'
import { Draft } from './draft.ts'
import { guardFilesystem } from './mounted-guard.ts'
import { presentBacking, refuseOverlap } from './overlap.ts'
import { assertNotOver, reporter } from './progress.ts'
import {
  assertShowsSame,
  isBackedBy,
  letGo,
  openPresent,
  readChangeable,
  type Shown,
  switchBackingFile,
} from './switch.ts'

export interface MigrateOptions extends ChangeOptions {
  /** Read the copy back from its medium and compare it with the present backing file. Default true. */
  verify?: boolean | undefined
  /** Keep holes. Default true. */
  sparse?: boolean | undefined
  /** Replace a file that is there. Default false. */
  overwrite?: boolean | undefined
}

export interface MigrateResult {
  /** The new backing file, by the kernel's path of it. */
  destination: string
  /** Bytes of data that were copied, or shared. */
  bytesCopied: number
  /** Bytes of holes that were kept. */
  bytesSparse: number
  seconds: number
  method: CopyMethod
  /** The copy was read back and compared. */
  verified: boolean
}

/** The options, checked and complete. */
interface Plan extends Checked {
  path: string
  verify: boolean
  sparse: boolean
  overwrite: boolean
}

export async function migrate(handle: Handle, destination: string, options?: MigrateOptions): Promise<MigrateResult> {
  const given = checkOptions(options, [...CHANGE_OPTIONS, 'sparse', 'overwrite'])
  const plan = checkPlan(destination, given)
  const deadline = checkDeadline(given, Number.POSITIVE_INFINITY)
  return handle.run(async () => {
    assertNotOver(deadline, handle.path)
    await handle.readInfo()
    return onBackingDevice(handle, (target) => migrateDevice(target, plan, deadline))
  })
}

function checkPlan(destination: unknown, given: MigrateOptions): Plan {
  if (typeof destination !== 'string') throw wrongType('destination', 'a string', destination)
  if (destination.endsWith('/') || ['', '.', '..'].includes(basename(destination))) {
    throw wrongValue('destination', 'must name a file')
  }
  if (destination.includes('\0')) throw wrongValue('destination', 'must not contain a zero byte')
  const { verify, sparse, overwrite } = given
  return {
    // Not normalised: `link/..` is where the link leads.
    path: isAbsolute(destination) ? destination : `${process.cwd()}/${destination}`,
    verify: verify === undefined ? true : checkBoolean('verify', verify),
    sparse: sparse === undefined ? true : checkBoolean('sparse', sparse),
    overwrite: overwrite === undefined ? false : checkBoolean('overwrite', overwrite),
    ...checkChange(given),
  }
}

async function migrateDevice(target: Handle, plan: Plan, deadline: Deadline): Promise<MigrateResult> {
  const start = performance.now()
  const shown = await readChangeable(target)
  // Looked at now, so that nothing is copied in vain, and once more at the switch.
  if (!plan.force) await letGo(await guardFilesystem(target))
  if (plan.overlap === 'refuse') await refuseOverlap(target, presentBacking(shown.info), shown.info)
  const destination = await Destination.open(plan.path, shown.info, plan)
  let result: CopyResult
  try {
    const source = await openPresent(target, shown)
    try {
      const draft = await Draft.create(destination)
      try {
        result = await fill(draft, source, target, shown, plan, deadline)
        await publishAndSwitch(draft, destination, source, target, shown, plan)
      } finally {
        await destination.discard(draft)
      }
    } finally {
      await source.close()
    }
  } finally {
    await destination.close()
  }
  const path = (await readBackingFile(target.number)) ?? plan.path
  return { destination: path, ...result, seconds: (performance.now() - start) / 1000, verified: plan.verify }
}

async function fill(
  draft: Draft,
  source: Source,
  target: Handle,
  shown: Shown,
  plan: Plan,
  deadline: Deadline,
): Promise<CopyResult> {
  try {
    return await copyAndVerify(draft, source, shown, plan, deadline)
  } catch (error) {
    // Where the source is the device, it ends early or differs because somebody has changed what the device shows.
    if (LoopError.is(error, 'io') || LoopError.is(error, 'content-differs')) await assertShowsSame(target, shown)
    throw error
  }
}

async function copyAndVerify(
  draft: Draft,
  source: Source,
  { info, size }: Shown,
  plan: Plan,
  deadline: Deadline,
): Promise<CopyResult> {
  const report = reporter(size, plan.onProgress)
  const window = { start: info.offset, size, sparse: plan.sparse }
  const result = await copyWindow(source, draft, window, deadline, (done) => report('copy', done))
  report('flush', 0n)
  await draft.flush(info.offset + size, deadline, (done) => report('flush', done < size ? done : size))
  assertNotOver(deadline, plan.path)
  if (plan.verify) {
    // What is in the page cache is what was written, not what is on the medium.
    await binding().fadviseDontNeed(draft.fd)
    const copy = { fd: draft.fd, path: draft.path, start: info.offset }
    const everything = !source.isFile
    await compareContents(source, copy, { size, everything }, deadline, (done) => report('verify', done))
    report('verify', size)
  }
  assertNotOver(deadline, plan.path)
  report('switch', size)
  return result
}

/** From here on only a failure goes back. The locks of the copy and of what it replaces are held to the end. */
async function publishAndSwitch(
  draft: Draft,
  destination: Destination,
  present: Source,
  target: Handle,
  shown: Shown,
  { force, overlap }: Plan,
): Promise<void> {
  await assertShowsSame(target, shown)
  try {
    const backing = await destination.publish(draft)
    const check = () => destination.refuseOldInUse()
    await switchBackingFile(target, { backing, present, shown, force, overlap, check })
  } catch (error) {
    // Where there was no way back, or another process came between: what backs the device keeps its name.
    const isSwitched = await isBackedBy(target, draft.stat)
    if (isSwitched === true) await settle(draft, destination, present)
    if (isSwitched === false) await destination.takeBack()
    throw error
  }
  await settle(draft, destination, present)
}

async function settle(draft: Draft, destination: Destination, { owner }: Source): Promise<void> {
  if (owner) await draft.takeOwner(owner)
  await destination.settle()
}
