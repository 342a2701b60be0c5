/**
 * Who is in the way: everything that keeps a loop device, or one of its partitions, from being let go. The search only
 * asks what the kernel has at hand, so a server that does not answer cannot hold it up, and it runs on other threads.
 */

import { type Bound, GivenUp } from '../kernel/bounded.ts'
import { devicePath } from '../kernel/devnode.ts'
import { minorOfDevice } from '../kernel/features.ts'
import { readDirectory, readFile } from '../kernel/files.ts'
import { isBlockDevice, statCached } from '../kernel/folder.ts'
import { type Mount, readMounts, unescapeOctal } from '../kernel/mountinfo.ts'
import { findOwnDescriptors, type ProcessUse, readProcessUses } from '../kernel/processes.ts'
import * as sysfs from '../kernel/sysfs.ts'
import type { Holder } from './holder.ts'
import { findStacked } from './stacked-loops.ts'

export { adviseHolders, describeHolders, describeOwn, type Holder } from './holder.ts'

/** The device and its partitions: `major:minor` to path. */
type Devices = ReadonlyMap<string, string>

/**
 * Everybody who uses the device, as far as this process may see: mounts of its mount namespace and of those of other
 * processes, swap, device-mapper and md, loop devices on top of it, processes that have it open, and processes in a
 * filesystem of it that was unmounted lazily.
 *
 * @param ownDescriptors descriptors of this process that are not to be counted
 * @throws GivenUp
 */
export async function findHolders(
  number: number,
  ownDescriptors: readonly number[] = [],
  bound?: Bound,
): Promise<Holder[]> {
  const found: Holder[] = []
  await collect(found, number, ownDescriptors, bound)
  return sorted(found)
}

const SOON = 50

/** {@link findHolders} for the message of an error: those that are found within 50 ms. */
export async function findHoldersSoon(number: number, ownDescriptors: readonly number[] = []): Promise<Holder[]> {
  const found: Holder[] = []
  const end = performance.now() + SOON
  const bound: Bound = {
    get left() {
      return end - performance.now()
    },
  }
  try {
    await collect(found, number, ownDescriptors, bound)
  } catch (error) {
    if (!(error instanceof GivenUp)) throw error
  }
  return sorted(found)
}

/** What lasts comes first: what to do is told about the first. */
const ORDER = ['mount', 'swap', 'device-mapper', 'md', 'block', 'loop', 'process', 'unknown']

function sorted(holders: readonly Holder[]): Holder[] {
  return holders.toSorted((a, b) => ORDER.indexOf(a.kind) - ORDER.indexOf(b.kind))
}

async function collect(
  found: Holder[],
  number: number,
  ownDescriptors: readonly number[],
  bound: Bound | undefined,
): Promise<void> {
  const devices = devicesOf(number)
  const filesystems = await findFilesystems(devices, bound)
  const own = await readMounts('self', bound)
  found.push(...mountsOf(typeof own === 'number' ? [] : own, devices, filesystems))
  found.push(...(await swaps(devices, bound)))
  found.push(...(await stackedBlockDevices(number, devices, bound)))
  found.push(...(await stackedLoops(number, devices, bound)))
  await new ProcessSearch(found, devices, filesystems, bound).run(ownDescriptors)
}

function devicesOf(number: number): Devices {
  const devices = new Map<string, string>()
  devices.set(sysfs.readDeviceNumbers(number) ?? `7:${minorOfDevice(number)}`, `/dev/loop${number}`)
  for (const { device, path } of sysfs.readPartitions(number)) devices.set(device, path)
  return devices
}

/** The last word of a device's path, which is what sysfs calls it. */
function nameOf(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1)
}

/** Names of the devices of a filesystem that is on several, to the one of ours that is among them. */
type Filesystems = ReadonlyMap<string, string>

/** btrfs has a device number of its own in the mount table: /sys/fs/btrfs tells which devices one is on. */
async function findFilesystems(devices: Devices, bound: Bound | undefined): Promise<Filesystems> {
  const all = new Map<string, string>()
  const filesystems = await readDirectory('/sys/fs/btrfs', bound)
  if (typeof filesystems === 'number') return all
  for (const filesystem of filesystems) {
    const names = await readDirectory(`/sys/fs/btrfs/${filesystem}/devices`, bound)
    if (typeof names === 'number') continue
    const ours = [...devices.values()].find((path) => names.includes(nameOf(path)))
    if (ours !== undefined) for (const name of names) all.set(name, ours)
  }
  return all
}

type MountHolder = Extract<Holder, { kind: 'mount' }>

function mountsOf(mounts: readonly Mount[], devices: Devices, filesystems: Filesystems): MountHolder[] {
  return mounts.flatMap(({ device: key, mountPoint, fsType, source }) => {
    const device = devices.get(key) ?? (fsType === 'btrfs' ? filesystems.get(nameOf(source)) : undefined)
    return device === undefined ? [] : [{ device, kind: 'mount' as const, mountPoint, fsType }]
  })
}

async function swaps(devices: Devices, bound: Bound | undefined): Promise<Holder[]> {
  const text = await readFile('/proc/swaps', bound)
  if (typeof text === 'number') return []
  const holders: Holder[] = []
  for (const line of text.toString().split('\n').slice(1)) {
    const [path, type] = line.split(/\s+/, 2)
    if (path === undefined || type !== 'partition') continue
    const device = await deviceAt(unescapeOctal(path), devices, bound)
    if (device !== undefined) holders.push({ device, kind: 'swap' })
  }
  return holders
}

async function stackedBlockDevices(number: number, devices: Devices, bound: Bound | undefined): Promise<Holder[]> {
  const holders: Holder[] = []
  for (const device of devices.values()) {
    for (const name of await sysfs.readHolderNames(number, nameOf(device))) {
      const dmName = await readFile(`/sys/block/${name}/dm/name`, bound)
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
export async function findStackedLoops(number: number, bound?: Bound): Promise<Holder[]> {
  return stackedLoops(number, devicesOf(number), bound)
}

async function stackedLoops(number: number, devices: Devices, bound: Bound | undefined): Promise<Holder[]> {
  const stacked = await findStacked(devices, number, bound)
  return stacked.map((upper) => ({
    device: devices.get(upper.device) ?? upper.device,
    kind: 'loop',
    number: upper.number,
    path: devicePath(upper.number),
  }))
}

/** By its numbers; by its name where this /dev, or this mount namespace, has no such node. */
async function deviceAt(path: string, devices: Devices, bound: Bound | undefined): Promise<string | undefined> {
  const stat = await statCached(path, bound)
  if (typeof stat !== 'number') return isBlockDevice(stat) ? devices.get(stat.rdevice) : undefined
  return [...devices.values()].find((device) => nameOf(device) === nameOf(path))
}

/** Processes that are looked at in one hop to a thread. */
const BATCH = 64

/** Looks at all processes: what they have open, where they are, and what is mounted in their mount namespaces. */
class ProcessSearch {
  readonly #found: Holder[]
  readonly #devices: Devices
  readonly #filesystems: Filesystems
  readonly #own: ReadonlySet<string>
  readonly #bound: Bound | undefined
  /** Mount namespaces that were looked at, each by its first process, which of a container is mostly the init. */
  readonly #namespaces = new Set<bigint>()
  readonly #within: [device: string, pid: number][] = []

  constructor(found: Holder[], devices: Devices, filesystems: Filesystems, bound: Bound | undefined) {
    this.#found = found
    this.#devices = devices
    this.#filesystems = filesystems
    this.#bound = bound
    this.#own = new Set(found.filter((holder) => holder.kind === 'mount').map(keyOf))
  }

  async run(ownDescriptors: readonly number[]): Promise<void> {
    const entries = await readDirectory('/proc', this.#bound)
    if (typeof entries === 'number') return
    const numbers = entries.filter((entry) => /^\d+$/.test(entry)).map(Number)
    // This process first: mostly it is one's own other handle.
    const pids = [...new Set([process.pid, ...numbers.toSorted((a, b) => a - b)])]
    for (let i = 0; i < pids.length; i += BATCH) {
      const batch = pids.slice(i, i + BATCH)
      const uses = await readProcessUses(batch, [...this.#devices.keys()], ownDescriptors, this.#bound)
      for (const use of uses) await this.#take(use, ownDescriptors)
    }
    await this.#tellUnmounted()
  }

  async #take({ pid, mountNamespace, open, within }: ProcessUse, ownDescriptors: readonly number[]): Promise<void> {
    for (const key of open) {
      const descriptors = pid === process.pid ? findOwnDescriptors(key, ownDescriptors) : []
      await this.#tellProcess(this.#devices.get(key), pid, descriptors.length === 0 ? {} : { descriptors })
    }
    for (const key of within) this.#within.push([this.#devices.get(key) ?? key, pid])
    if (mountNamespace === 0n || this.#namespaces.has(mountNamespace)) return
    this.#namespaces.add(mountNamespace)
    // The first is this process, whose mounts are known.
    if (pid === process.pid) return
    const mounts = await readMounts(pid, this.#bound)
    if (typeof mounts === 'number') return
    for (const holder of mountsOf(mounts, this.#devices, this.#filesystems)) {
      // A copy of one that is here too, as service managers make them: to unmount this one is what there is to do.
      if (this.#own.has(keyOf(holder))) continue
      this.#found.push({ ...holder, pid, command: await readCommand(pid, this.#bound) })
    }
  }

  async #tellProcess(
    device: string | undefined,
    pid: number,
    more: { unmounted?: true; descriptors?: number[] },
  ): Promise<void> {
    if (device === undefined) return
    this.#found.push({ device, kind: 'process', pid, command: await readCommand(pid, this.#bound), ...more })
  }

  /** On a filesystem that is in no mount table. */
  async #tellUnmounted(): Promise<void> {
    const mounted = new Set(this.#found.filter(({ kind }) => kind === 'mount').map(({ device }) => device))
    for (const [device, pid] of this.#within) {
      if (!mounted.has(device)) await this.#tellProcess(device, pid, { unmounted: true })
    }
  }
}

function keyOf({ device, mountPoint, fsType }: MountHolder): string {
  return `${device} ${fsType} ${mountPoint}`
}

async function readCommand(pid: number, bound: Bound | undefined): Promise<string> {
  const command = await readFile(`/proc/${pid}/comm`, bound)
  return typeof command === 'number' ? '?' : command.toString().trimEnd()
}
