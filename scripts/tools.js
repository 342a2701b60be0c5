/**
 * The programs and files, beside Node and npm, that the scripts and the tests of this checkout need, and the packages
 * that have them. `npm run setup` installs by this table, and a test that is skipped names the package by it.
 */

import { accessSync, constants, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'

/** What tools are needed for; the words are those of `npm run setup -- --for`. */
export const PURPOSES = {
  'build': 'compiling the addon',
  'devices': 'all tests on real devices',
  'tests': 'single tests, which are skipped without',
  'asan': 'npm run test:asan',
  'runtimes': 'npm run test:runtimes',
  'pack': 'npm run test:pack',
  'kernels': 'scripts/kernels',
  'kernel-build': 'scripts/kernels, for the kernels that Debian has no binary of',
  'vm': 'scripts/vm-test',
}

/** How root installs packages there, and the ids by which /etc/os-release tells the distribution. */
export const DISTRIBUTIONS = [
  { name: 'Debian, Ubuntu', ids: ['debian', 'ubuntu'], install: 'apt-get install --no-install-recommends' },
  { name: 'Fedora', ids: ['fedora', 'rhel', 'centos'], install: 'dnf install' },
  { name: 'Arch', ids: ['arch'], install: 'pacman -S --needed' },
  { name: 'Alpine', ids: ['alpine'], install: 'apk add' },
  { name: 'openSUSE', ids: ['opensuse', 'suse'], install: 'zypper install' },
]

/**
 * Each tool, a program or the path of a file, with what it is needed for, and its package in each of DISTRIBUTIONS, in
 * their order; null where that has none, and one name alone where it is the same in all.
 *
 * @satisfies {Record<string, [purposes: string, ...packages: (string | null)[]]>}
 */
export const TOOLS = {
  'make': ['build kernel-build', 'make'],
  'g++': ['build', 'g++', 'gcc-c++', 'gcc', 'g++', 'gcc-c++'],
  'python3': ['build devices', 'python3', 'python3', 'python', 'python3', 'python3'],
  '/usr/include/linux/loop.h': [
    'build',
    'linux-libc-dev',
    'kernel-headers',
    'linux-api-headers',
    'linux-headers',
    'linux-glibc-devel',
  ],

  'losetup': ['devices', 'mount', 'util-linux', 'util-linux', 'losetup', 'util-linux'],
  'mount': ['devices', 'mount', 'util-linux', 'util-linux', 'mount', 'util-linux'],
  'unshare': ['devices', 'util-linux'],
  'script': ['devices', 'bsdutils', 'util-linux-script', 'util-linux', 'util-linux-misc', 'util-linux'],
  'findmnt': ['devices', 'util-linux', 'util-linux', 'util-linux', 'findmnt', 'util-linux'],
  'mkfs.ext4': ['devices', 'e2fsprogs'],
  'perl': ['devices', 'perl-base', 'perl-interpreter', 'perl', 'perl', 'perl-base'],
  'bash': ['devices', 'bash'],

  'cc': ['tests kernels kernel-build', 'gcc'],
  'modprobe': ['tests', 'kmod'],
  'sfdisk': ['tests', 'fdisk', 'util-linux', 'util-linux', 'sfdisk', 'util-linux'],
  'fdisk': ['tests', 'fdisk', 'util-linux', 'util-linux', 'util-linux', 'util-linux'],
  'sgdisk': ['tests', 'gdisk', 'gdisk', 'gptfdisk', 'sgdisk', 'gptfdisk'],
  'parted': ['tests', 'parted'],
  'partx': ['tests', 'util-linux', 'util-linux', 'util-linux', 'partx', 'util-linux'],
  'xorriso': ['tests', 'xorriso', 'xorriso', 'libisoburn', 'xorriso', 'xorriso'],
  'mksquashfs': ['tests', 'squashfs-tools', 'squashfs-tools', 'squashfs-tools', 'squashfs-tools', 'squashfs'],
  'mkfs.erofs': ['tests', 'erofs-utils'],
  'fuse2fs': ['tests', 'fuse2fs', 'fuse2fs', 'fuse2fs', 'fuse2fs', 'fuse2fs'],
  'mkfs.xfs': ['tests', 'xfsprogs'],
  'xfs_growfs': ['tests', 'xfsprogs', 'xfsprogs', 'xfsprogs', 'xfsprogs-extra', 'xfsprogs'],
  'mkfs.btrfs': ['tests', 'btrfs-progs', 'btrfs-progs', 'btrfs-progs', 'btrfs-progs', 'btrfsprogs'],
  'mkfs.vfat': ['tests', 'dosfstools'],
  'mkfs.exfat': ['tests', 'exfatprogs'],
  'mkfs.f2fs': ['tests', 'f2fs-tools'],
  'mkfs.ntfs': ['tests', 'ntfs-3g', 'ntfsprogs', 'ntfs-3g', 'ntfs-3g-progs', 'ntfsprogs'],
  'mkudffs': ['tests', 'udftools'],
  'cryptsetup': ['tests', 'cryptsetup-bin', 'cryptsetup', 'cryptsetup', 'cryptsetup', 'cryptsetup'],
  'mkswap': ['tests', 'util-linux', 'util-linux', 'util-linux', 'util-linux-misc', 'util-linux'],
  'blkid': ['tests', 'util-linux', 'util-linux', 'util-linux', 'blkid', 'util-linux'],
  'flock': ['tests', 'util-linux', 'util-linux', 'util-linux', 'flock', 'util-linux'],
  'fsfreeze': ['tests', 'util-linux', 'util-linux', 'util-linux', 'util-linux-misc', 'util-linux'],
  'setpriv': ['tests', 'util-linux', 'util-linux', 'util-linux', 'setpriv', 'util-linux'],
  'mount.exfat-fuse': ['tests', 'exfat-fuse', null, null, null, null],
  'strace': ['tests', 'strace'],
  'zsh': ['tests', 'zsh'],
  'fish': ['tests', 'fish'],
  'groff': ['tests', 'groff-base', 'groff-base', 'groff', 'groff', 'groff'],
  'runc': ['tests', 'runc'],
  '/usr/share/containers/seccomp.json': [
    'tests',
    'golang-github-containers-common',
    'containers-common',
    'containers-common',
    'containers-common',
    'libcontainers-common',
  ],

  'git': ['asan', 'git'],
  'openssl': ['runtimes pack', 'openssl'],
  'readelf': ['pack', 'binutils'],
  'qemu-aarch64-static': ['pack', 'qemu-user-static', 'qemu-user-static-aarch64', 'qemu-user-static', null, null],
  '/usr/aarch64-linux-gnu/lib/libstdc++.so.6': ['pack', 'libstdc++6-arm64-cross', null, null, null, null],
  '/lib/ld-musl-x86_64.so.1': ['pack', 'musl', 'musl-libc', 'musl', 'musl', null],
  'qemu-system-x86_64': [
    'vm',
    'qemu-system-x86',
    'qemu-system-x86-core',
    'qemu-system-x86',
    'qemu-system-x86_64',
    'qemu-x86',
  ],
  'depmod': ['vm kernels kernel-build', 'kmod'],
  'zstd': ['vm', 'zstd'],
  'xz': ['vm kernel-build', 'xz-utils', 'xz', 'xz', 'xz', 'xz'],
  'patchelf': ['kernels', 'patchelf'],
  'flex': ['kernel-build', 'flex'],
  'bison': ['kernel-build', 'bison'],
  'bc': ['kernel-build', 'bc'],
}

/** @typedef {keyof typeof TOOLS} Tool */
/** @typedef {keyof typeof PURPOSES} Purpose */

/** Where programs are looked for: ordinary users have no sbin in their path. */
export const PATH = [process.env['PATH'], '/usr/local/sbin', '/usr/sbin', '/sbin'].filter(Boolean).join(':')

/** @param {Tool} tool */
export function isThere(tool) {
  return tool.startsWith('/') ? exists(tool, constants.F_OK) : PATH.split(':').some((folder) => isProgram(folder, tool))
}

/** The tools for these purposes that are not there. @param {readonly Purpose[]} purposes */
export function missingTools(purposes) {
  return /** @type {Tool[]} */ (Object.keys(TOOLS)).filter((tool) => {
    const [all] = TOOLS[tool]
    return purposes.some((purpose) => all.split(' ').includes(purpose)) && !isThere(tool)
  })
}

/** The package that has the tool, in that one of DISTRIBUTIONS. @param {Tool} tool @param {number} distribution */
export function packageOf(tool, distribution) {
  const [, ...packages] = TOOLS[tool]
  return packages.length === 1 ? packages[0] : packages[distribution]
}

/** The index in DISTRIBUTIONS of what this machine runs; undefined where it is another. */
export function thisDistribution() {
  const text = exists('/etc/os-release', constants.R_OK) ? readFileSync('/etc/os-release', 'utf8') : ''
  const ids = [...text.matchAll(/^ID(?:_LIKE)?="?([^"\n]*)/gm)].flatMap(([, words = '']) => words.split(' '))
  const index = DISTRIBUTIONS.findIndex(({ ids: known }) =>
    ids.some((id) => known.some((name) => id === name || id.startsWith(`${name}-`))),
  )
  return index === -1 ? undefined : index
}

/** That a tool is missing, in words, with its package. @param {readonly Tool[]} tools */
export function describeMissing(tools) {
  const distribution = thisDistribution() ?? 0
  const named = tools.map((tool) => `${tool} (package ${packageOf(tool, distribution) ?? 'not known'})`)
  return `${named.join(', ')} ${tools.length === 1 ? 'is' : 'are'} missing`
}

/** @param {string} folder @param {string} name */
function isProgram(folder, name) {
  const path = join(folder, name)
  return exists(path, constants.X_OK) && statSync(path).isFile()
}

/** @param {string} path @param {number} mode */
function exists(path, mode) {
  try {
    accessSync(path, mode)
    return true
  } catch {
    return false
  }
}
