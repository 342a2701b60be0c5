/** Which filesystem is on a device, from its superblock; and whether that superblock is whole. */

import { crc32c } from '../common/crc32c.ts'
import { GPT_BLOCK_SIZES, isPowerOfTwo } from '../partitions/disk.ts'
import { type Signature, SIGNATURES } from './superblocks.ts'

/** What the beginning of a device shows. */
export interface Detected {
  /** In the order in which they count; the first is it, where the others are not as sure. */
  found: readonly Signature[]
  /** The bytes, for {@link faultOf}. */
  beginning: Buffer
}

const EXT = 1024
const [EXT_COMPAT, EXT_INCOMPAT, EXT_RO_COMPAT] = [EXT + 0x5c, EXT + 0x60, EXT + 0x64]
// fs/ext4/ext4.h
const HAS_JOURNAL = 0x4
const RECOVER = 0x4
const JOURNAL_DEVICE = 0x8
const METADATA_CHECKSUM = 0x400
/** What ext3 knows: filetype, recover, meta_bg; sparse_super, large_file. Ext2 knows all of them but recover. */
const EXT3_INCOMPAT = 0x2 | RECOVER | 0x10
const EXT3_RO_COMPAT = 0x1 | 0x2 | 0x4

/** `beginning` has PROBE_BYTES, or as many as the device has. */
export function detect(beginning: Buffer): Detected {
  const found = SIGNATURES.filter((signature) => isThere(signature, beginning)).map((signature) =>
    signature.title === 'ext4' ? describeExt(signature, beginning) : signature,
  )
  const titles = new Set<string>()
  const once = found.filter(({ title }) => !titles.has(title) && titles.add(title))
  const strong = once.filter(({ strength }) => strength === 'strong')
  return { found: strong.length > 0 ? strong : once, beginning }
}

function isThere({ fsType, places, magic }: Signature, beginning: Buffer): boolean {
  if (!places.some((at) => beginning.toString('latin1', at, at + magic.length) === magic)) return false
  return fsType !== 'vfat' || isFat(beginning)
}

/** A boot loader can leave such a text in the boot record of a disk: a FAT has a plausible geometry too. */
function isFat(sector: Buffer): boolean {
  return (
    sector.length >= 512 &&
    sector.readUInt16LE(510) === 0xaa55 &&
    GPT_BLOCK_SIZES.includes(sector.readUInt16LE(11)) &&
    isPowerOfTwo(sector.readUInt8(13)) &&
    sector.readUInt16LE(14) > 0 &&
    sector.readUInt8(16) > 0
  )
}

/** As mount(8) tells them apart: ext4 has features that ext3 does not know, ext3 has a journal. */
function describeExt(ext: Signature, beginning: Buffer): Signature {
  if (beginning.length < 2 * EXT) return ext
  const incompat = beginning.readUInt32LE(EXT_INCOMPAT)
  const roCompat = beginning.readUInt32LE(EXT_RO_COMPAT)
  if ((incompat & JOURNAL_DEVICE) !== 0) {
    return {
      ...ext,
      fsType: null,
      title: 'an external journal of ext4',
      hint: 'mount the filesystem that it belongs to',
    }
  }
  if ((incompat & ~EXT3_INCOMPAT) !== 0 || (roCompat & ~EXT3_RO_COMPAT) !== 0) return ext
  const title = (beginning.readUInt32LE(EXT_COMPAT) & HAS_JOURNAL) === 0 ? 'ext2' : 'ext3'
  return { ...ext, fsType: title, title }
}

/** Whether the superblock says that a journal has to be replayed; of ext alone it can be told. */
export function needsRecovery(fsType: string, beginning: Buffer): boolean {
  return isExt(fsType) && beginning.length >= 2 * EXT && (beginning.readUInt32LE(EXT_INCOMPAT) & RECOVER) !== 0
}

/** What is wrong with the superblock of a filesystem that the kernel refused; undefined: nothing that can be seen. */
export function faultOf(fsType: string, beginning: Buffer): string | undefined {
  const known = SIGNATURES.filter((signature) => signature.fsType === (isExt(fsType) ? 'ext4' : fsType))
  if (known.length > 0 && !known.some((signature) => isThere(signature, beginning))) {
    const others = detect(beginning).found.map(({ title }) => title)
    return `there is no superblock of ${fsType}${others.length > 0 ? `, but that of ${others.join(' and ')}` : ''}`
  }
  const sums = checksumOf(fsType, beginning)
  return sums === undefined || sums.stored === sums.computed
    ? undefined
    : `the checksum of its superblock is ${hex(sums.computed)}, should be ${hex(sums.stored)}`
}

interface Checksum {
  stored: number
  computed: number
}

/** Undefined: the filesystem has none, or one that is not looked at here. */
function checksumOf(fsType: string, beginning: Buffer): Checksum | undefined {
  if (isExt(fsType)) {
    if (beginning.length < 2 * EXT || (beginning.readUInt32LE(EXT_RO_COMPAT) & METADATA_CHECKSUM) === 0)
      return undefined
    // fs/ext4/super.c, ext4_superblock_csum: without the last inversion
    const computed = crc32c(beginning.subarray(EXT, EXT + 0x3fc), 0xffff_ffff)
    return { stored: beginning.readUInt32LE(EXT + 0x3fc), computed }
  }
  if (fsType === 'xfs') {
    if (beginning.length < 512) return undefined
    const sectorSize = beginning.readUInt16BE(102)
    // fs/xfs/libxfs/xfs_format.h: version 5 and later, sb_crc at 224
    if ((beginning.readUInt16BE(100) & 0xf) < 5 || sectorSize < 512 || sectorSize > beginning.length) return undefined
    return { stored: beginning.readUInt32LE(224), computed: inverted(beginning, 0, sectorSize, 224) }
  }
  if (fsType === 'btrfs') {
    const at = 0x1_0000
    // include/uapi/linux/btrfs_tree.h: csum_type 0 is CRC-32C, over all but the 32 bytes of the checksum itself
    if (beginning.length < at + 4096 || beginning.readUInt16LE(at + 0xc4) !== 0) return undefined
    const computed = (crc32c(beginning.subarray(at + 32, at + 4096), 0xffff_ffff) ^ 0xffff_ffff) >>> 0
    return { stored: beginning.readUInt32LE(at), computed }
  }
  return undefined
}

/** With the four bytes of the checksum itself taken as 0. */
function inverted(bytes: Buffer, start: number, length: number, at: number): number {
  const before = crc32c(bytes.subarray(start, start + at), 0xffff_ffff)
  const over = crc32c(new Uint8Array(4), before)
  return (crc32c(bytes.subarray(start + at + 4, start + length), over) ^ 0xffff_ffff) >>> 0
}

function isExt(fsType: string): boolean {
  return /^ext[234]$/.test(fsType)
}

function hex(value: number): string {
  return `0x${value.toString(16).padStart(8, '0')}`
}
