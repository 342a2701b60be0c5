/** What the help and the manual page say beside the options: what a command prints, and examples of it. */

import type { Command } from 'commander'
import { COLUMNS_HELP } from './columns.ts'

interface Help {
  prints: string
  /** What the example does, and its words as for a shell. */
  examples: readonly (readonly [does: string, line: string])[]
  more?: readonly (readonly [title: string, lines: readonly (readonly [string, string])[]])[]
}

export const HELP: Record<string, Help> = {
  attach: {
    prints: 'The path of the device. With --json: the same object as `loopctl status --json`.',
    examples: [
      ['Attach an image', 'device=$(loopctl attach disk.img)'],
      [
        'Attach an image read-only, and show its partitions as /dev/loopNpM',
        'loopctl attach --read-only --partscan disk.img',
      ],
      ['Attach one partition, by its label', 'loopctl attach --partition root disk.img'],
      ['Use the device that already has the file', 'loopctl attach --overlap reuse disk.img'],
    ],
  },
  run: {
    prints: 'What the command prints, and nothing else.',
    examples: [
      ['Make a filesystem on an image', `loopctl run disk.img -- sh -c 'mkfs.ext4 "$LOOP_DEVICE"'`],
      ['List the files of an image', `loopctl run --mount -r disk.img -- sh -c 'ls "$LOOP_MOUNT"'`],
    ],
  },
  detach: {
    prints:
      '`detached`, or, with --lazy, `deferred` if the kernel will detach the device later. For several devices, a line for each: `/dev/loop7: detached`. With --json: an array of objects with number, path and result.',
    examples: [
      ['Detach one device', 'loopctl detach /dev/loop7'],
      ['Detach all devices of a file', 'loopctl detach --file disk.img'],
      ['Unmount everything that is mounted from the device, and detach it', 'loopctl detach --unmount /dev/loop7'],
    ],
  },
  mount: {
    prints: 'Nothing. With --json: an object with path, source and fsType.',
    examples: [
      ['Mount an image', 'loopctl mount disk.img /mnt'],
      ['Mount the second partition of an image read-only', 'loopctl mount -r --partition 2 disk.img /mnt'],
    ],
  },
  umount: {
    prints:
      '`unmounted`, or, with --lazy, `deferred` if files are still open. For several folders, a line for each: `/mnt: unmounted`. With --json: an array of objects with path and result.',
    examples: [['Unmount an image that `loopctl mount` mounted, and detach it', 'loopctl umount /mnt']],
  },
  create: {
    prints: 'Nothing. With --json: an object with path and size.',
    examples: [
      ['Make a sparse image, which takes disk space only for written blocks', 'loopctl create disk.img 2G'],
      ['Make an image, and reserve its disk space', 'loopctl create --allocate disk.img 512M'],
    ],
  },
  list: {
    prints:
      'A table, or nothing if no device is attached. Sizes have a unit on a terminal, and are in bytes elsewhere. With --json: an array of objects.',
    examples: [
      ['List the attached devices', 'loopctl list'],
      ['List the devices of one file', 'loopctl list disk.img'],
      ['Print only the paths and references', 'loopctl list --noheadings --output NAME,REF'],
      ['Show partitions and devices on top of devices', 'loopctl list --tree'],
    ],
    more: [['Columns', COLUMNS_HELP]],
  },
  status: {
    prints: 'A line for each property. With --json: an object.',
    examples: [
      ['Show one device', 'loopctl status /dev/loop7'],
      ['Print JSON for a program', 'loopctl status --json loop7'],
    ],
  },
  change: {
    prints: 'Nothing. With --json: the status of the device.',
    examples: [['Compare a copy with the file, and switch to it', 'loopctl change --verify /dev/loop7 /new/disk.img']],
  },
  migrate: {
    prints:
      'Nothing. If stderr is a terminal, it shows a progress bar. With --json: an object with destination, bytesCopied, bytesSparse, seconds, method and verified.',
    examples: [
      ['Move the file of a running system to the hard disk', 'loopctl migrate /dev/loop7 /disk/root.squashfs'],
    ],
  },
  resize: {
    prints: 'The new size in bytes. With --json: an object with number, path and size.',
    examples: [
      ['Give the device the size of its file, which grew', 'loopctl resize /dev/loop7'],
      ['Make file, device and last partition larger', 'loopctl resize --partition last /dev/loop7 4G'],
    ],
  },
  set: {
    prints: 'Nothing. With --json: the status of the device.',
    examples: [
      ['Let the kernel detach the device when its last user closes it', 'loopctl set --autoclear on /dev/loop7'],
      ['Show another part of the file', 'loopctl set --offset 1M --size-limit 64M /dev/loop7'],
    ],
  },
  partitions: {
    prints:
      'A table, or nothing if there are no partitions. Sizes have a unit on a terminal, and are in bytes elsewhere. With --json: an array of objects, or, for a file, an object with the table and its partitions.',
    examples: [
      ['List the partitions of a device', 'loopctl partitions /dev/loop7'],
      ['Read the partition table of an image', 'loopctl partitions disk.img'],
    ],
  },
  add: {
    prints: 'The path of the new device. With --json: an object with number and path.',
    examples: [
      ['Make the next unused device', 'loopctl add'],
      ['Make /dev/loop100', 'loopctl add 100'],
    ],
  },
  remove: {
    prints: 'Nothing. With --json: an array of objects with number and path.',
    examples: [['Remove a device that is not attached', 'loopctl remove /dev/loop100']],
  },
  free: {
    prints: 'The path of the device. With --json: an object with number and path.',
    examples: [['Find a free device', 'loopctl free']],
  },
  watch: {
    prints:
      'A line for each event: attach, detach, change, resize, add, remove, with the size and the file of the device; resync, if events were lost or cannot be received. Sizes have a unit on a terminal, and are in bytes elsewhere. With --json: an object on each line.',
    examples: [
      ['Print events until Ctrl-C', 'loopctl watch'],
      ['Print events as JSON for a program', 'loopctl watch --json'],
    ],
  },
  doctor: {
    prints:
      'A line for each check, and below it what to do about a problem. The exit status is 1 if attaching does not work. With --json: an object.',
    examples: [['Check this machine', 'loopctl doctor']],
  },
  completion: {
    prints: 'The script.',
    examples: [
      ['bash, in ~/.bashrc', 'eval "$(loopctl completion bash)"'],
      ['zsh, in ~/.zshrc after compinit', 'eval "$(loopctl completion zsh)"'],
      ['fish', 'loopctl completion fish > ~/.config/fish/completions/loopctl.fish'],
    ],
  },
}

/** Of the command as a whole. */
export const EXAMPLES: Help['examples'] = [
  ['Attach an image, show the device, detach it', 'device=$(loopctl attach disk.img)'],
  ['', 'loopctl status "$device"'],
  ['', 'loopctl detach "$device"'],
  ['Mount an image; unmounting also detaches it', 'loopctl mount disk.img /mnt'],
  ['', 'loopctl umount /mnt'],
  ['Attach an image while a command runs', `loopctl run disk.img -- sh -c 'fsck -n "$LOOP_DEVICE"'`],
]

/** What holds for every command: below the help, and in the manual page. */
export const NOTES: Record<'Description' | 'Devices' | 'Sizes' | 'Switches and values' | 'Messages', string> = {
  'Description':
    'A loop device turns a file into a block device: /dev/loop7 has the bytes of disk.img, and can be mounted, partitioned or checked like a disk.',
  'Devices': 'Write a device as 7, loop7, /dev/loop7 or the path of a link to it.',
  'Sizes': 'Write a size as a number of bytes, or with a unit: 1M and 1MiB are 1024 * 1024 bytes, 1MB is 1000 * 1000.',
  'Switches and values':
    'Options without a value are off by default. Write an optional value after =, as in --partscan=user.',
  'Messages':
    'Errors, warnings and notes go to stderr: a line that begins with `loopctl:`, and often one that begins with `hint:`. With --json, each message is an object on one line, with a member error, warning or note.',
}

export const EXIT_STATUS: readonly (readonly [status: string, meaning: string])[] = [
  ['0', 'Success.'],
  ['1', 'Failure.'],
  ['2', 'Wrong usage.'],
  ['130', 'Interrupted. loopctl has undone what it had begun.'],
  [
    'run',
    '`loopctl run` exits with the status of its command, or ends by the signal that ended the command. 127: the command was not found. 126: it could not be started.',
  ],
]

export const ENVIRONMENT: readonly (readonly [name: string, meaning: string])[] = [
  ['LOOP_DEVICE', 'The path of the device. `loopctl run` sets it for its command.'],
  ['LOOP_MOUNT', 'The folder with the files. `loopctl run --mount` sets it for its command.'],
  ['NO_COLOR', 'Any value turns colours off.'],
  ['FORCE_COLOR', '1 turns colours on, even if stdout is not a terminal.'],
  ['TERM', 'dumb turns the progress bar off.'],
  ['NODE_DEBUG', 'loopctl prints each system call on stderr, with its result and how long it took.'],
  [
    'LC_ALL, LC_CTYPE, LANG',
    '`loopctl list --tree` draws lines if the first of these that is set names UTF-8, and uses ASCII otherwise.',
  ],
]

export const FILES: readonly (readonly [path: string, meaning: string])[] = [
  ['/dev/loopN', 'The devices. /dev/loopNpM is partition M of /dev/loopN.'],
  ['/dev/loop-control', 'Makes and removes devices.'],
  [
    '/sys/block/loopN',
    'The state of a device. `loopctl list` reads it, and opens devices only to find those of a file and for the columns REF, BACK-MAJ:MIN and BACK-INO.',
  ],
]

/** Adds what the command prints, and its examples. */
export function addHelp(command: Command): Command {
  const help = HELP[command.name()]
  return help === undefined ? command : command.addHelpText('after', () => textOf(command, help))
}

/** Adds what holds for every command. */
export function addNotes(program: Command): Command {
  const titled = Object.entries(NOTES).map(([title, text]) => [title, [['', text]]] as const)
  return program.addHelpText('after', () =>
    [
      ...titled.map(([title, items]) => section(program, title, items)),
      section(program, 'Exit status', EXIT_STATUS),
      section(program, 'Environment', ENVIRONMENT),
      examplesOf(EXAMPLES),
    ].join('\n'),
  )
}

function textOf(command: Command, { prints, examples, more = [] }: Help): string {
  const sections = [['Prints', [['', prints]]] as const, ...more]
  return [...sections.map(([title, items]) => section(command, title, items)), examplesOf(examples)].join('\n')
}

/** A title, and under it terms with what is said of them. */
function section(command: Command, title: string, items: readonly (readonly [term: string, text: string])[]): string {
  const help = command.createHelp()
  const columns = process.stdout.isTTY ? process.stdout.columns : 80
  help.helpWidth = columns
  const width = Math.max(...items.map(([term]) => term.length))
  const lines = items.map(([term, text]) =>
    term === '' ? indent(help.boxWrap(text, columns - 2)) : help.formatItem(term, width, text, help),
  )
  return `\n${title}:\n${lines.join('\n')}`
}

function examplesOf(examples: Help['examples']): string {
  const lines = examples.map(([does, line]) => (does === '' ? `  ${line}` : `  # ${does}\n  ${line}`))
  return `\nExamples:\n${lines.join('\n')}`
}

function indent(text: string): string {
  return text.replaceAll(/^/gm, '  ')
}
