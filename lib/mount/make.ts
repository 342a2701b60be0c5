/** Making a mount: the filesystem context, the superblock, the mount, and its place in the tree. */

import { checkOptions } from '../common/arguments.ts'
import { checkDeadline, type Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Handle } from '../handle/handle.ts'
import { binding } from '../kernel/binding.ts'
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
import { within } from './within.ts'

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
  const deadline = checkDeadline(given, 10_000)
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
  await within(deadline, { call: 'ioctl', path: handle.path }, handle.readInfo(), () => {})
  const target = place === null ? undefined : await openTarget(place, wanted.makeTarget, deadline)
  let source: Source | undefined
  try {
    source = await openSource(handle, wanted.partition, deadline)
    if (target) assertNotThere(target, source)
    const { fsType, detected } = known ?? (await findFilesystem(handle, source, wanted, deadline))
    const { number, descriptor: fd } = handle
    const attempt: Attempt = { fsType, source: source.path, number, fd, beginning: detected.beginning }
    const readOnly = wanted.readOnly ?? binding().blkRoGetSync(fd) === 1
    const mountFd = await makeMount(attempt, source, { ...wanted, readOnly }, deadline)
    return new Mount(handle, await placeMount(mountFd, attempt, target, deadline))
  } catch (error) {
    if (target) undoTarget(target)
    if (source !== undefined) await removePresent(handle, source.added)
    throw error
  } finally {
    if (target) closeTarget(target)
  }
}

/** @throws `target` where this device is mounted on that folder already */
function assertNotThere({ path }: Target, { device, path: source }: Source): void {
  const there = readMountsSync().findLast(({ mountPoint }) => mountPoint === path)
  if (there?.device !== device && there?.source !== source) return
  throw refusal('target', 'move_mount', `${source} is mounted there already`, { path })
}

async function findFilesystem(
  handle: Handle,
  source: Source,
  { fsType, partition }: WantedMount,
  deadline: Deadline,
): Promise<OnDevice> {
  const detected = await detectAt(source, deadline)
  if (fsType !== undefined) return { fsType, detected }
  // A partition has no table of its own.
  const chosen = await chooseFilesystem(detected, source.path, partition === undefined ? readableOf(handle) : undefined)
  return { fsType: chosen.fsType, detected }
}

/** A mount that is not in the tree. What the filesystem says goes into the error. */
async function makeMount(
  attempt: Attempt,
  source: Source,
  { attributes, parameters, readOnly }: WantedMount & { readOnly: boolean },
  deadline: Deadline,
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

  // What the node stands for is compared with the mount afterwards; of btrfs, which shows no device there, only now.
  assertNode(source)
  const letGo = () => {
    close(mounted.fd)
    close(context.fd)
  }
  await within(deadline, { call: 'fsconfig', path: source.path }, sequence.run(), letGo)
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
    // The last descriptor of a superblock: it is written back.
    if (mounted.succeeded) await binding().close(mounted.fd)
    throw error
  } finally {
    if (context.succeeded) await binding().close(context.fd)
  }
  return mounted.fd
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
    const moved = await binding().moveMount(fd, target.fd)
    if (moved < 0) throw explain({ call: 'move_mount', errno: moved, path: target.path })
    close(fd)
    return { ...made, fd: -1, target: target.path }
  } catch (error) {
    await binding().close(fd)
    throw error
  }
}
