/**
 * The installer's story in one call: copy the image to another place, flush, verify, switch the device over. At every
 * moment the device is backed by one complete file, and under the destination's name there is nothing or a whole copy.
 */

import { basename, isAbsolute } from 'node:path'
import { checkBoolean, checkOptions, wrongType, wrongValue } from '../common/arguments.ts'
import type { Deadline } from '../common/deadline.ts'
import { LoopError } from '../errors/errors.ts'
import { cleaningUp, cleanUpAfter } from '../errors/given-up.ts'
import type { Handle } from '../handle/handle.ts'
import { onBackingDevice } from '../handle/lower.ts'
import { closeSoon } from '../kernel/files.ts'
import { readBackingFile } from '../kernel/sysfs.ts'
import { CHANGE_OPTIONS, type ChangeOptions, type Checked, checkChange, checkChangeDeadline } from './change.ts'
import { compareContents } from './compare.ts'
import { type CopyMethod, type CopyResult, copyWindow, type Source } from './copy.ts'
import { Destination } from './destination.ts'
import { Draft, UNDOING } from './draft.ts'
import { guardFilesystem } from './mounted-guard.ts'
import { presentBacking, refuseOverlap } from './overlap.ts'
import { assertNotOver, reporter } from './progress.ts'
import {
  assertShowsSame,
  isBackedBy,
  openPresent,
  readChangeable,
  type Shown,
  switchBackingFile,
  switching,
} from './switch.ts'

export interface MigrateOptions extends ChangeOptions {
  /** Reads the copy back from its medium and compares it with the present backing file. Default true. */
  verify?: boolean | undefined
  /** Keeps holes. Default true. */
  sparse?: boolean | undefined
  /** Replaces a file that exists at the destination. Default false. */
  overwrite?: boolean | undefined
}

export interface MigrateResult {
  /** The path of the new backing file, as the kernel shows it. */
  destination: string
  /** Bytes of data that were copied, or shared. */
  bytesCopied: number
  /** Bytes of holes that were kept. */
  bytesSparse: number
  seconds: number
  method: CopyMethod
  /** Whether the copy was read back and compared. */
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
  const deadline = checkChangeDeadline(given)
  return handle.run(async () => {
    assertNotOver(deadline, handle.path)
    await handle.readInfo()
    return onBackingDevice(handle, (target) => migrateDevice(target, plan, deadline))
  }, deadline)
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
  if (!plan.force) await closeSoon(await guardFilesystem(target))
  if (plan.overlap === 'refuse') await refuseOverlap(target, presentBacking(shown.info), shown.info)
  const destination = await Destination.open(plan.path, shown.info, { ...plan, deadline })
  const withSource = async (source: Source): Promise<CopyResult> => {
    const draft = await Draft.create(destination, deadline)
    return cleaningUp(
      () => copyAndSwitch({ target, shown, plan, deadline, destination, source, draft }),
      () => {
        deadline.renew(UNDOING)
        return destination.discard(draft)
      },
    )
  }
  const withDestination = async (): Promise<CopyResult> => {
    const source = await openPresent(target, shown)
    return cleaningUp(
      () => withSource(source),
      () => source.close(),
    )
  }
  const result = await cleaningUp(withDestination, () => destination.close())
  const path = (await readBackingFile(target.number)) ?? plan.path
  return { destination: path, ...result, seconds: (performance.now() - start) / 1000, verified: plan.verify }
}

/** What a migration has to do with. */
interface Migration {
  target: Handle
  shown: Shown
  plan: Plan
  deadline: Deadline
  destination: Destination
  source: Source
  draft: Draft
}

async function copyAndSwitch(migration: Migration): Promise<CopyResult> {
  const result = await fill(migration)
  await publishAndSwitch(migration)
  return result
}

async function fill(migration: Migration): Promise<CopyResult> {
  try {
    return await copyAndVerify(migration)
  } catch (error) {
    // Where the source is the device, it ends early or differs because somebody has changed what the device shows.
    if (LoopError.is(error) && ['io', 'content-differs', 'replaced'].includes(error.reason)) {
      await assertShowsSame(migration.target, migration.shown)
    }
    throw error
  }
}

async function copyAndVerify({ draft, source, shown, plan, deadline }: Migration): Promise<CopyResult> {
  const { info, size } = shown
  const report = reporter(size, plan.onProgress)
  const window = { start: info.offset, size, sparse: plan.sparse }
  const result = await copyWindow(source, draft, window, deadline, (done) => report('copy', done))
  report('flush', 0n)
  await draft.flush(info.offset + size, (done) => report('flush', done < size ? done : size))
  assertNotOver(deadline, plan.path)
  if (plan.verify) {
    await draft.dropCache()
    const copy = { fd: draft.fd, path: draft.path, asked: draft.path, start: info.offset }
    const everything = !source.isFile
    await compareContents(source, copy, { size, everything }, deadline, (done) => report('verify', done))
    report('verify', size)
  }
  assertNotOver(deadline, plan.path)
  deadline.ignoreSignal()
  report('switch', size)
  return result
}

/**
 * From here on only a failure goes back, and the signal is not heard. The locks of the copy and of what it replaces are
 * held to the end.
 */
async function publishAndSwitch(migration: Migration): Promise<void> {
  const { target, shown, plan, deadline, destination, source: present, draft } = migration
  const { force, overlap } = plan
  await switching(deadline, async () => {
    await assertShowsSame(target, shown)
    try {
      const backing = await destination.publish(draft)
      const check = () => destination.refuseOldInUse()
      await switchBackingFile(target, { backing, present, shown, force, overlap, check })
      await settle(migration)
    } catch (error) {
      await cleanUpAfter(error, () => settleOrTakeBack(migration))
      throw error
    }
  })
}

/** Where there was no way back, or another process came between: what backs the device keeps its name. */
async function settleOrTakeBack(migration: Migration): Promise<void> {
  const { target, deadline, destination, draft } = migration
  deadline.renew(UNDOING)
  const isSwitched = await isBackedBy(target, draft.stat, deadline.bound)
  if (isSwitched === true) await settle(migration)
  if (isSwitched === false) await destination.takeBack()
}

async function settle({ draft, destination, source: { owner } }: Migration): Promise<void> {
  if (owner) await draft.takeOwner(owner)
  await destination.settle()
}
