/**
 * All that a kernel, and what runs on it from the start, can lack without the tests failing: a test that needs it is skipped, with the reason that is told
 * here. A tool that is missing is another matter: test/needs.ts.
 */

import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { PATH } from '../scripts/tools.js'

interface Lack {
  reason: string
  /** Whether it lacks that; none where only the test itself can see it. */
  isLacking?: () => boolean
}

export const LACKS = {
  'btrfs': filesystem('btrfs', 'CONFIG_BTRFS_FS'),
  'erofs': filesystem('erofs', 'CONFIG_EROFS_FS'),
  'exfat': filesystem('exfat', 'CONFIG_EXFAT_FS'),
  'f2fs': filesystem('f2fs', 'CONFIG_F2FS_FS'),
  'fuse': filesystem('fuse', 'CONFIG_FUSE_FS'),
  'iso9660': filesystem('iso9660', 'CONFIG_ISO9660_FS'),
  'ntfs3': filesystem('ntfs3', 'CONFIG_NTFS3_FS'),
  'squashfs': filesystem('squashfs', 'CONFIG_SQUASHFS'),
  'udf': filesystem('udf', 'CONFIG_UDF_FS'),
  'vfat': filesystem('vfat', 'CONFIG_VFAT_FS'),
  'xfs': filesystem('xfs', 'CONFIG_XFS_FS'),
  'udev': {
    reason: 'no udev is running: it is in guests of scripts/kernels',
    isLacking: () => !existsSync('/run/udev/control'),
  },
  'seccomp filters': {
    reason: 'the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER), by which ioctls are made to fail',
    isLacking: () => !existsSync('/proc/sys/kernel/seccomp/actions_avail'),
  },
  'device cgroup': {
    reason: 'there is no device cgroup of version 1, which a test can write to without a BPF program',
    isLacking: () => !existsSync('/sys/fs/cgroup/devices/devices.deny'),
  },
  'user namespaces': {
    reason:
      'the kernel is built or set (kernel.unprivileged_userns_clone, AppArmor) to let ordinary users make no user namespace',
  },
  'disk sequence numbers': { reason: 'the kernel has no disk sequence numbers, which are of 5.15' },
  'LOOP_CTL_ADD of -1': {
    reason: 'LOOP_CTL_ADD of -1 is EEXIST on this kernel while there is a free device: up to 5.13',
  },
  'look at the file': { reason: 'the driver takes a file that it cannot read: up to 6.14' },
  'reads beyond the end': { reason: 'what is read beyond the end of the file is zeros, and no error: up to 6.14' },
  'bounds of BLKPG': { reason: 'BLKPG takes a partition that ends beyond the device: up to 6.7' },
  'words of ext4': { reason: 'ext4 tells the kernel log alone what is wrong with an option: up to 5.16' },
  'leftover partitions': {
    reason: 'the kernel itself drops the partitions of a device that is detached, at once or at its next open',
  },
} as const satisfies Record<string, Lack>

export type LackName = keyof typeof LACKS

function filesystem(name: string, option: string) {
  return {
    reason: `the kernel has no ${name} (${option})`,
    isLacking: () => {
      // A module is in the list only when it is loaded.
      spawnSync('modprobe', ['--quiet', name], { env: { PATH } })
      return !new RegExp(`\\b${name}$`, 'm').test(readFileSync('/proc/filesystems', 'utf8'))
    },
  }
}
