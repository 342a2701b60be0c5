/** Making a mount: the filesystem context, the superblock, the mount, and its place in the tree. */

import { checkOptions } from '../common/arguments.ts'
import { backoff, CHANGING, checkDeadline, Deadline } from '../common/deadline.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Handle } from '../handle/handle.ts'
import { binding } from '../kernel/binding.ts'
import { GivenUp, UNDOING } from '../kernel/bounded.ts'
import * as files from '../kernel/files.ts'
import { readMountsSync } from '../kernel/mountinfo.ts'
import { Sequence, type Step } from '../kernel/sequence.ts'
import { encodePath } from '../kernel/uapi.ts'
import { removePresent } from '../partitions/blkpg.ts'
import type { Detected } from './detect.ts'
import { type MadeMount, Mount } from './mount.ts'
import {
  checkTarget,
  checkWantedMount,
  MOUNT_OPTION_NAMES,
  type MountOptions,
  type WantedMount,
  withReadOnly,
} from './options.ts'
import { type Attempt, readMessages, refusedOption, refusedSuperblock, refusedType } from './refused.ts'
import { assertNode, chooseFilesystem, detectAt, openSource, readableOf, type Source } from './source.ts'
import { close, closeTarget, openTarget, statDescriptor, statUnique, type Target, undoTarget } from './target.ts'
import { MNT_DETACH } from './unmount.ts'

/** What is on a device. */
export interface OnDevice {
  fsType: string
  detected: Detected
}

/** Mounts the device, or a partition of it. */
export async function mount(handle: Handle, target: string | null, options?: MountOptions): Promise<Mount> {
  const given = checkOptions(options, MOUNT_OPTION_NAMES)
  const place = checkTarget(target)
  const wanted = checkWantedMount(given)
  const deadline = checkDeadline(given, CHANGING)
  return handle.run(() => mountWanted(handle, place, wanted, deadline), deadline)
}

/** {@link mount} from within an operation of the handle; `known`: what is on the device, where that was looked at. */
export async function mountWanted(
  handle: Handle,
  place: string | null,
  wanted: WantedMount,
  deadline: Deadline,
  known?: OnDevice,
): Promise<Mount> {
  deadline.throwIfAborted()
  // It is ours; and as long as our descriptor is open it cannot become another's.
  await handle.readInfo()
  const target = place === null ? undefined : await openTarget(place, wanted.makeTarget, deadline)
  let source: Source | undefined
  const undo = async (): Promise<void> => {
    if (target) {
      await undoTarget(target)
      closeTarget(target)
    }
    if (source !== undefined) await removePresent(handle, source.added)
  }
  try {
    source = await openSource(handle, wanted.partition, deadline)
    if (target) assertNotThere(target, source)
    const { fsType, detected } = known ?? (await findFilesystem(handle, source, wanted))
    const { number, descriptor: fd } = handle
    const attempt: Attempt = { fsType, source: source.path, number, fd, beginning: detected.beginning }
    const readOnly = wanted.readOnly ?? binding().blkRoGetSync(fd) === 1
    const mountFd = await makeMountWhenFree(handle, attempt, source, { ...wanted, readOnly })
    const made = new Mount(handle, await placeMount(mountFd, attempt, target, deadline))
    if (target) closeTarget(target)
    return made
  } catch (error) {
    // A call that has begun still needs what is to be undone: the handle keeps its place until then.
    if (error instanceof GivenUp && error.hasBegun) error.back = error.back.then(undo).catch(() => {})
    else await undo()
    throw error
  }
}

/** @throws `target` where this device is mounted on that folder already */
function assertNotThere({ path }: Target, { device, path: source }: Source): void {
  const there = readMountsSync().findLast(({ mountPoint }) => mountPoint === path)
  if (there?.device !== device && there?.source !== source) return
  throw refusal('target', 'move_mount', `${source} is mounted there already`, { path })
}

async function findFilesystem(handle: Handle, source: Source, { fsType, partition }: WantedMount): Promise<OnDevice> {
  const detected = await detectAt(source, handle.bound)
  if (fsType !== undefined) return { fsType, detected }
  // A partition has no table of its own.
  const chosen = await chooseFilesystem(detected, source.path, partition === undefined ? readableOf(handle) : undefined)
  return { fsType: chosen.fsType, detected }
}

/** Milliseconds in which whoever only looks at a device exclusively, to detach it, say, has closed it again. */
const SOON = 1_000

/** {@link makeMount}; where somebody holds the device, it is tried again for a moment, unless it is a lasting holder. */
async function makeMountWhenFree(
  handle: Handle,
  attempt: Attempt,
  source: Source,
  wanted: WantedMount & { readOnly: boolean },
): Promise<number> {
  const patience = new Deadline(Math.min(SOON, handle.deadline.left), handle.deadline.bound.signal)
  for (let tries = 1; ; tries++) {
    try {
      return await makeMount(handle, attempt, source, wanted)
    } catch (error) {
      if (
        !LoopError.is(error, 'in-use') ||
        error.holders?.some(({ kind }) => kind !== 'process' && kind !== 'unknown')
      ) {
        throw error
      }
      if (!(await patience.pause(backoff(tries)))) throw error
    }
  }
}

/** A mount that is not in the tree. What the filesystem says goes into the error. */
async function makeMount(
  handle: Handle,
  attempt: Attempt,
  source: Source,
  { attributes, parameters, readOnly }: WantedMount & { readOnly: boolean },
): Promise<number> {
  const sequence = new Sequence()
  const context = sequence.call('fsopen', encodePath(attempt.fsType))
  sequence.call('fsconfigString', context, encodePath('source'), encodePath(source.path))
  const steps: { option: string; step: Step }[] = []
  for (const { key, value } of readOnly ? [{ key: 'ro' }, ...parameters] : parameters) {
    const step =
      value === undefined
        ? sequence.call('fsconfigFlag', context, encodePath(key))
        : sequence.call('fsconfigString', context, encodePath(key), encodePath(value))
    steps.push({ option: value === undefined ? key : `${key}=${value}`, step })
  }
  const created = sequence.call('fsconfigCreate', context)
  const mounted = sequence.call('fsmount', context, withReadOnly(attributes, readOnly))
  const closed = sequence.call('close', context)

  // What the node stands for is compared with the mount afterwards; of btrfs, which shows no device there, only now.
  assertNode(source)
  await sequence.run(handle.bound, handle.number)
  try {
    if (!context.succeeded) throw refusedType(attempt, context.answer ?? 0)
    const refusedStep = steps.find(({ step }) => !step.succeeded)
    if (!created.succeeded && refusedStep?.step.answer !== undefined) {
      throw refusedOption(attempt, refusedStep.option, refusedStep.step.answer, readMessages(context.fd))
    }
    if (!created.succeeded) throw await refusedSuperblock(attempt, created.answer ?? 0, readMessages(context.fd))
    if (!mounted.succeeded) throw explain({ call: 'fsmount', errno: mounted.answer ?? 0, path: source.path })
    const { filesystem = '' } = statDescriptor(mounted.fd) ?? {}
    const hasDevice = !filesystem.startsWith('0:')
    if (hasDevice && filesystem !== source.device) {
      throw refusal('replaced', 'fsmount', `block device ${filesystem} was mounted in place of ${source.device}`, {
        path: source.path,
      })
    }
  } catch (error) {
    if (mounted.succeeded) await letGo(mounted.fd)
    if (context.succeeded && closed.answer === undefined) await letGo(context.fd)
    throw error
  }
  return mounted.fd
}

/** The last descriptor of a superblock: it is written back. */
async function letGo(fd: number): Promise<void> {
  try {
    await files.close(fd, UNDOING)
  } catch (error) {
    // Its thread goes on with it.
    if (!(error instanceof GivenUp)) throw error
  }
}

/** Puts the mount into the tree; a private one stays out of it. */
async function placeMount(
  fd: number,
  { fsType, source }: Attempt,
  target: Target | undefined,
  deadline: Deadline,
): Promise<MadeMount> {
  const id = statDescriptor(fd)?.mountId
  try {
    deadline.throwIfAborted()
    if (id === undefined) {
      throw refusal('unsupported-kernel', 'statx', 'the kernel does not tell the number of a mount (5.8)', {
        path: source,
      })
    }
    const made = { source, fsType, id, unique: statUnique(fd)?.mountId }
    if (target === undefined) return { ...made, fd, target: null }
    const moved = await moveTo(fd, target, deadline)
    if (moved < 0) throw explain({ call: 'move_mount', errno: moved, path: target.path })
    close(fd)
    return { ...made, fd: -1, target: target.path }
  } catch (error) {
    await letGo(fd)
    throw error
  }
}

/**
 * move_mount(2). What was given up on is taken out of the tree again when it comes back: by the descriptor of the mount,
 * for which the kernel answers EINVAL where it is not in the tree.
 */
async function moveTo(fd: number, target: Target, deadline: Deadline): Promise<number> {
  const sequence = new Sequence()
  const moved = sequence.call('moveMount', fd, target.fd)
  sequence.undoing()
  sequence.call('umountAt', fd, encodePath(''), MNT_DETACH)
  await sequence.run(deadline.bound, target.path)
  return moved.answer ?? 0
}
