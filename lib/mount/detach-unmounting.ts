/** Detaching a device together with what is mounted from it. */

import { checkBoolean, checkFunction, checkOptions } from '../common/arguments.ts'
import { checkDeadline, type Deadline } from '../common/deadline.ts'
import { detach, type DetachOptions, type DetachResult } from '../detach/detach.ts'
import { readPresent } from '../detach/detaching.ts'
import { detachSync } from '../detach/sync.ts'
import { dispose, disposeSync } from '../detach/dispose.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Handle } from '../handle/handle.ts'
import { devicePath } from '../kernel/devnode.ts'
import { type Mount as Listed, readMounts } from '../kernel/mountinfo.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { mountsOf } from './mount.ts'
import { unmount } from './unmount.ts'

export interface DetachUnmountingOptions extends DetachOptions {
  /**
   * First unmounts what is mounted from the device and its partitions in this mount namespace, the deepest mount first.
   * If files of a mount are open, rejects with `in-use`; the error lists the mounts that were unmounted before. Default
   * false.
   */
  unmount?: boolean | undefined
  /** Called with the mount point of each mount that was unmounted, or with the path of a private mount. */
  onUnmount?: ((path: string) => void) | undefined
}

const OPTION_NAMES: readonly (keyof DetachUnmountingOptions)[] = [
  'lazy',
  'force',
  'timeout',
  'signal',
  'unmount',
  'onUnmount',
]

/** {@link detach}, after unmounting where that is asked for. */
export async function detachUnmounting(handle: Handle, options?: DetachUnmountingOptions): Promise<DetachResult> {
  const given = checkOptions(options, OPTION_NAMES)
  const { unmount: wanted, onUnmount } = given
  const unmounts = wanted === undefined ? false : checkBoolean('unmount', wanted)
  if (onUnmount !== undefined) checkFunction('onUnmount', onUnmount)
  if (!unmounts) {
    if (given.lazy !== true) assertNotPrivate(handle)
    return detach(handle, given)
  }
  const { unmount: _, onUnmount: __, ...rest } = given
  if (rest.lazy !== undefined) checkBoolean('lazy', rest.lazy)
  if (rest.force !== undefined) checkBoolean('force', rest.force)
  const deadline = checkDeadline(rest, 4_000)
  const done: string[] = []
  try {
    await handle.run(
      () =>
        unmountAll(handle, rest.lazy === true, deadline, (path) => {
          done.push(path)
          onUnmount?.(path)
        }),
      deadline,
    )
    return await detach(handle, { ...rest, ...deadline.rest })
  } catch (error) {
    throw done.length > 0 && LoopError.is(error) ? telling(error, done) : error
  }
}

/** Private mounts are in no table: whoever looks for what holds the device would not find them. */
function assertNotPrivate(handle: Handle): void {
  const mounts = mountsOf(handle)
  if (handle.isClosing || mounts.length === 0) return
  const holders = mounts
    .filter(({ target }) => target === null)
    .map(({ source, path, fsType }) => ({ device: source, kind: 'mount' as const, mountPoint: path, fsType }))
  if (holders.length === 0) return
  throw refusal('in-use', 'ioctl', `a private mount of it is at ${holders.map((one) => one.mountPoint).join(', ')}`, {
    path: handle.path,
    ioctl: 'LOOP_CLR_FD',
    holders,
    hint: 'unmount it first, or detach with unmount: true',
  })
}

/** The same error, which says what had been done before it. */
function telling(error: LoopError, done: readonly string[]): LoopError {
  const { reason, errno, syscall, ioctl, path, backingFile, hint, holders, message } = error
  const prefix = `${error.code}: ${[ioctl ?? syscall, path].filter((word) => word !== undefined).join(' ')}: `
  const detail = `${message.startsWith(prefix) ? message.slice(prefix.length) : message} (unmounted before: ${done.join(', ')})`
  return new LoopError({ reason, errno, syscall, ioctl, path, backingFile, hint, holders, detail, cause: error })
}

async function unmountAll(
  handle: Handle,
  lazy: boolean,
  deadline: Deadline,
  onUnmount: (path: string) => void,
): Promise<void> {
  readPresent(handle)
  for (const listed of await mountsInTree(handle.number)) {
    deadline.throwIfAborted()
    const { id, mountPoint, source, fsType } = listed
    const own = mountsOf(handle).find((mount) => mount.has(id, mountPoint))
    if (own) await own.unmountWithin(lazy, deadline)
    else await unmount({ source, fsType, target: mountPoint, id: BigInt(id), unique: undefined }, lazy, deadline)
    onUnmount(mountPoint)
  }
  for (const own of mountsOf(handle)) {
    if (own.target !== null) continue
    await own.unmountWithin(lazy, deadline)
    onUnmount(own.path)
  }
}

function depth({ mountPoint }: Listed): number {
  return mountPoint.split('/').length
}

/** What is mounted from the device and its partitions, in the order in which it can be unmounted. */
async function mountsInTree(number: number): Promise<Listed[]> {
  const mounts = await readMounts()
  if (typeof mounts === 'number') throw explain({ call: 'open', errno: mounts, path: '/proc/self/mountinfo' })
  const partitions = sysfs.readPartitions(number)
  const devices = new Set([sysfs.readDeviceNumbers(number), ...partitions.map(({ device }) => device)])
  const paths = new Set([devicePath(number), ...partitions.map(({ path }) => path)])
  const ours = mounts.filter(({ device, source }) => {
    // btrfs shows a device of its own
    return devices.has(device) || (device.startsWith('0:') && paths.has(source))
  })
  return ours.toReversed().toSorted((a, b) => depth(b) - depth(a))
}

/** Dispose of the device: what was mounted through the handle is unmounted first, lazily where it is busy. */
export async function disposeUnmounting(handle: Handle): Promise<void> {
  try {
    for (const mount of mountsOf(handle)) await mount[Symbol.asyncDispose]()
  } finally {
    await dispose(handle)
  }
}

export function disposeUnmountingSync(handle: Handle): void {
  try {
    for (const mount of mountsOf(handle)) mount[Symbol.dispose]()
  } finally {
    disposeSync(handle)
  }
}

/** {@link detachSync}, after letting go of the private mounts, which end with this process in any case. */
export function detachUnmountingSync(handle: Handle): DetachResult {
  for (const mount of mountsOf(handle)) if (mount.target === null) mount[Symbol.dispose]()
  return detachSync(handle)
}
