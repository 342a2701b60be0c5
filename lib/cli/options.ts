/** Options that several commands have. */

import { type Command, Option } from 'commander'
import {
  parseBlockSize,
  parseDevice,
  parseDirectIO,
  parsePartition,
  parsePartscan,
  parseSize,
  parseWholeNumber,
} from './parse.ts'

export const FILE = 'an image, or any other file or block device'
export const DEVICE = '7, loop7, /dev/loop7 or the path of a link to it'
export const MOUNT_OPTIONS = 'mount options, separated by commas (default: nosuid,nodev, which suid,dev lifts)'
export const BYTES = 'print sizes in bytes (default: on a terminal with a unit, elsewhere in bytes)'

/** `--timeout`. */
export function withTimeout(target: Command, text = 'each step has a time of its own'): Command {
  return target.option('--timeout <ms>', `give up after so many milliseconds (default: ${text})`, parseWholeNumber)
}

export function withChangeOptions(target: Command): Command {
  const changing = target
    .option('--force', 'also under a mounted filesystem that the kernel may shut down for it')
    .addOption(
      new Option(
        '--overlap <mode>',
        'where another device has the file: refuse, or allow it (default: refuse)',
      ).choices(['refuse', 'allow']),
    )
  return withTimeout(changing, 'never')
}

/** `--overlap` of what attaches. */
export function overlapOption(): Option {
  return new Option(
    '--overlap <mode>',
    'where another device has the same bytes and either can write: refuse; allow it; or reuse a device that is attached just so (default: refuse)',
  ).choices(['refuse', 'allow', 'reuse'])
}

/** `--block-size` of what attaches. */
export function blockSizeOption(): Option {
  return new Option(
    '-b, --block-size <bytes|auto>',
    'logical block size; auto: that of the image’s GPT (default: the kernel chooses)',
  ).argParser(parseBlockSize)
}

export function withAttachOptions(target: Command): Command {
  return target
    .option('-r, --read-only', 'attach read-only')
    .option('-o, --offset <bytes>', 'where in the file the device begins (default: 0)', parseSize)
    .option('-s, --size-limit <bytes>', 'how much of the file it shows at most (default: 0, all of it)', parseSize)
    .addOption(blockSizeOption())
    .addOption(
      new Option(
        '--direct-io [=prefer]',
        'bypass the page cache for the file, or fail; =prefer: where that is possible (default: off)',
      ).argParser(parseDirectIO),
    )
    .addOption(
      new Option(
        '-P, --partscan [=kernel|user]',
        'show partitions as /dev/loopNpM; =kernel: by the kernel’s parsers alone; =user: by loopctl’s alone (default: off)',
      ).argParser(parsePartscan),
    )
    .option(
      '--partition <number|label>',
      'one partition of the image; also LABEL=..., UUID=... and TYPE=... (default: the whole image)',
      parsePartition,
    )
    .option('--no-create-node', 'do not make a node that /dev lacks (default: make it)')
    .option('-n, --number <n>', 'use this device, and make it if there is none (default: any free one)', parseDevice)
    .addOption(overlapOption())
    .option('--reference <tag>', 'a tag of at most 63 bytes (default: none)')
    .option(
      '--swappable',
      'attach two devices, one on top of the other, so that change and migrate work under a mounted ext4 or xfs; needs --read-only',
    )
}
