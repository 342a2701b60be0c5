/**
 * What filesystems, and what else can be on a block device, are known by: one row for each place of a magic number.
 * Where a row says `include/` or `fs/`, that is the kernel's source.
 */

/** How sure a signature is. A weak one can be left over in what another tool has written since. */
type Strength = 'strong' | 'weak'

export interface Signature {
  /** The kernel's name of the filesystem; null: it cannot be mounted. */
  fsType: string | null
  /** What it is called in messages. */
  title: string
  strength: Strength
  /** Bytes from the beginning; found at any of them, it counts. */
  places: readonly number[]
  /** Latin-1. */
  magic: string
  /** The filesystem cannot be written. */
  readOnly?: true
  /** Of what cannot be mounted: what to do with it. */
  hint?: string
}

/** How much of a device has to be read for all of them. */
export const PROBE_BYTES: number = 68 * 1024

/** Page sizes that Linux has had: the magic of swap space is at the end of the first page. */
const PAGE_SIZES = [4096, 8192, 16_384, 32_768, 65_536]

/** The volume recognition sequence of ECMA-167 and ISO 9660 begins in sector 16, and has a descriptor in each sector. */
const VOLUME_DESCRIPTORS = Array.from({ length: 16 }, (_, i) => 0x8000 + i * 2048)

/** The same for media whose sectors have 4096 bytes, as UDF on hard disks. */
const VOLUME_DESCRIPTORS_4096 = Array.from({ length: 8 }, (_, i) => 0x8000 + i * 4096)

/** In the order in which they count. */
export const SIGNATURES: readonly Signature[] = [
  // cryptsetup, "LUKS1 On-Disk Format Specification" 2.1, LUKS_MAGIC; LUKS2 the same
  {
    fsType: null,
    title: 'a LUKS container',
    strength: 'strong',
    places: [0],
    magic: 'LUKS\u00ba\u00be',
    hint: 'open it with cryptsetup open, and mount what that makes in /dev/mapper',
  },
  // LVM2, lib/label/label.h: LABEL_ID in one of the first four sectors
  {
    fsType: null,
    title: 'a physical volume of LVM',
    strength: 'strong',
    places: [0, 512, 1024, 1536],
    magic: 'LABELONE',
    hint: 'activate its volume group with vgchange -ay, and mount a volume of it',
  },
  // include/linux/swap.h, union swap_header; "SWAP-SPACE" is the old format
  ...['SWAPSPACE2', 'SWAP-SPACE'].map((magic): Signature => ({
    fsType: null,
    title: 'swap space',
    strength: 'strong',
    places: PAGE_SIZES.map((size) => size - magic.length),
    magic,
    hint: 'there are no files in swap space',
  })),
  // fs/xfs/libxfs/xfs_format.h, XFS_SB_MAGIC
  { fsType: 'xfs', title: 'xfs', strength: 'strong', places: [0], magic: 'XFSB' },
  // fs/squashfs/squashfs_fs.h, SQUASHFS_MAGIC
  { fsType: 'squashfs', title: 'squashfs', strength: 'strong', places: [0], magic: 'hsqs', readOnly: true },
  // fs/ext4/ext4.h, struct ext4_super_block at 1024, s_magic; which of the three it is, its features tell
  { fsType: 'ext4', title: 'ext4', strength: 'strong', places: [1024 + 0x38], magic: '\u0053\u00ef' },
  // include/linux/f2fs_fs.h, F2FS_SUPER_OFFSET, in each of the first two blocks of 4096 bytes; include/uapi/linux/magic.h, F2FS_SUPER_MAGIC
  { fsType: 'f2fs', title: 'f2fs', strength: 'strong', places: [1024, 4096 + 1024], magic: '\u0010\u0020\u00f5\u00f2' },
  // fs/erofs/erofs_fs.h, EROFS_SUPER_OFFSET; include/uapi/linux/magic.h, EROFS_SUPER_MAGIC_V1
  {
    fsType: 'erofs',
    title: 'erofs',
    strength: 'strong',
    places: [1024],
    magic: '\u00e2\u00e1\u00f5\u00e0',
    readOnly: true,
  },
  // fs/btrfs/fs.h, BTRFS_SUPER_INFO_OFFSET; include/uapi/linux/btrfs_tree.h, struct btrfs_super_block, magic
  { fsType: 'btrfs', title: 'btrfs', strength: 'strong', places: [0x1_0000 + 64], magic: '_BHRfS_M' },
  // fs/exfat/exfat_raw.h, struct boot_sector, fs_name
  { fsType: 'exfat', title: 'exfat', strength: 'strong', places: [3], magic: 'EXFAT   ' },
  // fs/ntfs3/ntfs.h, struct NTFS_BOOT, system_id
  { fsType: 'ntfs3', title: 'ntfs', strength: 'strong', places: [3], magic: 'NTFS    ' },
  // fs/udf/ecma_167.h, struct volStructDesc, VSD_STD_ID_NSR02 and NSR03
  ...['NSR02', 'NSR03'].map((magic): Signature => ({
    fsType: 'udf',
    title: 'udf',
    strength: 'weak',
    places: [...VOLUME_DESCRIPTORS, ...VOLUME_DESCRIPTORS_4096].map((place) => place + 1),
    magic,
  })),
  // include/uapi/linux/iso_fs.h, struct iso_volume_descriptor, ISO_STANDARD_ID
  { fsType: 'iso9660', title: 'iso9660', strength: 'weak', places: [0x8000 + 1], magic: 'CD001', readOnly: true },
  // include/uapi/linux/msdos_fs.h, struct fat_boot_sector, fs_type of fat16 and fat32
  ...(
    [
      ['FAT12   ', 54],
      ['FAT16   ', 54],
      ['FAT     ', 54],
      ['FAT32   ', 82],
    ] as const
  ).map(([magic, place]): Signature => ({ fsType: 'vfat', title: 'vfat', strength: 'weak', places: [place], magic })),
]
