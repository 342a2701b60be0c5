/** The nodes of loop devices and their partitions in /dev: looked at, made, removed. */

import type { BigIntStats } from 'node:fs'
import { constants } from 'node:os'
import { binding } from './binding.ts'
import { type Bound, within } from './bounded.ts'
import { minorOfDevice, numberOfMinor } from './features.ts'
import * as files from './files.ts'
import { existsSync, lstatSync, readLinkSync, statSync, unlinkSync } from './files.ts'
import { mountOf, readMountsSync } from './mountinfo.ts'
import { encodePath, formatDevice, LOOP_MAJOR, majorOf, minorOf } from './uapi.ts'

const { ENOTTY } = constants.errno

export function devicePath(number: number): string {
  return `/dev/loop${number}`
}

/**
 * Opens /dev/loopN; a descriptor, or the negative errno, ENOTTY where the node is not that of the device. It asks no
 * filesystem, and so waits for no call that does.
 */
export function openDevice(number: number, flags: number, bound?: Bound): Promise<number> {
  return within(bound, devicePath(number)).openLoop(number, flags)
}

/** Looks at the node without opening it: 0, or the negative errno, ENOTTY where it is not that of the device. */
export function checkDeviceNode(number: number): number {
  return isDevice(lstatSync(devicePath(number)), number)
}

function isDevice(stat: ReturnType<typeof lstatSync>, number: number): number {
  if (typeof stat === 'number') return stat
  const same = stat.isBlockDevice() && majorOf(stat.rdev) === LOOP_MAJOR && minorOf(stat.rdev) === minorOfDevice(number)
  return same ? 0 : -ENOTTY
}

/** 0: there is a node of that device (`major:minor`). ENOENT: nothing; ENOTTY: another node, a file, a link. */
export function checkNode(path: string, device: string): number {
  const node = lstatSync(path)
  if (typeof node === 'number') return node
  return node.isBlockDevice() && formatDevice(node.rdev) === device ? 0 : -ENOTTY
}

/** A node of a block device whose number is given out anew each time: made for one that is gone. */
export function isStaleNode(path: string): boolean {
  const node = lstatSync(path)
  return typeof node !== 'number' && node.isBlockDevice() && majorOf(node.rdev) === BLOCK_EXT_MAJOR
}

const BLOCK_EXT_MAJOR = 259

/** What is at the path: `a symbolic link to /x`, `a node of block device 7:3`. */
export function describeNode(path: string): string {
  const node = lstatSync(path)
  if (typeof node === 'number') return 'not there'
  if (node.isSymbolicLink()) return `a symbolic link to ${readLinkSync(path)}`
  if (node.isBlockDevice()) return `a node of block device ${formatDevice(node.rdev)}`
  if (node.isCharacterDevice()) return `a node of character device ${formatDevice(node.rdev)}`
  return node.isDirectory() ? 'a directory' : node.isFile() ? 'a plain file' : 'no device node'
}

/** mknod(2), mode 0600. 0 or the negative errno, EEXIST where there is something at the path. */
export function makeNode(path: string, device: string): Promise<number> {
  const [major = 0, minor = 0] = device.split(':').map(Number)
  return binding().mknodBlock(encodePath(path), major, minor)
}

/** Removes the node, if it is that of the device. */
export function removeNode(path: string, device: string): void {
  if (checkNode(path, device) === 0) unlinkSync(path)
}

/** `st_dev` of the devtmpfs, of which the kernel has one for as long as it runs. */
let devtmpfs: bigint | undefined

/** Whether the kernel makes and removes the nodes in /dev by itself. A private /dev, of a container, is a tmpfs. */
export function isDevKernels(): boolean {
  const folder = statSync('/dev')
  if (typeof folder !== 'number' && folder.dev === devtmpfs) return true
  const mount = mountOf('/dev', readMountsSync())
  if (mount?.fsType !== 'devtmpfs') return false
  // By the same mount that was looked up: another one can have come over it meanwhile.
  if (typeof folder !== 'number' && formatDevice(folder.dev) === mount.device) devtmpfs = folder.dev
  return true
}

/** The name of the disk that a partition, by its `major:minor`, is of: `loop7`. Undefined: it is no partition. */
function diskOfPartition(device: string): string | undefined {
  const link = readLinkSync(`/sys/dev/block/${device}`)
  if (typeof link === 'number' || !existsSync(`/sys/dev/block/${device}/partition`)) return undefined
  return link.split('/').at(-2)
}

/** The number of the loop device whose node the path is, or leads to; else what there is at the path. */
export async function numberOfNode(path: string, bound?: Bound): Promise<number | string> {
  return numberOf(await files.stat(path, bound))
}

/** The same, at once, of a path in /dev. */
export function numberOfNodeSync(path: string): number | string {
  return numberOf(statSync(path))
}

function numberOf(stat: files.FileStat | BigIntStats | number): number | string {
  if (typeof stat === 'number') return 'not there'
  const device = formatDevice(stat.rdev)
  if (stat.isBlockDevice() && majorOf(stat.rdev) === LOOP_MAJOR) {
    const number = numberOfMinor(minorOf(stat.rdev))
    if (minorOfDevice(number) === minorOf(stat.rdev)) return number
  }
  if (!stat.isBlockDevice()) return 'not a node of a block device'
  const whole = diskOfPartition(device)
  return whole === undefined ? `block device ${device}, and no loop device` : `a partition: its device is /dev/${whole}`
}

export const CONTROL = '/dev/loop-control'
