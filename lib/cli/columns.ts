/** The columns of `loopctl list`, by the names that losetup and lsblk give them. */

import type { LoopInfo } from '../observe/list.ts'
import type { KnownPartition } from '../kernel/sysfs.ts'
import type { LoopInfo64 } from '../kernel/uapi.ts'
import { formatDevice } from '../kernel/uapi.ts'
import { UsageError } from './parse.ts'
import { type Heading, humanOffset, humanSize, printable } from './text.ts'

/** A device, and what it has answered itself where it was asked; or a partition of a device, in a tree. */
export interface Row {
  info?: LoopInfo
  asked?: LoopInfo64 | undefined
  partition?: KnownPartition
  /** All that are shown, among which those below a device are looked for. */
  all: readonly LoopInfo[]
}

export interface Column extends Heading {
  /** What it shows, for the help. */
  about: string
  /** It is not in /sys: the device is opened for it. */
  isAsked?: true
  cell: (row: Row, isForPeople: boolean) => string
  /** The members of JSON that are in the column. */
  members: (row: Row) => object
}

/** A column that is one member of LoopInfo. */
function member<Key extends keyof LoopInfo>(
  title: string,
  about: string,
  key: Key,
  show: (value: LoopInfo[Key], isForPeople: boolean) => string,
  ofPartition?: (partition: KnownPartition) => LoopInfo[Key],
): Column {
  const valueOf = ({ info, partition }: Row) => info?.[key] ?? (partition && ofPartition?.(partition))
  return {
    title,
    about,
    cell: (row, isForPeople) => {
      const value = valueOf(row)
      return value === undefined || value === null ? '-' : show(value, isForPeople)
    },
    members: (row) => ({ [key]: valueOf(row) ?? null }),
  }
}

/** A column that only the device itself can tell. */
function asked(title: string, about: string, key: string, pick: (info: LoopInfo64) => string): Column {
  return {
    title,
    about,
    isAsked: true,
    cell: ({ info, asked: answer }) => {
      if (answer !== undefined) return printable(pick(answer)) || '-'
      return info?.attached ? '?' : '-'
    },
    members: ({ asked: answer }) => ({ [key]: answer === undefined ? null : pick(answer) }),
  }
}

const size = (bytes: number, isForPeople: boolean) => (isForPeople ? humanSize(bytes) : String(bytes))
const offset = (bytes: number, isForPeople: boolean) => (isForPeople ? humanOffset(bytes) : String(bytes))
const flag = (isSet: boolean) => (isSet ? '1' : '0')
const right = true

/** In the order of the help. */
const COLUMNS: readonly Column[] = [
  member('NAME', 'the device', 'path', String, ({ path }) => path),
  member('MAJ:MIN', 'its major and minor number', 'device', String, ({ device }) => device),
  { ...member('DISKSEQ', 'its disk sequence number, which changes at each attach', 'diskSeq', String), right },
  { ...member('SIZE', 'its size', 'size', size, (partition) => partition.size), right },
  { ...member('OFFSET', 'the byte of the file at which it begins', 'offset', offset, ({ start }) => start), right },
  { ...member('SIZELIMIT', 'how many bytes of the file it shows at most; 0: all', 'sizeLimit', offset), right },
  { ...member('LOG-SEC', 'its logical block size', 'blockSize', offset), right },
  {
    title: 'FLAGS',
    about: 'read-only, autoclear, partscan, direct-io',
    cell: ({ info, partition }) => flagsOf(info ?? partition),
    members: ({ info }) => {
      if (info === undefined) return {}
      const { readOnly, autoclear, partscan, directIO } = info
      return { readOnly, autoclear, partscan, directIO }
    },
  },
  member('RO', '1: read-only', 'readOnly', flag, ({ readOnly }) => readOnly),
  member('AUTOCLEAR', '1: the kernel detaches it when its last user closes it', 'autoclear', flag),
  member('PARTSCAN', '1: the kernel looks for partitions', 'partscan', flag),
  member('DIO', '1: direct I/O', 'directIO', flag),
  {
    title: 'BACK-FILE',
    about: 'the backing file; for a device on top of another one, also the file below',
    cell: ({ info, all }) => (info === undefined ? '-' : fileOf(info) + fileBelow(info, all)),
    members: ({ info }) => ({ backingFile: info?.backingFile ?? null, backingDeleted: info?.backingDeleted ?? false }),
  },
  asked('REF', 'the reference, a tag given at the attach', 'reference', ({ fileName }) => fileName),
  asked('BACK-MAJ:MIN', 'the device number of the filesystem that has the file', 'backingDevice', ({ device }) =>
    formatDevice(device),
  ),
  asked('BACK-INO', 'the inode of the file', 'backingInode', ({ inode }) => String(inode)),
]

const USUAL = ['NAME', 'SIZE', 'OFFSET', 'SIZELIMIT', 'LOG-SEC', 'FLAGS', 'BACK-FILE']

/** `NAME,REF`: these; `+REF`: these too. */
export function parseColumns(text: string = USUAL.join(',')): Column[] {
  const names = text.startsWith('+') ? [...USUAL, ...text.slice(1).split(',')] : text.split(',')
  return names.map((name) => {
    const column = COLUMNS.find(({ title }) => title === name.toUpperCase())
    if (column !== undefined) return column
    throw new UsageError(
      `there is no column '${name}'`,
      `the columns are ${COLUMNS.map(({ title }) => title).join(', ')}`,
    )
  })
}

/** For the help: each column, and what it shows. */
export const COLUMNS_HELP: readonly (readonly [string, string])[] = COLUMNS.map(({ title, about, isAsked }) => [
  title,
  isAsked ? `${about} (this opens the device, which needs privileges)` : about,
])

function flagsOf(of: Partial<Pick<LoopInfo, 'readOnly' | 'autoclear' | 'partscan' | 'directIO'>> | undefined): string {
  const flags = [
    of?.readOnly && 'read-only',
    of?.autoclear && 'autoclear',
    of?.partscan && 'partscan',
    of?.directIO && 'direct-io',
  ].filter((text) => typeof text === 'string')
  return flags.join(',') || '-'
}

/** Devices come and go while they are read: what looks like a circle ends. */
function fileBelow({ lower }: LoopInfo, all: readonly LoopInfo[], depth = all.length): string {
  const below = depth === 0 ? undefined : all.find(({ number }) => number === lower)
  return below === undefined ? '' : ` -> ${fileOf(below)}${fileBelow(below, all, depth - 1)}`
}

/** The backing file as it is shown. */
export function fileOf({ attached, backingFile, backingDeleted }: LoopInfo): string {
  if (!attached) return '-'
  return `${printable(backingFile ?? '?')}${backingDeleted ? ' (deleted)' : ''}`
}
