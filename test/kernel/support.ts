/** What every test on real devices stands on: its own folder and images, second witnesses, and a look back at the end. */

import { execFileSync } from 'node:child_process'
import {
  existsSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test as base, expect, inject, vi } from 'vitest'
import { LoopControl, LoopError, type LoopErrorReason } from '../../lib/index.ts'
import { removeFree, shareOf } from '../own-devices.ts'
import { limit } from '../scale.ts'

const noKernel = inject('noKernel')
/** Of the names of the tests' folders. */
const PREFIX = 'loopctl-test-'

interface Fixtures {
  /** A folder of the test's own; when the test is over, no device may be attached to anything in it. */
  folder: string
  /** Makes an image of that many bytes in the folder, filled with `fill`; answers its path. */
  image: (name: string, bytes?: number, fill?: number) => string
}

const withFixtures = base.extend<Fixtures>({
  // oxlint-disable-next-line no-empty-pattern -- vitest reads the fixtures' names off the pattern
  folder: async ({}, use) => {
    const folder = realpathSync(mkdtempSync(join(tmpdir(), PREFIX)))
    const before = loopDescriptors()
    await use(folder)
    // Other processes look at devices too: one that has a device open in this moment is waited for.
    const nothingLeft = () => expect(attachedUnder(folder), 'devices left attached').toEqual([])
    await vi.waitFor(nothingLeft, { timeout: limit(5_000) })
    // A call that was given up is left to its thread, which closes what it has opened.
    const descriptors = () => loopDescriptors().filter((line) => !before.includes(line))
    const noneOpen = () => expect(descriptors(), 'descriptors of loop devices left open').toEqual([])
    await vi.waitFor(noneOpen, { timeout: limit(5_000) })
    rmSync(folder, { recursive: true, force: true })
  },
  image: async ({ folder }, use) => {
    await use((name, bytes = 1 << 20, fill = 0) => {
      const path = join(folder, name)
      if (fill === 0) {
        writeFileSync(path, '')
        truncateSync(path, bytes)
      } else writeFileSync(path, Buffer.alloc(bytes, fill))
      return path
    })
  },
})

/** `test` for real devices: skipped where there are none (the gate has said why), and it leaves nothing behind. */
export const test: typeof withFixtures = noKernel === '' ? withFixtures : (withFixtures.skip as typeof withFixtures)

/** Descriptors of this process on loop devices, as `fd -> target`. */
export function loopDescriptors(): string[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${fd}`)
      return target.startsWith('/dev/loop') ? [`${fd} -> ${target}`] : []
    } catch {
      return []
    }
  })
}

/** How many descriptors this process has open. */
export function countDescriptors(): number {
  return readdirSync('/proc/self/fd').length
}

/** Numbers of attached devices; sysfs is the witness. */
export function attachedNumbers(): number[] {
  return readdirSync('/sys/block')
    .map((name) => /^loop(\d+)$/.exec(name)?.[1])
    .filter((digits) => digits !== undefined)
    .map(Number)
    .filter((number) => existsSync(`/sys/block/loop${number}/loop`))
}

/** The devices that are attached to something in the folder, each with the file. */
export function attachedUnder(folder: string): string[] {
  return attachedNumbers().flatMap((number) => {
    const file = sysfs(number, 'loop/backing_file')
    return isIn(folder, file) ? [`/dev/loop${number} ${file}`] : []
  })
}

/**
 * Whether that is a file in the test's folder, or one below it. Where it was opened in another mount namespace, and the
 * folder for temporary files is a mount of its own, the kernel leaves the mount point out.
 */
export function isIn(folder: string, file: string | undefined): boolean {
  return file?.includes(`${folder.slice(folder.lastIndexOf(`/${PREFIX}`))}/`) ?? false
}

/** One sysfs file of a device, without the newline; undefined where there is none. */
export function sysfs(number: number, file: string): string | undefined {
  try {
    return readFileSync(`/sys/block/loop${number}/${file}`, 'utf8').replace(/\n$/, '')
  } catch {
    return undefined
  }
}

/** What losetup says of a device: the witness that is not ours. */
export function losetup(path: string): Record<string, unknown> | undefined {
  const output = execFileSync('losetup', ['--json', '--list', '--output-all', path], { encoding: 'utf8' })
  const { loopdevices } = JSON.parse(output || '{"loopdevices":[]}') as { loopdevices: Record<string, unknown>[] }
  return loopdevices[0]
}

/** `lo_file_name`, asked for by another program; losetup shows it only since 2.40. */
export function loopFileName(path: string): string {
  const script = `
open(my $device, '<', $ARGV[0]) or die;
my $info = "\\0" x 232;
ioctl($device, 0x4C05, $info) or die;
print unpack('Z*', substr($info, 56, 64))`
  return execFileSync('perl', ['-e', script, path], { encoding: 'utf8' })
}

/** The error that `operation` ends with, which has to be a LoopError of that reason. */
export async function failure(reason: LoopErrorReason, operation: () => unknown): Promise<LoopError> {
  let error: unknown
  try {
    await operation()
  } catch (caught) {
    error = caught
  }
  if (!(error instanceof LoopError)) expect.fail(`wanted a LoopError of reason ${reason}, got ${String(error)}`)
  expect(error.reason, error.message).toBe(reason)
  return error
}

export const hasUdev = existsSync('/run/udev/control')

/** Until udev has done all that it has been told of, and has no device open. */
export function settleUdev(): void {
  if (hasUdev) execFileSync('udevadm', ['settle', '--timeout=60'])
}

/** That the device has let go, when udev has too, which may have had it open in this moment. */
export function expectGone(number: number): void {
  settleUdev()
  expect(existsSync(`/sys/block/loop${number}/loop`), `/dev/loop${number} is attached`).toBe(false)
}

/** The bytes of a descriptor or file. */
export function contents(path: string): Buffer {
  return readFileSync(path)
}

/** Opens, for tests of what is given as a descriptor; the test closes it. */
export function openFile(path: string, flags: string | number = 'r+'): number {
  return openSync(path, flags)
}

/** The first of the numbers that this file of tests has for itself. */
export function firstNumber(): number {
  return shareOf(Number(process.env['VITEST_POOL_ID'] ?? '1'), inject('firstNumber'))
}

/**
 * A number that no device has, and that there is no node of either. Only this file of tests uses it, and it is above all
 * that the kernel offers to whoever asks for any device.
 */
export function unusedNumber(): number {
  for (let number = firstNumber(); ; number++) {
    if (!existsSync(`/sys/block/loop${number}`) && !existsSync(`/dev/loop${number}`)) return number
  }
}

/** Takes a device of the test's own away again. One that is gone already is no mistake, one that stays attached is. */
export async function removeDevice(number: number): Promise<void> {
  await using control = await LoopControl.open()
  expect(await removeFree(control, number), `/dev/loop${number} could be removed`).toBe(true)
}

/** The names of all loop devices that the machine has. */
export function deviceNames(): string[] {
  return readdirSync('/sys/block').filter((name) => /^loop\d+$/.test(name))
}
