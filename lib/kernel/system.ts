/** What surrounds this process, as procfs, /run and /lib/modules tell it: the driver, udev, the container. */

import { release } from 'node:os'
import { existsSync, readFile, readFileSync } from './files.ts'

/** Whether the kernel lists the loop driver; the witness where sysfs is not mounted. */
export function isDriverListed(): boolean {
  return /^ *7 loop$/m.test(textOf('/proc/devices') ?? '')
}

/** Where the driver is, going by what was installed with the kernel; undefined: nothing is known of it. */
export async function findModule(): Promise<'builtin' | 'module' | undefined> {
  for (const [list, where] of [
    ['modules.builtin', 'builtin'],
    ['modules.dep', 'module'],
  ] as const) {
    const text = await readFile(`/lib/modules/${release()}/${list}`)
    if (typeof text !== 'number' && /(?:^|\/)loop\.ko(?:\.[a-z0-9]+)?(?::|$)/m.test(text.toString())) return where
  }
  return undefined
}

/** Whether the driver is a module, and loaded; one that is built in has no state. */
export function isModuleLoaded(): boolean {
  return existsSync('/sys/module/loop/initstate')
}

/** The module's `max_loop` or `max_part`. */
export function readParameter(name: 'max_loop' | 'max_part'): number | undefined {
  const text = textOf(`/sys/module/loop/parameters/${name}`)
  return text === undefined ? undefined : Number(text)
}

/** Whether the kernel lists a partition of the device, for where sysfs is not mounted; undefined: it cannot be seen. */
export function isPartitionListed(number: number, partition: number): boolean | undefined {
  const text = textOf('/proc/partitions')
  return text === undefined ? undefined : new RegExp(`\\sloop${number}p${partition}$`, 'm').test(text)
}

/** As libudev asks. */
export function isUdevRunning(): boolean {
  return existsSync('/run/udev/control')
}

/** The container manager, by the marks that systemd goes by, in its order; null: no container that says so. */
export function readContainer(): string | null {
  // That of process 1 only root may read
  const environment = textOf('/proc/1/environ')?.split('\0') ?? []
  const named = textOf('/run/systemd/container') || environment.find((word) => word.startsWith('container='))?.slice(10)
  // `oci` is said by several: a file tells which
  if (named && named !== 'oci') return named
  if (existsSync('/run/.containerenv')) return 'podman'
  if (existsSync('/.dockerenv')) return 'docker'
  return named || null
}

/** A line of the kernel's configuration, where it shows that; undefined: not known. */
export async function readKernelOption(name: string): Promise<string | undefined> {
  const packed = await readFile('/proc/config.gz')
  if (typeof packed === 'number') return undefined
  const { gunzipSync } = await import('node:zlib')
  return new RegExp(`^${name}=(\\w+)$`, 'm').exec(gunzipSync(packed).toString())?.[1] ?? 'n'
}

function textOf(path: string): string | undefined {
  const text = readFileSync(path)
  return typeof text === 'number' ? undefined : text.toString().trim()
}
