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

/** The options of {@link attach}. `undefined` counts as left out. */
export interface AttachOptions {
  /**
   * Whether the device is read-only. Default false: if the file cannot be opened for writing, rejects with
   * `backing-not-writable`; the device never becomes read-only silently. If the file is given as a descriptor, the
   * default is the descriptor's own access mode.
   */
  readOnly?: boolean | undefined
  /** The byte of the file at which the device begins. Default 0. */
  offset?: Bytes | undefined
  /** How many bytes of the file the device shows at most. Default 0: up to the end of the file. */
  sizeLimit?: Bytes | undefined
  /**
   * Logical block size in bytes: a power of two from 512 to the page size. `'auto'`: the block size for which the
   * image's GPT was made, if it has a GPT. Default: the kernel chooses.
   */
  blockSize?: number | 'auto' | undefined
  /**
   * Bypasses the page cache of the backing file. If the kernel cannot do that, `true` rejects with
   * `direct-io-unavailable`, and `'prefer'` uses buffered I/O. Default false.
   */
  directIO?: boolean | 'prefer' | undefined
  /**
   * Makes the partitions appear as /dev/loopNpM. `true`: the kernel looks for them (`LO_FLAGS_PARTSCAN`); if it has no
   * parser for the table, loopctl reads the table (GPT or MBR) and adds the partitions with BLKPG. `'kernel'`: only the
   * kernel's parsers. `'user'`: only BLKPG, without the flag; rejects with `bad-partition-table` if no copy of the GPT
   * is valid. If a partition is left out or cut, or the table is odd otherwise, there is a warning. An image without a
   * table is no error. `attach` resolves when each partition has its node. Default false.
   */
  partscan?: boolean | 'kernel' | 'user' | undefined
  /**
   * Attaches a single partition of the image: the device begins and ends where the partition does, or ends with the
   * file. Rejects with `no-such-partition` if no partition or several match. It cannot be combined with `offset`,
   * `sizeLimit` or `partscan`.
   */
  partition?: PartitionRef | undefined
  /**
   * `'auto'`, the default: makes a node that is missing in /dev, as in a container, with mknod(2); rejects with
   * `node-missing` if that is not allowed. `false`: makes no node.
   */
  createNode?: 'auto' | false | undefined
  /** The kernel detaches the device when its last user closes it, even after `kill -9`. Default true. */
  autoclear?: boolean | undefined
  /**
   * The N of the /dev/loopN to use, 0 to 1048575. The device is made if it does not exist. Default: any free device.
   */
  number?: number | undefined
  /**
   * What to do if another device shows some of the same bytes of the file, and one of the two can write. `'refuse'`,
   * the default: rejects with `overlap`. `'allow'`: does not check. `'reuse'`: if a device is attached with the same
   * file, offset, size limit and `readOnly` (and block size and number, if you give them), returns a handle of it with
   * `owned: false`; any other overlap rejects with `overlap`.
   */
  overlap?: 'refuse' | 'allow' | 'reuse' | undefined
  /** A tag of your own that the kernel keeps with the device (`lo_file_name`), at most 63 bytes. */
  reference?: string | undefined
  /**
   * Attaches two loop devices, one on top of the other, for filesystems that a change of the backing file would shut
   * down. `attach` returns the upper device, from which you mount ext4 or xfs; the file is changed in the lower device.
   * Needs `readOnly: true`. Default false.
   */
  swappable?: boolean | undefined
  /**
   * Locks the device as `device.lock()` does, before loopctl looks for partitions. The lock ends with detach, release,
   * or `(await device.lock()).release()`. Default false.
   */
  lock?: boolean | undefined
  /** When it is aborted, `attach` rejects with the signal's reason, and undoes what it had done. */
  signal?: AbortSignal | undefined
  /**
   * Milliseconds for the whole call; 0: one try. Default 10 000. If a system call takes longer, its thread undoes it
   * when it returns.
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
