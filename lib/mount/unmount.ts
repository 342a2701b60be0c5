/** Taking a mount out of the tree, and no other one that is in its place by now. */

import { constants } from 'node:os'
import { backoff, type Deadline, tries } from '../common/deadline.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Holder } from '../errors/holders.ts'
import { binding } from '../kernel/binding.ts'
import { within } from '../kernel/bounded.ts'
import { type Mount as Listed, readMountsSync } from '../kernel/mountinfo.ts'
import { encodePath } from '../kernel/uapi.ts'
import { close, lookAt, lookAtSync, type Looked } from './target.ts'
import { adviseUsers, areLasting, describeUsers, findUsers } from './users.ts'

const { EBUSY, ENOENT } = constants.errno
// include/linux/fs.h
export const MNT_DETACH = 2
const UMOUNT_NOFOLLOW = 8

/** `deferred`: files of the mount are still open; the kernel unmounts it when the last of them is closed. */
export type UnmountResult = 'unmounted' | 'deferred'

/** A mount in the tree, as it is known again. */
export interface Mounted {
  /** The device. */
  source: string
  fsType: string
  target: string
  /** The number that mountinfo shows. */
  id: bigint
  /** The number that no other mount ever gets, kernel 6.8; before that {@link id}. Undefined: not known. */
  unique: bigint | undefined
}

/**
 * Unmounts it. With `lazy` a mount that is busy is taken out of the tree, and goes when its last user is done.
 *
 * @throws `in-use` with who uses it, `not-mounted`, `permission`, GivenUp: it can be unmounted later on
 */
export async function unmount(mounted: Mounted, lazy: boolean, deadline: Deadline): Promise<UnmountResult> {
  const { source, target } = mounted
  for (let attempt = 1; ; attempt++) {
    deadline.throwIfAborted()
    const answer = await unmountOnce(mounted, 0, deadline)
    if (answer >= 0) return 'unmounted'
    if (answer !== -EBUSY) throw explain({ call: 'umount2', errno: answer, path: target })
    if (lazy) {
      const detached = await unmountOnce(mounted, MNT_DETACH, deadline)
      if (detached >= 0) return 'deferred'
      throw explain({ call: 'umount2', errno: detached, path: target })
    }
    // All of /proc is read for it: once at the beginning, and once more for the error.
    if (attempt > 1 && (await deadline.pause(backoff(attempt))) && deadline.left > 0) continue
    const users = await findUsers({ source, target, id: mounted.id })
    if (attempt > 1 || areLasting(users) || deadline.left === 0) throw busy(mounted, users, tries(attempt, deadline))
  }
}

async function unmountOnce(mounted: Mounted, flags: number, deadline: Deadline): Promise<number> {
  const { target } = mounted
  const { place, ...looked } = await look(mounted, () => lookAt(target, deadline))
  const { parent, name } = place
  try {
    if (!isOurs(mounted, looked)) throw gone(mounted)
    // Through the descriptor of the folder: neither a link nor a renamed folder leads elsewhere.
    return await within(deadline.bound, target).umountAt(parent, encodePath(name), flags | UMOUNT_NOFOLLOW)
  } finally {
    close(parent)
  }
}

/** {@link unmount}, at once, and without looking for who is in the way. */
export function unmountSync(mounted: Mounted, lazy: boolean): UnmountResult {
  const { target } = mounted
  const { place, ...looked } = lookAtSync(target)
  const umount = (flags: number) => binding().umountAtSync(place.parent, encodePath(place.name), flags)
  try {
    if (!isOurs(mounted, looked)) throw gone(mounted)
    const answer = umount(UMOUNT_NOFOLLOW)
    if (answer >= 0) return 'unmounted'
    if (answer !== -EBUSY) throw explain({ call: 'umount2', errno: answer, path: target })
    if (!lazy) throw busy(mounted, [], undefined)
    const detached = umount(UMOUNT_NOFOLLOW | MNT_DETACH)
    if (detached < 0) throw explain({ call: 'umount2', errno: detached, path: target })
    return 'deferred'
  } finally {
    close(place.parent)
  }
}

/** The folder that it was in can be gone from there. */
async function look(mounted: Mounted, looking: () => Promise<Looked>): Promise<Looked> {
  try {
    return await looking()
  } catch (error) {
    if (LoopError.is(error, 'target') && error.errno === -ENOENT) throw gone(mounted)
    throw error
  }
}

function isOurs(mounted: Mounted, { id, unique }: Omit<Looked, 'place'>): boolean {
  if (id !== mounted.id) return false
  if (mounted.unique !== undefined && mounted.unique !== mounted.id) return mounted.unique === unique
  // Before 6.8 the next mount can get the number of one that is gone: it is another one where it is of another device.
  return findMounted(mounted) !== undefined
}

/** Where it is, perhaps in another place; undefined: nowhere in this mount namespace. */
export function findMounted(
  { id, source, fsType }: Omit<Mounted, 'target'>,
  mounts: readonly Listed[] = readMountsSync(),
): Listed | undefined {
  return mounts.find((mount) => BigInt(mount.id) === id && mount.source === source && mount.fsType === fsType)
}

/** What became of it, as far as mountinfo tells. */
function gone(mounted: Mounted): LoopError {
  const { source, target } = mounted
  const mounts = readMountsSync()
  const still = findMounted(mounted, mounts)
  const top = mounts.findLast(({ mountPoint }) => mountPoint === target)
  if (still?.mountPoint === target && top !== undefined && top !== still) {
    const holder: Holder = { device: source, kind: 'mount', mountPoint: target, fsType: top.fsType }
    return refusal('in-use', 'umount2', `${top.source} (${top.fsType}) is mounted on top of it`, {
      path: target,
      holders: [holder],
      hint: 'unmount that first',
    })
  }
  const detail =
    still === undefined ? `${source} is not mounted there any more` : `${source} was moved to ${still.mountPoint}`
  return refusal('not-mounted', 'umount2', detail, { path: target })
}

export function busy({ target }: { target: string }, users: readonly Holder[], effort: string | undefined): LoopError {
  const detail = describeUsers(users) + (effort === undefined ? '' : ` (${effort})`)
  return refusal('in-use', 'umount2', detail, { path: target, holders: [...users], hint: adviseUsers(users) })
}
