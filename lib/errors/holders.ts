/** Who is in the way: everything that keeps a loop device, or one of its partitions, from being let go. */

import { setImmediate, setTimeout } from 'node:timers/promises'
import { GivenUp } from '../kernel/bounded.ts'
import { devicePath } from '../kernel/devnode.ts'
import { minorOfDevice } from '../kernel/features.ts'
import { O_RDONLY, readDirectory, readDirectorySync, readFile, readLinkSync, statSync } from '../kernel/files.ts'
import { readMounts } from '../kernel/mountinfo.ts'
import { lookForNodes, type PathOf } from '../kernel/nodes-at.ts'
import { Sequence } from '../kernel/sequence.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { decodeInfo, formatDevice, newInfo } from '../kernel/uapi.ts'

/** One user of a device. `device` is the one it holds: `/dev/loop7` or `/dev/loop7p1`. */
export type Holder = { device: string } & (
  | { kind: 'mount'; mountPoint: string; fsType: string }
  | { kind: 'swap' }
  | { kind: 'device-mapper' | 'md' | 'block'; name: string; path: string }
  | { kind: 'loop'; number: number; path: string }
  /** A process that has it open; other handles of this process too. */
  | { kind: 'process'; pid: number; command: string }
  /** Busy, and nothing visible: another mount or pid namespace. */
  | { kind: 'unknown' }
)

/** The device and its partitions: `major:minor` to path. */
type Devices = ReadonlyMap<string, string>

/**
 * Everybody who uses the device, as far as this process may see: mounts of its mount namespace, swap, device-mapper
 * and md, loop devices on top of it, and processes that have it open.
 *
 * @param ownDescriptors descriptors of this process that are not to be counted
 */
export async function findHolders(number: number, ownDescriptors: readonly number[] = []): Promise<Holder[]> {
  const found: Holder[] = []
  await collect(found, number, ownDescriptors, () => false)
  return found
}

async function collect(
  found: Holder[],
  number: number,
  ownDescriptors: readonly number[],
  isLate: () => boolean,
): Promise<void> {
  const devices = devicesOf(number)
  found.push(...(await mounts(devices)))
  found.push(...(await swaps(devices)))
  found.push(...(await stackedBlockDevices(number, devices)))
  found.push(...(await stackedLoops(number, devices)))
  for await (const holder of processes(devices, ownDescriptors)) {
    found.push(holder)
    if (isLate()) return
  }
}

const SOON = 50

/** {@link findHolders} for the message of an error: those that are found within 50 ms. */
export async function findHoldersSoon(number: number, ownDescriptors: readonly number[] = []): Promise<Holder[]> {
  const found: Holder[] = []
  let late = false
  await Promise.race([collect(found, number, ownDescriptors, () => late), setTimeout(SOON, undefined, { ref: false })])
  late = true
  return [...found]
}

/** One line for a message: `mounted at /mnt (ext4), open in process 17 (cat)`. */
export function describeHolders(holders: readonly Holder[]): string {
  return holders.map(describeHolder).join(', ')
}

/** What to do about the first of them: `unmount /mnt first`. */
export function adviseHolders([holder]: readonly Holder[]): string {
  switch (holder?.kind) {
    case 'mount':
      return `unmount ${holder.mountPoint} first: it is still mounted there`
    case 'swap':
      return `swapoff ${holder.device} first`
    case 'loop':
      return `detach ${holder.path} first`
    case 'process':
      return `wait for process ${holder.pid} (${holder.command}) to close it, or end it`
    case 'device-mapper':
      return `dmsetup remove ${holder.name} first`
    case 'md':
      return `mdadm --stop ${holder.path} first`
    case 'block':
      return `take ${holder.path} down first`
    default:
      return 'look for it in other containers: another mount or process namespace holds it'
  }
}

function describeHolder(holder: Holder): string {
  switch (holder.kind) {
    case 'mount':
      return `${holder.device} is mounted at ${holder.mountPoint} (${holder.fsType})`
    case 'swap':
      return `${holder.device} is used for swap`
    case 'loop':
      return `${holder.path} is attached to ${holder.device}`
    case 'process':
      return `process ${holder.pid} (${holder.command}) has ${holder.device} open`
    case 'unknown':
      return `${holder.device} is in use, by what cannot be seen from here`
    default:
      return `${holder.path} is built on ${holder.device}`
  }
}

function devicesOf(number: number): Devices {
  const devices = new Map<string, string>()
  devices.set(sysfs.readDeviceNumbers(number) ?? `7:${minorOfDevice(number)}`, `/dev/loop${number}`)
  for (const { device, path } of sysfs.readPartitions(number)) devices.set(device, path)
  return devices
}

async function mounts(devices: Devices): Promise<Holder[]> {
  const all = await readMounts()
  if (typeof all === 'number') return []
  return all.flatMap(({ device: key, mountPoint, fsType }) => {
    const device = devices.get(key)
    return device === undefined ? [] : [{ device, kind: 'mount' as const, mountPoint, fsType }]
  })
}

async function swaps(devices: Devices): Promise<Holder[]> {
  const text = await readFile('/proc/swaps')
  if (typeof text === 'number') return []
  const holders: Holder[] = []
  for (const line of text.toString().split('\n').slice(1)) {
    const [path] = line.split(/\s/, 1)
    if (path === undefined || !path.startsWith('/dev/')) continue
    const device = deviceAt(path, devices)
    if (device !== undefined) holders.push({ device, kind: 'swap' })
  }
  return holders
}

async function stackedBlockDevices(number: number, devices: Devices): Promise<Holder[]> {
  const holders: Holder[] = []
  for (const device of devices.values()) {
    for (const name of await sysfs.readHolderNames(number, device.slice('/dev/'.length))) {
      const dmName = await readFile(`/sys/block/${name}/dm/name`)
      const kind = name.startsWith('dm-') ? 'device-mapper' : name.startsWith('md') ? 'md' : 'block'
      holders.push({
        device,
        kind,
        name: typeof dmName === 'number' ? name : dmName.toString().trimEnd(),
        path: `/dev/${name}`,
      })
    }
  }
  return holders
}

/** The loop devices on top of this one, or of a partition of it. */
export async function findStackedLoops(number: number): Promise<Holder[]> {
  return stackedLoops(number, devicesOf(number))
}

/**
 * holders/ in sysfs does not show them, and O_EXCL does not see them: only the numbers of their own backing file tell.
 * LOOP_GET_STATUS64 has them; of a device that cannot be asked the node at the path tells.
 */
async function stackedLoops(number: number, devices: Devices): Promise<Holder[]> {
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') return []
  const paths: PathOf[] = []
  for (const upper of numbers) {
    const backingFile = upper === number ? undefined : await sysfs.readBackingFile(upper)
    if (backingFile !== undefined) paths.push([upper, backingFile])
  }
  const { nodes, undecided } = await lookForNodes(paths)
  const asked = await readBackingNumbers(undecided)
  return undecided.flatMap((upper) => {
    const rdevice = asked.get(upper) ?? nodes.get(upper)
    const device = rdevice === undefined ? undefined : devices.get(formatDevice(rdevice))
    return device === undefined ? [] : [{ device, kind: 'loop', number: upper, path: devicePath(upper) }]
  })
}

/** Milliseconds: a device can have a file on a server that does not answer. */
const LOOK_MS = 1_000

/** The numbers of the block devices that these are backed by, 0 for a file; devices that do not answer are left out. */
async function readBackingNumbers(numbers: readonly number[]): Promise<Map<number, bigint>> {
  const sequence = new Sequence()
  const asked = numbers.map((number) => {
    sequence.part()
    const info = newInfo()
    const fd = sequence.call('openLoop', number, O_RDONLY)
    const step = sequence.try('loopGetStatus64', fd, info)
    sequence.call('close', fd)
    return { number, info, step }
  })
  try {
    await sequence.run({ left: LOOK_MS })
  } catch (error) {
    if (!(error instanceof GivenUp)) throw error
  }
  const answered = asked.filter(({ step }) => step.succeeded)
  return new Map(answered.map(({ number, info }) => [number, decodeInfo(info).rdevice]))
}

async function* processes(devices: Devices, ownDescriptors: readonly number[]): AsyncGenerator<Holder> {
  const entries = await readDirectory('/proc')
  if (typeof entries === 'number') return
  let lastPause = performance.now()
  // This process first: mostly it is one's own other handle.
  for (const pid of new Set([process.pid, ...entries.filter((entry) => /^\d+$/.test(entry)).map(Number)])) {
    const descriptors = readDirectorySync(`/proc/${pid}/fd`)
    if (typeof descriptors === 'number') continue
    const seen = new Set<string>()
    for (const fd of descriptors) {
      if (pid === process.pid && ownDescriptors.includes(Number(fd))) continue
      const device = deviceOfDescriptor(`/proc/${pid}/fd/${fd}`, devices)
      if (device !== undefined) seen.add(device)
    }
    for (const device of seen) {
      const command = await readFile(`/proc/${pid}/comm`)
      yield { device, kind: 'process', pid, command: typeof command === 'number' ? '?' : command.toString().trimEnd() }
    }
    // procfs is read without a thread; a machine with many processes must not stall the event loop
    if (performance.now() - lastPause > 5) {
      await setImmediate()
      lastPause = performance.now()
    }
  }
}

/** The text of the link is looked at first: a stat() of a file on a dead server would hang. */
function deviceOfDescriptor(link: string, devices: Devices): string | undefined {
  const target = readLinkSync(link)
  return typeof target === 'string' && target.startsWith('/dev/') ? deviceAt(link, devices) : undefined
}

function deviceAt(path: string, devices: Devices): string | undefined {
  const stat = statSync(path)
  return typeof stat !== 'number' && stat.isBlockDevice() ? devices.get(formatDevice(stat.rdev)) : undefined
}
