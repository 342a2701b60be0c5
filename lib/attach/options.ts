/** The options of attach(), checked before any system call. */

import {
  type Bytes,
  checkBlockSize,
  checkBoolean,
  checkBytes,
  checkLoopNumber,
  checkReference,
  wrongType,
  wrongValue,
} from '../common/arguments.ts'
import { checkPartitionRef, type PartitionRef } from '../partitions/ref.ts'
import type { Settings } from './configure.ts'

/** How to attach. Everything is optional; `undefined` counts as absent. */
export interface AttachOptions {
  /**
   * Default false. A file that cannot be opened for writing is then an error (`backing-not-writable`), never a silent
   * read-only device. A descriptor's own access mode decides where this is not given.
   */
  readOnly?: boolean | undefined
  /** Where in the file the device begins, in bytes. Default 0. */
  offset?: Bytes | undefined
  /** How many bytes of the file the device shows at most. Default 0: to its end. */
  sizeLimit?: Bytes | undefined
  /**
   * Logical block size in bytes: a power of two from 512 to the page size. `'auto'`: that for which the GPT of the image
   * was made, if it has one. Default: the kernel's choice.
   */
  blockSize?: number | 'auto' | undefined
  /**
   * Bypass the page cache for the backing file. `true`: an error (`direct-io-unavailable`) where the kernel cannot;
   * `'prefer'`: buffered instead. Default false.
   */
  directIO?: boolean | 'prefer' | undefined
  /**
   * Partitions as /dev/loopNpM, by whatever works here. `true`: the kernel looks for them (`LO_FLAGS_PARTSCAN`), and
   * where it has no parser for the table, GPT or MBR, it is read here and the kernel told with BLKPG. `'kernel'`: its
   * parsers alone. `'user'`: BLKPG alone, and without the flag; `bad-partition-table` where no copy of the GPT is whole.
   * What is left out, cut or otherwise odd is among the warnings; an image without a table is no error. Resolves when
   * each partition has its node. Default false.
   */
  partscan?: boolean | 'kernel' | 'user' | undefined
  /**
   * One partition of the image, without the kernel's partitions: the device begins where it begins, and ends where it
   * ends, or with the file. `no-such-partition` where none or several match. Not with `offset`, `sizeLimit` or
   * `partscan`.
   */
  partition?: PartitionRef | undefined
  /**
   * `'auto'`, the default: a node that is missing in a /dev which the kernel does not look after, a container's, is made
   * with mknod(2); `node-missing` where that is not allowed. `false`: none is made.
   */
  createNode?: 'auto' | false | undefined
  /** The kernel detaches the device when its last user closes it, even after `kill -9`. Default true. */
  autoclear?: boolean | undefined
  /** This /dev/loopN, 0 to 1048575, made if there is none. Default: any free one. */
  number?: number | undefined
  /**
   * What to do where another attachment takes some of the same bytes of the file, and either of them can write.
   * `'refuse'`, the default: rejects with `overlap`. `'allow'`: nothing is checked. `'reuse'`: an attachment of the same
   * file, offset, size limit and `readOnly` (and block size and number, if given) is opened and returned, with
   * `owned: false`; without one a fresh attach; any other overlap is refused.
   */
  overlap?: 'refuse' | 'allow' | 'reuse' | undefined
  /** `lo_file_name`: a tag of your own, at most 63 bytes. */
  reference?: string | undefined
  /**
   * A stack of two loop devices, for filesystems that a change of the backing file would shut down: ext4 or xfs is
   * mounted from the upper one, which is the device returned, and the change happens in the lower one. Needs
   * `readOnly: true`. Default false.
   */
  swappable?: boolean | undefined
  /**
   * Locks the device as `device.lock()` does, before partitions are looked for; it ends with detach, release, or
   * `(await device.lock()).release()`. Default false.
   */
  lock?: boolean | undefined
  /** Gives up, undoes what had been done, and rejects with the signal's reason. */
  signal?: AbortSignal | undefined
  /**
   * Milliseconds for the whole of it; 0: one try. Default 10 000. A call of the kernel that takes longer is not cut
   * short, and what it has attached by then is kept.
   */
  timeout?: number | undefined
}

export const OPTION_NAMES: readonly (keyof AttachOptions)[] = [
  'readOnly',
  'offset',
  'sizeLimit',
  'blockSize',
  'directIO',
  'partscan',
  'partition',
  'createNode',
  'autoclear',
  'number',
  'overlap',
  'reference',
  'swappable',
  'lock',
  'signal',
  'timeout',
]

/** The options, checked and complete. */
export interface Wanted extends Omit<Settings, 'readOnly' | 'partscan' | 'blockSize'> {
  blockSize: number | 'auto' | undefined
  partscan: boolean | 'kernel' | 'user'
  partition: PartitionRef | undefined
  createNode: boolean
  /** Undefined: the descriptor decides. */
  readOnly: boolean | undefined
  number: number | undefined
  overlap: 'refuse' | 'allow' | 'reuse'
  lock: boolean
}

/** Whether the device gets LO_FLAGS_PARTSCAN: with it, a rescan or LOOP_CHANGE_FD drops what BLKPG has added. */
export function isScanWanted({ partscan }: Pick<Wanted, 'partscan'>): boolean {
  return partscan === true || partscan === 'kernel'
}

/** @throws TypeError, RangeError */
export function checkWanted(given: AttachOptions): Wanted {
  const { readOnly, offset, sizeLimit, blockSize, directIO, partscan, createNode } = given
  const { autoclear, number, overlap, reference, partition } = given
  if (partition !== undefined && (offset !== undefined || sizeLimit !== undefined || (partscan ?? false) !== false)) {
    throw wrongValue('partition', 'cannot be had with offset, sizeLimit or partscan')
  }
  if (partscan !== undefined && !([true, false, 'kernel', 'user'] as unknown[]).includes(partscan)) {
    throw wrongType('partscan', "a boolean, 'kernel' or 'user'", partscan)
  }
  if (!(['auto', false, undefined] as unknown[]).includes(createNode)) {
    throw wrongValue('createNode', "must be 'auto' or false")
  }
  if (directIO !== undefined && directIO !== 'prefer' && typeof directIO !== 'boolean') {
    throw wrongType('directIO', "a boolean or 'prefer'", directIO)
  }
  if (overlap !== undefined && !['refuse', 'allow', 'reuse'].includes(overlap)) {
    throw wrongValue('overlap', "must be 'refuse', 'allow' or 'reuse'")
  }
  return {
    readOnly: readOnly === undefined ? undefined : checkBoolean('readOnly', readOnly),
    offset: offset === undefined ? 0n : checkBytes('offset', offset),
    sizeLimit: sizeLimit === undefined ? 0n : checkBytes('sizeLimit', sizeLimit),
    blockSize:
      blockSize === undefined || blockSize === 'auto' ? blockSize : checkBlockSize('blockSize', blockSize, 65_536),
    directIO: directIO ?? false,
    partscan: partscan ?? false,
    partition: partition === undefined ? undefined : checkPartitionRef(partition),
    createNode: createNode !== false,
    autoclear: autoclear === undefined ? true : checkBoolean('autoclear', autoclear),
    number: number === undefined ? undefined : checkLoopNumber(number),
    reference: reference === undefined ? '' : checkReference(reference),
    overlap: overlap ?? 'refuse',
    lock: given.lock === undefined ? false : checkBoolean('lock', given.lock),
  }
}
