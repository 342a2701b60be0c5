/** Filesystems of every kind, made by their tools, and what the kernel says is mounted. */

import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect } from 'vitest'
import type { Tool } from '../../scripts/tools.js'
import { attachedNumbers, settleUdev, sysfs, test as base } from '../kernel/support.ts'
import { env, needs } from '../needs.ts'

const MiB = 1 << 20

interface Maker {
  program: Tool
  /** How large the image has to be, in MiB; 0: the program makes it. */
  size: number
  words: (image: string, source: string) => string[]
  readOnly?: true
}

/** By the name that blkid has for it. */
export const MAKERS = {
  ext2: { program: 'mkfs.ext4', size: 8, words: (image) => ['-q', '-F', '-t', 'ext2', image] },
  ext3: { program: 'mkfs.ext4', size: 8, words: (image) => ['-q', '-F', '-t', 'ext3', image] },
  ext4: { program: 'mkfs.ext4', size: 16, words: (image) => ['-q', '-F', image] },
  xfs: { program: 'mkfs.xfs', size: 320, words: (image) => ['-q', '-f', image] },
  btrfs: { program: 'mkfs.btrfs', size: 128, words: (image) => ['-q', '-f', image] },
  squashfs: {
    program: 'mksquashfs',
    size: 0,
    words: (image, source) => [source, image, '-quiet', '-no-progress', '-noappend'],
    readOnly: true,
  },
  erofs: { program: 'mkfs.erofs', size: 0, words: (image, source) => ['--quiet', image, source], readOnly: true },
  vfat: { program: 'mkfs.vfat', size: 64, words: (image) => ['-F', '32', image] },
  fat12: { program: 'mkfs.vfat', size: 1, words: (image) => ['-F', '12', image] },
  fat16: { program: 'mkfs.vfat', size: 16, words: (image) => ['-F', '16', image] },
  exfat: { program: 'mkfs.exfat', size: 8, words: (image) => [image] },
  ntfs: { program: 'mkfs.ntfs', size: 8, words: (image) => ['-q', '-F', image] },
  f2fs: { program: 'mkfs.f2fs', size: 64, words: (image) => ['-q', image] },
  iso9660: {
    program: 'xorriso',
    size: 0,
    words: (image, source) => ['-as', 'mkisofs', '-quiet', '-o', image, source],
    readOnly: true,
  },
  udf: { program: 'mkudffs', size: 8, words: (image) => ['-b', '2048', image] },
  swap: { program: 'mkswap', size: 8, words: (image) => [image] },
  crypto_LUKS: {
    program: 'cryptsetup',
    size: 32,
    words: (image, source) => [
      'luksFormat',
      '--batch-mode',
      '--pbkdf',
      'pbkdf2',
      '--pbkdf-force-iterations',
      '1000',
      '--key-file',
      join(source, 'hello'),
      image,
    ],
  },
} as const satisfies Record<string, Maker>

export type Made = keyof typeof MAKERS

/** Makes the filesystem in the image; one that is made of files has `hello` in it. Skips the test without its tool. */
export function makeFilesystem(name: Made, image: string): void {
  const maker: Maker = MAKERS[name]
  needs(maker.program)
  const source = `${image}.source`
  mkdirSync(source)
  writeFileSync(join(source, 'hello'), 'hello\n')
  if (maker.size > 0) {
    writeFileSync(image, '')
    truncateSync(image, maker.size * MiB)
  }
  execFileSync(maker.program, maker.words(image, source), { env, stdio: ['ignore', 'ignore', 'pipe'] })
  rmSync(source, { recursive: true })
}

/** A line of mountinfo, as findmnt tells it: the witness that is not ours. */
export interface Listed {
  target: string
  source: string
  fstype: string
  options: string
}

/** What is mounted on the folder, and on what is in it. */
export function mountsUnder(folder: string): Listed[] {
  const output = execFileSync('findmnt', ['--json', '--list', '--output', 'TARGET,SOURCE,FSTYPE,OPTIONS'], {
    env,
    encoding: 'utf8',
  })
  const { filesystems } = JSON.parse(output) as { filesystems: Listed[] }
  return filesystems.filter(({ target }) => target === folder || target.startsWith(`${folder}/`))
}

/** That no device has the file any more. By the file: the number can be that of another program's device by now. */
export function expectDetached(file: string): void {
  settleUdev()
  const left = attachedNumbers().filter((number) => sysfs(number, 'loop/backing_file') === file)
  expect(left, `still attached to ${file}`).toEqual([])
}

export interface Fixtures {
  /** A folder to mount on, which is there, and empty. */
  place: string
}

/** The test of real devices, which also leaves nothing mounted. */
export const test = base.extend<Fixtures>({
  place: async ({ folder }, use) => {
    const place = join(folder, 'mnt')
    mkdirSync(place)
    await use(place)
    const left = mountsUnder(folder)
    for (const { target } of left.toReversed()) execFileSync('umount', ['--lazy', target])
    expect(left, 'left mounted').toEqual([])
    if (existsSync(place)) rmSync(place, { recursive: true })
  },
})
