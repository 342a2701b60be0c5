/** The options of mount(), checked before any system call, and sorted into what the kernel wants where. */

import { checkBoolean, wrongType, wrongValue } from '../common/arguments.ts'
import type { Wait } from '../common/deadline.ts'
import { checkPartitionRef, type PartitionRef } from '../partitions/ref.ts'

/** The options of `device.mount()`. */
export interface MountOptions extends Wait {
  /** The kernel's name of the filesystem, such as `ext4` or `vfat`. Default: found by the superblock. */
  fsType?: string | undefined
  /** Default: read-only if the device is read-only, or if the filesystem cannot be written. */
  readOnly?: boolean | undefined
  /**
   * The kernel's mount options, as one string with commas, or as a list if an option contains commas itself. `nosuid`
   * and `nodev` are in effect unless you give `'suid,dev'`. The kernel refuses options that it does not know.
   */
  options?: string | readonly string[] | undefined
  /** The partition to mount: by its number, or by a label, UUID or type that only one partition has. */
  partition?: PartitionRef | undefined
  /** Makes the folder if it does not exist; it is not removed later. Its parent has to exist. Default false. */
  makeTarget?: boolean | undefined
}

export const MOUNT_OPTION_NAMES: readonly (keyof MountOptions)[] = [
  'fsType',
  'readOnly',
  'options',
  'partition',
  'makeTarget',
  'signal',
  'timeout',
]

/** Flags of fsmount(2): include/uapi/linux/mount.h, MOUNT_ATTR_*. */
const ATTRIBUTE = {
  rdonly: 0x1,
  nosuid: 0x2,
  nodev: 0x4,
  noexec: 0x8,
  atime: 0x70,
  noatime: 0x10,
  strictatime: 0x20,
  nodiratime: 0x80,
  nosymfollow: 0x20_0000,
} as const

/** What an option does to the attributes: takes the first off, and puts the second on. */
const ATTRIBUTES: Readonly<Record<string, readonly [off: number, on: number]>> = {
  ro: [0, ATTRIBUTE.rdonly],
  rw: [ATTRIBUTE.rdonly, 0],
  nosuid: [0, ATTRIBUTE.nosuid],
  suid: [ATTRIBUTE.nosuid, 0],
  nodev: [0, ATTRIBUTE.nodev],
  dev: [ATTRIBUTE.nodev, 0],
  noexec: [0, ATTRIBUTE.noexec],
  exec: [ATTRIBUTE.noexec, 0],
  // 0 of them is relatime
  relatime: [ATTRIBUTE.atime, 0],
  atime: [ATTRIBUTE.atime, 0],
  noatime: [ATTRIBUTE.atime, ATTRIBUTE.noatime],
  strictatime: [ATTRIBUTE.atime, ATTRIBUTE.strictatime],
  nodiratime: [0, ATTRIBUTE.nodiratime],
  diratime: [ATTRIBUTE.nodiratime, 0],
  nosymfollow: [0, ATTRIBUTE.nosymfollow],
  symfollow: [ATTRIBUTE.nosymfollow, 0],
}

/** A parameter of the filesystem; without a value it is a flag. */
export interface Parameter {
  key: string
  value?: string
}

/** The options, checked and complete. */
export interface WantedMount {
  fsType: string | undefined
  /** Undefined: as the device is. */
  readOnly: boolean | undefined
  /** Of the mount, but read-only. */
  attributes: number
  parameters: readonly Parameter[]
  partition: PartitionRef | undefined
  makeTarget: boolean
}

/** The attributes with or without that of a read-only mount. */
export function withReadOnly(attributes: number, readOnly: boolean): number {
  return readOnly ? attributes | ATTRIBUTE.rdonly : attributes
}

/** @throws TypeError */
export function checkTarget(value: unknown): string | null {
  if (value === null) return null
  if (typeof value !== 'string') throw wrongType('target', 'a path or null', value)
  if (value === '') throw wrongValue('target', 'must not be empty')
  if (value.includes('\0')) throw wrongValue('target', 'must not contain a zero byte')
  return value
}

/** @throws TypeError, RangeError */
export function checkWantedMount(given: MountOptions): WantedMount {
  const { fsType, readOnly, partition, makeTarget } = given
  if (fsType !== undefined && (typeof fsType !== 'string' || !/^[\w.-]+$/.test(fsType))) {
    throw wrongType('fsType', 'the name of a filesystem', fsType)
  }
  const all = splitOptions(given.options)
  let attributes = ATTRIBUTE.nosuid | ATTRIBUTE.nodev
  let writable: boolean | undefined
  const parameters: Parameter[] = []
  for (const option of all) {
    const attribute = Object.hasOwn(ATTRIBUTES, option) ? ATTRIBUTES[option] : undefined
    if (option === 'ro' || option === 'rw') writable = option === 'rw'
    else if (attribute) attributes = (attributes & ~attribute[0]) | attribute[1]
    else parameters.push(toParameter(option))
  }
  const asked = readOnly === undefined ? undefined : checkBoolean('readOnly', readOnly)
  if (asked !== undefined && asked === writable) {
    throw wrongValue('options', `must not contain ${writable ? 'rw' : 'ro'} with readOnly: ${asked}`)
  }
  return {
    fsType,
    readOnly: asked ?? (writable === undefined ? undefined : !writable),
    attributes,
    parameters,
    partition: partition === undefined ? undefined : checkPartitionRef(partition),
    makeTarget: makeTarget === undefined ? false : checkBoolean('makeTarget', makeTarget),
  }
}

function splitOptions(options: string | readonly string[] | undefined): readonly string[] {
  if (options === undefined) return []
  const all: unknown[] = typeof options === 'string' ? options.split(',') : Array.isArray(options) ? options : [options]
  for (const option of all) {
    if (typeof option !== 'string') throw wrongType('options', 'a text or a list of texts', option)
    if (option.includes('\0')) throw wrongValue('options', 'must not contain a zero byte')
  }
  return (all as string[]).filter((option) => option !== '')
}

function toParameter(option: string): Parameter {
  const equals = option.indexOf('=')
  const parameter = equals < 0 ? { key: option } : { key: option.slice(0, equals), value: option.slice(equals + 1) }
  // The device has been looked at; another must not be slipped in after that.
  if (parameter.key === 'source') throw wrongValue('options', 'must not name the source: that is the device')
  if (parameter.key === '') throw wrongValue('options', `must not contain ${JSON.stringify(option)}`)
  return parameter
}
