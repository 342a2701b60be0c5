/** /proc/PID/mountinfo: what is mounted where in a mount namespace. */

import { resolve } from 'node:path'
import type { Bound } from './bounded.ts'
import { readFile, readFileSync } from './files.ts'

export interface Mount {
  /** As in `mnt_id` of /proc/self/fdinfo. */
  id: number
  /** `major:minor` of the filesystem; for one on a block device that device's. */
  device: string
  mountPoint: string
  fsType: string
  /** What was mounted, as whoever did it called it: `/dev/loop7`. */
  source: string
  /** Of this mount, not of the filesystem: `rw`, `nodev`, ... */
  options: string[]
}

/** The mounts of the namespace of this process, or of another, or the negative errno. */
export async function readMounts(pid: number | 'self' = 'self', bound?: Bound): Promise<Mount[] | number> {
  const text = await readFile(`/proc/${pid}/mountinfo`, bound)
  return typeof text === 'number' ? text : parseMounts(text.toString())
}

/** The same, at once: procfs does not hang. Empty where it cannot be read. */
export function readMountsSync(): Mount[] {
  const text = readFileSync('/proc/self/mountinfo')
  return typeof text === 'number' ? [] : parseMounts(text.toString())
}

/** The mount that a path is on, going by its text; of several on one another the last. */
export function mountOf(path: string, mounts: readonly Mount[]): Mount | undefined {
  const isOn = ({ mountPoint }: Mount) => mountPoint === '/' || path === mountPoint || path.startsWith(`${mountPoint}/`)
  const longest = Math.max(...mounts.filter(isOn).map(({ mountPoint }) => mountPoint.length))
  return mounts.findLast((mount) => isOn(mount) && mount.mountPoint.length === longest)
}

/** The id of the mount that a file is on: of a descriptor, or of an absolute path, going by its text. Asks no filesystem. */
export function mountIdOf(file: number | string, mounts: readonly Mount[]): number | undefined {
  if (typeof file === 'string') return mountOf(resolve(file), mounts)?.id
  const info = readFileSync(`/proc/self/fdinfo/${file}`)
  const id = typeof info === 'number' ? undefined : /^mnt_id:\s*(\d+)$/m.exec(info.toString())?.[1]
  return id === undefined ? undefined : Number(id)
}

export function parseMounts(text: string): Mount[] {
  const mounts: Mount[] = []
  for (const line of text.split('\n')) {
    // 36 35 98:0 /root /mount\040point rw,noatime shared:1 master:2 - ext4 /dev/source rw
    const fields = line.split(' ')
    const separator = fields.indexOf('-', 6)
    const [id, , device, , mountPoint, options] = fields
    const [fsType, source = ''] = fields.slice(separator + 1)
    if (separator < 0 || !device || !mountPoint || !options || !fsType) continue
    mounts.push({
      id: Number(id),
      device,
      mountPoint: unescapeOctal(mountPoint),
      fsType,
      source: unescapeOctal(source),
      options: options.split(','),
    })
  }
  return mounts
}

/** The kernel writes space, tab, newline and backslash as a backslash and three octal digits, byte by byte. */
export function unescapeOctal(text: string): string {
  if (!text.includes('\\')) return text
  return text.replaceAll(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)))
}
