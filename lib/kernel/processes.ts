/** What processes have of some devices: native/processes.cc, which waits for no server. */

import { binding } from './binding.ts'
import type { Bound } from './bounded.ts'
import { readDirectorySync } from './files.ts'
import { isBlockDevice } from './folder.ts'
import { Sequence } from './sequence.ts'
import { decodeStat, little, newStat } from './uapi.ts'

const SIZE = 1320
const MOST_DEVICES = 257
const MOST_IGNORED = 3
// struct ProcessUse in native/processes.cc
const [NAMESPACE, COUNT, IGNORED, DEVICES, FOUND] = [0, 8, 12, 28, 28 + 4 * MOST_DEVICES]

const OPEN = 1
const WITHIN = 2

export interface ProcessUse {
  pid: number
  /** The inode of its mount namespace; 0 where it may not be looked at. */
  mountNamespace: bigint
  /** Devices, `major:minor`, that it has open. */
  open: string[]
  /** Devices on whose filesystem it has a file open, runs, or is. */
  within: string[]
}

/**
 * Looks at these processes, in one hop to a thread. Those that are gone, or may not be looked at, are left out.
 *
 * @param devices `major:minor`
 * @param ignored descriptors of this process that do not count; the first three
 */
export async function readProcessUses(
  pids: readonly number[],
  devices: readonly string[],
  ignored: readonly number[],
  bound?: Bound,
): Promise<ProcessUse[]> {
  const known = devices.slice(0, MOST_DEVICES)
  const sequence = new Sequence()
  const asked = pids.map((pid) => {
    const bytes = encodeUse(known, pid === process.pid ? ignored : [])
    return { pid, bytes, step: sequence.try('processUse', pid, bytes) }
  })
  await sequence.run(bound)
  return asked.filter(({ step }) => step.succeeded).map(({ pid, bytes }) => decodeUse(pid, bytes, known))
}

/**
 * The descriptors of this process that are open on the device, `major:minor`.
 *
 * @param ignored those that do not count
 */
export function findOwnDescriptors(device: string, ignored: readonly number[]): number[] {
  const names = readDirectorySync('/proc/self/fd')
  if (typeof names === 'number') return []
  return names.map(Number).filter((fd) => !ignored.includes(fd) && deviceOf(fd) === device)
}

/** The block device that the descriptor is open on; no server is waited for. */
function deviceOf(fd: number): string | undefined {
  const bytes = newStat()
  if (binding().statxCachedSync(fd, bytes) < 0) return undefined
  const stat = decodeStat(bytes)
  return isBlockDevice(stat) ? stat.rdevice : undefined
}

function encodeUse(devices: readonly string[], ignored: readonly number[]): Uint8Array {
  const bytes = new Uint8Array(SIZE)
  const data = new DataView(bytes.buffer)
  data.setUint32(COUNT, devices.length, little)
  for (let i = 0; i < MOST_IGNORED; i++) data.setInt32(IGNORED + 4 * i, ignored[i] ?? -1, little)
  for (const [i, device] of devices.entries()) {
    const [major = 0, minor = 0] = device.split(':').map(Number)
    data.setUint32(DEVICES + 4 * i, ((major << 20) | minor) >>> 0, little)
  }
  return bytes
}

function decodeUse(pid: number, bytes: Uint8Array, devices: readonly string[]): ProcessUse {
  const having = (kind: number) => devices.filter((_, i) => ((bytes[FOUND + i] ?? 0) & kind) !== 0)
  const mountNamespace = new DataView(bytes.buffer).getBigUint64(NAMESPACE, little)
  return { pid, mountNamespace, open: having(OPEN), within: having(WITHIN) }
}
