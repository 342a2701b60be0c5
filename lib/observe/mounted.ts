/** The loop device that is under a mount. */

import { explain } from '../errors/explain.ts'
import type { Bound } from '../kernel/bounded.ts'
import { numberOfMinor } from '../kernel/features.ts'
import { closeSync, O_PATH, open, readLinkSync, statSync } from '../kernel/files.ts'
import { type Mount, readMountsSync } from '../kernel/mountinfo.ts'
import { formatDevice, LOOP_MAJOR } from '../kernel/uapi.ts'

/**
 * The number of the device whose filesystem is mounted on the folder, of several on one another the last; undefined:
 * there is none. A link is followed.
 */
export async function findLoopAt(mountPoint: string, bound: Bound): Promise<number | undefined> {
  const fd = await open(mountPoint, O_PATH, 0, bound)
  if (fd < 0) throw explain({ call: 'open', errno: fd, path: mountPoint }, 'target')
  const path = readLinkSync(`/proc/self/fd/${fd}`)
  closeSync(fd)
  const mounted = readMountsSync().findLast((mount) => mount.mountPoint === path)
  return mounted && findLoopOf(mounted)
}

/** Its number, also where a partition of it is mounted; undefined: it is another kind of device, or none. */
export function findLoopOf({ device, source }: Pick<Mount, 'device' | 'source'>): number | undefined {
  // btrfs shows a device of its own: there the node says it.
  const block = device.startsWith('0:') ? deviceOfNode(source) : device
  if (block === undefined) return undefined
  const [major, minor] = block.split(':').map(Number)
  if (major === LOOP_MAJOR && minor !== undefined) return numberOfMinor(minor)
  const link = readLinkSync(`/sys/dev/block/${block}`)
  const number = typeof link === 'string' ? /\/loop(\d+)\/loop\d+p\d+$/.exec(link)?.[1] : undefined
  return number === undefined ? undefined : Number(number)
}

function deviceOfNode(path: string): string | undefined {
  if (!path.startsWith('/dev/')) return undefined
  const stat = statSync(path)
  return typeof stat !== 'number' && stat.isBlockDevice() ? formatDevice(stat.rdev) : undefined
}
