/** Images as people have them, made by the tools that make them; and what of each is shown. */

import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { closeSync, mkdirSync, openSync, readFileSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { attach, type AttachOptions, type WarningCode } from '../../lib/index.ts'
import type { Tool } from '../../scripts/tools.js'
import { env } from '../needs.ts'

const MiB = 1 << 20

export interface Image {
  name: string
  programs: Tool[]
  /** Makes it at the path; the folder is for what else it needs. */
  make: (path: string, folder: string) => void | Promise<void>
  options?: AttachOptions
  /** Partitions as `number start+size`, in sectors of 512 bytes: what a kernel with parsers shows. */
  kernel: string[] | ((path: string) => string[])
  /** What BLKPG takes; absent where it is the same. */
  user?: string[]
  /** What readPartitionTable() gives; absent where it is what the kernel shows. */
  table?: string[]
  warnings: [WarningCode, RegExp][]
  /** Warnings that only BLKPG leads to. */
  userWarnings?: [WarningCode, RegExp][]
  /** Why the three are not the same. */
  reason?: string
}

function run(program: string, ...words: string[]): void {
  execFileSync(program, words, { env, stdio: ['ignore', 'ignore', 'pipe'] })
}

function blank(path: string, bytes: number): void {
  closeSync(openSync(path, 'w'))
  truncateSync(path, bytes)
}

function sfdisk(path: string, script: string, bytes = 64 * MiB): void {
  blank(path, bytes)
  execFileSync('sfdisk', ['--quiet', '--no-reread', '--no-tell-kernel', path], { env, input: script, stdio: 'pipe' })
}

function zero(path: string, position: number, bytes: number): void {
  const fd = openSync(path, 'r+')
  writeSync(fd, Buffer.alloc(bytes), 0, bytes, position)
  closeSync(fd)
}

/** sfdisk 2.38 makes a table for the blocks of the device only: the image is attached with such. */
async function sfdiskAt(blockSize: number, path: string, script: string): Promise<void> {
  blank(path, 64 * MiB)
  await using device = await attach(path, { blockSize })
  execFileSync('sfdisk', ['--quiet', '--no-reread', '--no-tell-kernel', device.path], {
    env,
    input: script,
    stdio: 'pipe',
  })
  await device.detach()
}

/** fdisk takes a block size that no page is too small for. */
function fdiskAt(blockSize: number, path: string): void {
  blank(path, 64 * MiB)
  const input = 'g\nn\n\n\n+4M\nn\n\n\n+8M\nw\n'
  execFileSync('fdisk', ['--sector-size', `${blockSize}`, path], { env, input, stdio: 'pipe' })
}

const GPT = 'label: gpt\nstart=2048, size=8192, name=boot\nstart=10240, size=16384, name=root\n'
const GPT_SHOWN = ['1 2048+8192', '2 10240+16384']

export const IMAGES: Image[] = [
  {
    name: 'sfdisk: a GPT',
    programs: ['sfdisk'],
    make: (path) => sfdisk(path, GPT),
    kernel: GPT_SHOWN,
    warnings: [],
  },
  {
    name: 'xorriso: an isohybrid image for BIOS and EFI, as installation media are',
    programs: ['xorriso', 'mkfs.vfat'],
    make: (path, folder) => {
      const tree = join(folder, 'tree')
      mkdirSync(join(tree, 'boot'), { recursive: true })
      writeFileSync(join(tree, 'readme'), Buffer.alloc(MiB, 'an installation medium '))
      writeFileSync(join(tree, 'boot', 'bios.img'), Buffer.alloc(2048, 1))
      blank(join(tree, 'boot', 'efi.img'), 2 * MiB)
      run('mkfs.vfat', join(tree, 'boot', 'efi.img'))
      // What isolinux has as isohdpfx.bin: the first 432 bytes are code, and these words say what it is.
      const template = Buffer.alloc(432)
      template.write('\x33\xed\xfa\x8e\xd5\xbc', 'latin1')
      writeFileSync(join(folder, 'mbr.bin'), template)
      const boot = ['-b', 'boot/bios.img', '-no-emul-boot', '-boot-load-size', '4', '-eltorito-alt-boot']
      const efi = [
        '-e',
        'boot/efi.img',
        '-no-emul-boot',
        '-isohybrid-gpt-basdat',
        '-isohybrid-mbr',
        join(folder, 'mbr.bin'),
      ]
      run('xorriso', '-as', 'mkisofs', '-quiet', '-o', path, '-c', 'boot/boot.cat', ...boot, ...efi, tree)
    },
    options: { readOnly: true },
    // Where the EFI image is, is xorriso's to choose.
    kernel: (path) => ['1 0+8192', `2 ${readFileSync(path).readUInt32LE(446 + 16 + 8)}+4096`],
    user: ['1 0+8192'],
    warnings: [],
    userWarnings: [['partition-left-out', /^partition 2 overlaps with partition 1 by 2 MiB, .*; it is left out$/]],
    reason: 'BLKPG takes no partition that overlaps with another one; partx shows the first of them too',
  },
  {
    name: 'sgdisk: a GPT with a hybrid MBR',
    programs: ['sgdisk'],
    make: (path) => {
      blank(path, 64 * MiB)
      run('sgdisk', '-n1:2048:+4M', '-n2:0:+8M', '-n3:0:+2M', '-t1:ef00', '-h1:2', path)
    },
    kernel: ['1 2048+8192', '2 10240+16384', '3 26624+4096'],
    warnings: [],
  },
  {
    name: 'parted: an MBR with logical partitions',
    programs: ['parted'],
    make: (path) => {
      blank(path, 64 * MiB)
      const parts = ['primary 1MiB 5MiB', 'extended 8MiB 60MiB', 'logical 10MiB 20MiB', 'logical 22MiB 30MiB']
      run('parted', '--script', path, 'mklabel msdos', ...parts.map((part) => `mkpart ${part}`))
    },
    kernel: ['1 2048+8192', '2 16384+2', '5 20480+20480', '6 45056+16384'],
    warnings: [],
  },
  {
    name: 'sfdisk: an MBR with logical partitions, one of them deleted',
    programs: ['sfdisk'],
    make: (path) => {
      sfdisk(path, 'label: dos\n1: size=4M\n2: size=40M, type=5\n5: size=4M\n6: size=4M\n7: size=4M\n')
      run('sfdisk', '--quiet', '--no-reread', '--no-tell-kernel', '--delete', path, '6')
    },
    kernel: ['1 2048+8192', '2 10240+2', '5 12288+8192', '6 32768+8192'],
    warnings: [],
  },
  {
    name: 'mksquashfs -nopad: a filesystem that ends within a sector',
    programs: ['mksquashfs'],
    make: (path, folder) => {
      const tree = join(folder, 'tree')
      mkdirSync(tree)
      writeFileSync(join(tree, 'file'), randomBytes(1001))
      run('mksquashfs', tree, path, '-nopad', '-noappend', '-quiet', '-no-progress', '-all-time', '0')
    },
    options: { readOnly: true },
    kernel: [],
    warnings: [['tail-cut', /^the last \d+ bytes of the file are cut off/]],
  },
  {
    name: 'a card image, MBR, that was cut off',
    programs: ['sfdisk'],
    make: (path) => {
      sfdisk(path, 'label: dos\nstart=2048, size=8192, type=c\nstart=10240, size=100000\nstart=112640, size=1024\n')
      truncateSync(path, 16 * MiB)
    },
    kernel: ['1 2048+8192', '2 10240+22528'],
    warnings: [
      ['partition-cut', /^partition 2 ends 38736 KiB beyond the image; it is cut to 11 MiB$/],
      ['partition-left-out', /^partition 3 begins 39 MiB beyond the end of the image; it is left out$/],
    ],
  },
  {
    name: 'a card image, GPT, that was cut off',
    programs: ['sfdisk'],
    make: (path) => {
      sfdisk(path, 'label: gpt\nstart=2048, size=8192\nstart=10240, size=100000\n')
      truncateSync(path, 16 * MiB)
    },
    kernel: [],
    user: ['1 2048+8192'],
    table: ['1 2048+8192'],
    warnings: [
      ['gpt-backup', /^the backup GPT should be in block 131071, but the last block is 32767$/],
      ['partition-left-out', /^partition 2 ends 38736 KiB beyond the image; it is left out$/],
    ],
    reason:
      'the kernel takes no GPT whose usable blocks end beyond the disk; the partitions that are whole can be used',
  },
  {
    name: 'a GPT whose image has grown: the backup is not at the end',
    programs: ['sfdisk'],
    make: (path) => {
      sfdisk(path, GPT)
      truncateSync(path, 80 * MiB)
    },
    kernel: GPT_SHOWN,
    warnings: [['gpt-backup', /^the backup GPT is in block 131071, not in the last, 163839$/]],
  },
  {
    name: 'a GPT whose backup is damaged',
    programs: ['sfdisk'],
    make: (path) => {
      sfdisk(path, GPT)
      zero(path, 64 * MiB - 512, 512)
    },
    kernel: GPT_SHOWN,
    warnings: [['gpt-backup', /^the backup GPT in block 131071 is damaged/]],
  },
  {
    name: 'a GPT whose beginning was overwritten',
    programs: ['sfdisk'],
    make: (path) => {
      sfdisk(path, GPT)
      zero(path, 512, 4096)
    },
    kernel: [],
    user: GPT_SHOWN,
    table: GPT_SHOWN,
    warnings: [['gpt-backup', /^the primary GPT is damaged .*: the backup in block 131071 is used$/]],
    reason: 'the kernel reads the backup only with the parameter gpt; sfdisk and partx read it always',
  },
  ...[2048, 4096].map((blockSize): Image => ({
    name: `fdisk: a GPT for blocks of ${blockSize} bytes, attached with such`,
    programs: ['fdisk'],
    make: (path) => fdiskAt(blockSize, path),
    options: { blockSize: 'auto' },
    kernel: GPT_SHOWN,
    warnings: [],
  })),
  {
    name: 'sfdisk: a GPT for blocks of 4096 bytes, attached with 512',
    programs: ['sfdisk'],
    make: (path) => sfdiskAt(4096, path, 'label: gpt\nstart=256, size=1024\nstart=1280, size=2048\n'),
    options: { blockSize: 512 },
    kernel: [],
    user: GPT_SHOWN,
    table: GPT_SHOWN,
    warnings: [],
    userWarnings: [['table-block-size', /^the GPT was made for blocks of 4096 bytes, the device has blocks of 512$/]],
    reason: 'the kernel looks for a GPT in blocks of the device; where each partition is, is clear all the same',
  },
  {
    name: 'sfdisk: 300 partitions',
    programs: ['sfdisk'],
    make: (path) => {
      const parts = Array.from({ length: 300 }, (_, index) => `start=${2048 + index * 8}, size=8\n`)
      sfdisk(path, `label: gpt\ntable-length: 300\n${parts.join('')}`)
    },
    kernel: Array.from({ length: 255 }, (_, index) => `${index + 1} ${2048 + index * 8}+8`),
    table: Array.from({ length: 300 }, (_, index) => `${index + 1} ${2048 + index * 8}+8`),
    warnings: [],
    userWarnings: [['partition-left-out', /^45 partitions from number 256 on are left out/]],
    reason: 'the kernel has no numbers beyond 255; with the option partition each of them can be attached',
  },
]
