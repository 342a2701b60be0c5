/** The loop device that is under a mount. */


import { numberOfMinor } from '../kernel/features.ts'
import { readLinkSync, statSync } from '../kernel/files.ts'
import { type Mount } from '../kernel/mountinfo.ts'
import { formatDevice, LOOP_MAJOR } from '../kernel/uapi.ts'

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
