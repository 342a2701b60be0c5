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
export const MOUNT_OPTIONS = 'mount options, separated by commas (default: nosuid,nodev; suid,dev turns them off)'
export const BYTES = 'print sizes in bytes (default: with a unit on a terminal, in bytes elsewhere)'

/** `--timeout`. */
export function withTimeout(target: Command, text = 'each step has its own limit'): Command {
  return target.option('--timeout <ms>', `give up after this many milliseconds (default: ${text})`, parseWholeNumber)
}

export function withChangeOptions(target: Command): Command {
  const changing = target
    .option('--force', 'change the file even if the kernel may then shut down a mounted filesystem')
    .addOption(
      new Option(
        '--overlap <mode>',
        'if a device that can write has the new file: refuse, or allow it (default: refuse)',
      ).choices(['refuse', 'allow']),
    )
  return withTimeout(changing, 'never')
}

/** `--overlap` of what attaches. */
export function overlapOption(): Option {
  return new Option(
    '--overlap <mode>',
    'if another device shows the same bytes, and one of the two can write: refuse, allow it, or reuse a device with the same settings (default: refuse)',
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
    .option('-o, --offset <bytes>', 'the byte of the file at which the device begins (default: 0)', parseSize)
    .option(
      '-s, --size-limit <bytes>',
      'how many bytes of the file the device shows at most (default: 0, all)',
      parseSize,
    )
    .addOption(blockSizeOption())
    .addOption(
      new Option(
        '--direct-io [=prefer]',
        'bypass the page cache of the file, or fail; =prefer: use the page cache rather than fail (default: off)',
      ).argParser(parseDirectIO),
    )
    .addOption(
      new Option(
        '-P, --partscan [=kernel|user]',
        'show partitions as /dev/loopNpM; =kernel: only the kernel reads the table; =user: only loopctl (default: off)',
      ).argParser(parsePartscan),
    )
    .option(
      '--partition <number|label>',
      'attach only this partition; also LABEL=..., UUID=... and TYPE=... (default: the whole image)',
      parsePartition,
    )
    .option('--no-create-node', 'do not make a node that /dev lacks (default: make it)')
    .option(
      '-n, --number <n>',
      'use this device, and make it if it does not exist (default: any free one)',
      parseDevice,
    )
    .addOption(overlapOption())
    .option('--reference <tag>', 'a tag that the kernel keeps with the device, at most 63 bytes (default: none)')
    .option(
      '--swappable',
      'attach two devices, one on top of the other, so that change and migrate work under a mounted ext4 or xfs; needs --read-only',
    )
}
