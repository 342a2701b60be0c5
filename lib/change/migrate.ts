/**
 * The installer's story in one call: copy the image to another place, flush, verify, switch the device over. At every
 * moment the device is backed by one complete file, and under the destination's name there is nothing or a whole copy.
 */

import { constants } from 'node:os'
import { isAbsolute } from 'node:path'
import { openBacking } from '../attach/backing.ts'
import type { BackingIdentity } from '../attach/overlap.ts'
import { checkBoolean, checkFunction, checkOptions, wrongType, wrongValue } from '../common/arguments.ts'
import { checkDeadline, type Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { type Handle, readSize } from '../handle/handle.ts'
import { onBackingDevice } from '../handle/lower.ts'
import { binding } from '../kernel/binding.ts'
import * as files from '../kernel/files.ts'
import { readBackingFile } from '../kernel/sysfs.ts'
import type { LoopInfo64 } from '../kernel/uapi.ts'
import type { ChangeOptions } from './change.ts'
import { compareContents } from './compare.ts'
import { type CopyMethod, type CopyResult, copyWindow, findComparable, type Source } from './copy.ts'
import { Draft, removeLeftovers } from './draft.ts'
import { guardFilesystem } from './mounted-guard.ts'
import { type Progress, reporter } from './progress.ts'
import { letGo, openPresent, readChangeable, refuseOverlap, switchBackingFile } from './switch.ts'

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
interface Plan {
  path: string
  verify: boolean
  sparse: boolean
  overwrite: boolean
  force: boolean
  onProgress: ((progress: Progress) => void) | undefined
}

export async function migrate(handle: Handle, destination: string, options?: MigrateOptions): Promise<MigrateResult> {
  const given = checkOptions(options, ['verify', 'sparse', 'overwrite', 'force', 'onProgress', 'signal'])
  const plan = checkPlan(destination, given)
  const deadline = checkDeadline({ signal: given.signal }, Number.POSITIVE_INFINITY)
  return handle.run(async () => {
    deadline.throwIfAborted()
    await handle.readInfo()
    return onBackingDevice(handle, (target) => migrateDevice(target, plan, deadline))
  }, deadline)
}
function checkPlan(destination: unknown, given: MigrateOptions): Plan {
  if (typeof destination !== 'string') throw wrongType('destination', 'a string', destination)
  if (destination === '' || destination.endsWith('/')) throw wrongValue('destination', 'must name a file')
  if (destination.includes('\0')) throw wrongValue('destination', 'must not contain a zero byte')
  const { verify, sparse, overwrite, force, onProgress } = given
  return {
    // Not normalised: `link/..` is where the link leads.
    path: isAbsolute(destination) ? destination : `${process.cwd()}/${destination}`,
    verify: verify === undefined ? true : checkBoolean('verify', verify),
    sparse: sparse === undefined ? true : checkBoolean('sparse', sparse),
    overwrite: overwrite === undefined ? false : checkBoolean('overwrite', overwrite),
    force: force === undefined ? false : checkBoolean('force', force),
    onProgress: onProgress === undefined ? undefined : checkFunction('onProgress', onProgress),
  }
}

async function migrateDevice(target: Handle, plan: Plan, deadline: Deadline): Promise<MigrateResult> {
  const start = performance.now()
  const info = await readChangeable(target)
  // Looked at now, so that nothing is copied in vain, and once more at the switch.
  if (!plan.force) await letGo(await guardFilesystem(target))
  await refuseOverlap(target, ownBacking(info), info)
  await removeLeftovers(plan.path)
  await checkDestination(plan, info)

  const source = await openPresent(target, info)
  let result: CopyResult
  try {
    const draft = await Draft.create(plan.path, source.mode)
    try {
      result = await fill(draft, source, target, info, plan, deadline)
      await publishAndSwitch(draft, source, target, plan)
    } finally {
      await draft.discard()
    }
  } finally {
    await source.close()
  }
  const destination = (await readBackingFile(target.number)) ?? plan.path
  return { destination, ...result, seconds: (performance.now() - start) / 1000, verified: plan.verify }
}

/** What the device is backed by now, for the question who else has it attached. */
function ownBacking({ device, inode, rdevice }: LoopInfo64): BackingIdentity {
  return {
    path: 'the present backing file',
    device,
    inode,
    rdevice: rdevice === 0n ? undefined : rdevice,
    opened: false,
    fd: -1,
  }
}

async function checkDestination({ path, overwrite }: Plan, info: LoopInfo64): Promise<void> {
  const stat = await files.lstat(path)
  if (typeof stat === 'number') {
    if (stat === -constants.errno.ENOENT) return
    throw explain({ call: 'lstat', errno: stat, path }, 'create destination')
  }
  if (stat.dev === info.device && stat.ino === info.inode) {
    throw refusal('destination-exists', 'lstat', 'is the file that the device is backed by', { path })
  }
  if (!overwrite) {
    throw refusal('destination-exists', 'lstat', 'exists', { path, hint: 'overwrite: true replaces a file' })
  }
  if (stat.isFile()) return
  const type = stat.isSymbolicLink() ? 'a symbolic link' : stat.isDirectory() ? 'a directory' : 'not a regular file'
  throw refusal('not-a-file-or-block-device', 'lstat', `is ${type}, and is not replaced`, { path })
}

async function fill(
  draft: Draft,
  source: Source,
  target: Handle,
  info: LoopInfo64,
  plan: Plan,
  deadline: Deadline,
): Promise<CopyResult> {
  const size = readSize(target)
  const report = reporter(size, plan.onProgress)
  const window = { start: info.offset, size, sparse: plan.sparse }
  const result = await copyWindow(source, draft, window, deadline, (done) => report('copy', done))
  report('flush', 0n)
  await draft.flush()
  report('flush', size)
  deadline.throwIfAborted()
  if (plan.verify) {
    // What is in the page cache is what was written, not what is on the medium.
    await binding().fadviseDontNeed(draft.fd)
    const copy = { fd: draft.fd, path: draft.path, start: info.offset }
    const extents = await findComparable(source, draft.fd, window)
    await compareContents(source, copy, extents, deadline, (done) => report('verify', done))
    report('verify', size)
  }
  deadline.throwIfAborted()
  report('switch', size)
  return result
}

/** From here on only a failure goes back. The draft's lock is held to the end: the original is still needed. */
async function publishAndSwitch(
  draft: Draft,
  source: Source,
  target: Handle,
  { overwrite, force }: Plan,
): Promise<void> {
  const copy = await files.fstat(draft.fd)
  if (typeof copy === 'number') throw explain({ call: 'fstat', errno: copy, path: draft.path })
  await draft.publish(overwrite)
  try {
    // Read-only, so that the filesystem of the copy can be remounted so.
    const backing = await openBacking({ path: draft.destination }, true, checkDeadline({}, 1_000))
    try {
      if (backing.inode !== copy.ino || backing.device !== copy.dev) {
        throw refusal('content-differs', 'open', 'is another file than the copy', { path: draft.destination })
      }
      await switchBackingFile(target, backing, source, force)
    } finally {
      await backing.close()
    }
  } catch (error) {
    await draft.takeBack()
    throw error
  }
}
