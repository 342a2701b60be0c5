/** Unmounting by the folder, what another process has mounted from a loop device. */

import { checkBoolean, checkOptions } from '../common/arguments.ts'
import { checkDeadline } from '../common/deadline.ts'
import { assertSupported, refusal } from '../errors/errors.ts'
import { readMountsSync } from '../kernel/mountinfo.ts'
import { findLoopOf } from '../observe/mounted.ts'
import type { UnmountOptions } from './mount.ts'
import { checkTarget } from './options.ts'
import { closeTarget, openTarget, statDescriptor, statUnique } from './target.ts'
import { unmount, type UnmountResult } from './unmount.ts'

/**
 * Unmounts what is mounted on the folder, if it is a filesystem of a loop device.
 *
 * @throws `not-mounted`, `in-use`, `target`, `permission`, `timeout`
 */
export async function unmountPath(path: string, options?: UnmountOptions): Promise<UnmountResult> {
  const given = checkOptions(options, ['lazy', 'signal', 'timeout'])
  const lazy = given.lazy === undefined ? false : checkBoolean('lazy', given.lazy)
  checkTarget(path)
  const deadline = checkDeadline(given, 4_000)
  assertSupported()
  const target = await openTarget(path, false, deadline)
  // Of the mount itself: closed before it is unmounted, which it would keep from that.
  const [id, unique] = [statDescriptor(target.fd)?.mountId, statUnique(target.fd)?.mountId]
  closeTarget(target)
  const there = readMountsSync().find((mount) => BigInt(mount.id) === id)
  if (there === undefined || there.mountPoint !== target.path) throw refuse(target.path, 'nothing is mounted there')
  if (findLoopOf(there) === undefined) throw refuse(target.path, `${there.source} is no loop device`)
  const { source, fsType } = there
  return unmount({ source, fsType, target: target.path, id: BigInt(there.id), unique }, lazy, deadline)
}

function refuse(path: string, detail: string): Error {
  return refusal('not-mounted', 'umount2', detail, { path })
}
