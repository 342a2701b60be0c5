/** What the running kernel can do: each found out by a harmless probe, once per process, never by its version. */

import { constants } from 'node:os'
import { binding } from './binding.ts'
import { readFileSync } from './files.ts'

const { EFAULT, EINVAL, ENOSYS, ENOTTY } = constants.errno

export type Feature = 'loopConfigure' | 'diskSeq' | 'diskSeqPerAttachment' | 'directIO' | 'mbr' | 'gpt'

const known = new Map<Feature, boolean>()

/** What has been found out so far; what has not been tried, or decided nothing, is not in it. */
export function knownFeatures(): Partial<Record<Feature, boolean>> {
  return Object.fromEntries(known)
}

/** Whether it has been found out that the kernel has it. */
export function isKnown(name: Feature): boolean {
  return known.get(name) === true
}

/** What only an attachment of our own can show: partitions found, direct I/O taken. */
export function observeFeature(name: Feature, found: boolean): void {
  known.set(name, found)
}

/** `fd` is any whole loop device. An answer that decides nothing (a sandbox's EPERM, say) is not remembered. */
function probe(name: Feature, answer: number, yes: (answer: number) => boolean): boolean {
  if (yes(answer)) known.set(name, true)
  else if ([-EINVAL, -ENOTTY, -ENOSYS].includes(answer)) known.set(name, false)
  return known.get(name) ?? true
}

/** LOOP_CONFIGURE, since 5.8: with a null pointer it answers EFAULT where it exists, EINVAL where not. */
export function hasLoopConfigure(fd: number): boolean {
  return (
    known.get('loopConfigure') ??
    probe('loopConfigure', binding().loopConfigureProbeSync(fd), (answer) => answer === -EFAULT)
  )
}

/** BLKGETDISKSEQ, since 5.15: the number that tells one attachment of a device from the next. */
export function hasDiskSeq(fd: number): boolean {
  return known.get('diskSeq') ?? probe('diskSeq', binding().blkGetDiskSeqSync(fd), (answer) => answer >= 0)
}

/**
 * Whether attaching moves the disk sequence number (K14: not from 5.15 to 6.4, but for stable kernels that took the
 * fix): then it alone tells one attachment from the next. False until an attach of this process has shown it.
 */
export function diskSeqCountsAttachments(): boolean {
  return known.get('diskSeqPerAttachment') ?? false
}

/** What an attach of our own saw of the number, before and after. */
export function observeDiskSeq(before: number | undefined, after: number | undefined): void {
  known.set('diskSeqPerAttachment', before !== undefined && after !== undefined && before !== after)
}

/**
 * The largest logical block size that LOOP_SET_BLOCK_SIZE takes, which `set` issues on an attached device that nobody
 * else uses; undefined where the answers decide nothing. The device keeps that size.
 */
export async function findLargestBlockSize(set: (bytes: number) => Promise<number>): Promise<number | undefined> {
  for (let bytes = 65_536; bytes > 512; bytes /= 2) {
    const answer = await set(bytes)
    if (answer >= 0) return bytes
    if (answer !== -EINVAL) return undefined
  }
  return 512
}

/** The largest logical block size that every kernel takes without harm. */
export function pageSize(): number {
  return binding().pageSizeSync()
}

let partitionShift: number | undefined

/** The minor of /dev/loopN: N, or N times the room that the module's max_part leaves for partitions. */
export function minorOfDevice(number: number): number {
  return number * 2 ** readPartitionShift()
}

/** The N of /dev/loopN, by its minor. */
export function numberOfMinor(minor: number): number {
  return Math.floor(minor / 2 ** readPartitionShift())
}

function readPartitionShift(): number {
  if (partitionShift === undefined) {
    const maxPart = readFileSync('/sys/module/loop/parameters/max_part')
    if (typeof maxPart === 'number') return 0
    // The kernel shows it rounded up to 2^n - 1.
    partitionShift = Math.ceil(Math.log2(Number(maxPart.toString()) + 1))
  }
  return partitionShift
}
