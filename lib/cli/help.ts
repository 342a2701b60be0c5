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
    prints: 'The path of the device. With --json: its status, as `loopctl status --json` has it.',
    examples: [
      ['Attach an image, and use the device', 'device=$(loopctl attach disk.img)'],
      [
        'Attach it read-only, and show its partitions as /dev/loopNpM',
        'loopctl attach --read-only --partscan disk.img',
      ],
      ['Attach one partition of it', 'loopctl attach --partition root disk.img'],
      ['Use a device that has the file already', 'loopctl attach --overlap reuse disk.img'],
    ],
  },
  run: {
    prints: 'What its command prints, and nothing else.',
    examples: [
      ['Make a filesystem on an image', `loopctl run disk.img -- sh -c 'mkfs.ext4 "$LOOP_DEVICE"'`],
      ['List the files of an image', `loopctl run --mount -r disk.img -- sh -c 'ls "$LOOP_MOUNT"'`],
    ],
  },
  detach: {
    prints:
      '`detached`, or with --lazy `deferred` where the kernel is going to detach it later. Of several devices, a line for each: `/dev/loop7: detached`. With --json: an array of objects with number, path and result.',
    examples: [
      ['Detach one device', 'loopctl detach /dev/loop7'],
      ['Detach every device of a file', 'loopctl detach --file disk.img'],
      ['Unmount what is mounted from it, and detach it', 'loopctl detach --unmount /dev/loop7'],
    ],
  },
  mount: {
    prints: 'Nothing. With --json: an object with path, source and fsType.',
    examples: [
      ['Mount an image', 'loopctl mount disk.img /mnt'],
      ['Mount its second partition read-only', 'loopctl mount -r --partition 2 disk.img /mnt'],
    ],
  },
  umount: {
    prints:
      '`unmounted`, or with --lazy `deferred` where files of it are open. Of several folders, a line for each: `/mnt: unmounted`. With --json: an array of objects with path and result.',
    examples: [['Unmount it, and detach its device', 'loopctl umount /mnt']],
  },
  create: {
    prints: 'Nothing. With --json: an object with path and size.',
    examples: [
      ['Make an image that takes space only where it is written', 'loopctl create disk.img 2G'],
      ['Make one whose space is reserved', 'loopctl create --allocate disk.img 512M'],
    ],
  },
  list: {
    prints:
      'A table, or nothing where no device is attached. Sizes are for people on a terminal, and in bytes elsewhere. With --json: an array of objects.',
    examples: [
      ['List the attached devices', 'loopctl list'],
      ['List those of one file', 'loopctl list disk.img'],
      ['Print the paths and references alone', 'loopctl list --noheadings --output NAME,REF'],
      ['Show partitions and devices on top of devices', 'loopctl list --tree'],
    ],
    more: [['Columns', COLUMNS_HELP]],
  },
  status: {
    prints: 'A line for each property. With --json: an object.',
    examples: [
      ['Show one device', 'loopctl status /dev/loop7'],
      ['Print it for a program', 'loopctl status --json loop7'],
    ],
  },
  change: {
    prints: 'Nothing. With --json: the status of the device.',
    examples: [['Use a copy of the file from now on', 'loopctl change --verify /dev/loop7 /new/disk.img']],
  },
  migrate: {
    prints:
      'Nothing; a bar on stderr, where that is a terminal. With --json: an object with destination, bytesCopied, bytesSparse, seconds, method and verified.',
    examples: [
      ['Move the file of a running system to the hard disk', 'loopctl migrate /dev/loop7 /disk/root.squashfs'],
    ],
  },
  resize: {
    prints: 'The new size in bytes. With --json: an object with number, path and size.',
    examples: [
      ['Take over the size of a file that grew', 'loopctl resize /dev/loop7'],
      ['Make file, device and last partition larger', 'loopctl resize --partition last /dev/loop7 4G'],
    ],
  },
  set: {
    prints: 'Nothing. With --json: the status of the device.',
    examples: [
      ['Let the kernel detach it after its last user', 'loopctl set --autoclear on /dev/loop7'],
      ['Show another part of the file', 'loopctl set --offset 1M --size-limit 64M /dev/loop7'],
    ],
  },
  partitions: {
    prints:
      'A table, or nothing where there are no partitions. Sizes are for people on a terminal, and in bytes elsewhere. With --json: an array of objects; of a file, an object with the table and its partitions.',
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
    prints: 'A line for each event: attach, detach, change, resize, add, remove. With --json: an object on each line.',
    examples: [
      ['Print events until Ctrl-C', 'loopctl watch'],
      ['Print them for a program', 'loopctl watch --json'],
    ],
  },
  doctor: {
    prints:
      'A line for each check, and under it what to do. It exits with 1 where attaching does not work. With --json: an object.',
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
  ['Attach an image, look at it, detach it', 'device=$(loopctl attach disk.img)'],
  ['', 'loopctl status "$device"'],
  ['', 'loopctl detach "$device"'],
  ['Mount an image; umount detaches it too', 'loopctl mount disk.img /mnt'],
  ['', 'loopctl umount /mnt'],
  ['Have a device for as long as a command runs', `loopctl run disk.img -- sh -c 'fsck -n "$LOOP_DEVICE"'`],
]

/** What holds for every command: below the help, and in the manual page. */
export const NOTES: Record<'Description' | 'Devices' | 'Sizes' | 'Options', string> = {
  Description:
    'Loop devices make a file a block device: /dev/loop7 has the bytes of disk.img, and can be mounted, partitioned or checked as a disk can.',
  Devices: '7, loop7, /dev/loop7 or the path of a link to it.',
  Sizes: 'A number of bytes, or one with a unit: 1M and 1MiB are 1024 * 1024 bytes, 1MB is 1000 * 1000.',
  Options:
    'A switch is off unless it is given. A value that an option can do without is taken only after =, as in --partscan=user.',
}

export const EXIT_STATUS: readonly (readonly [status: string, meaning: string])[] = [
  ['0', 'It is done.'],
  ['1', 'It failed. stderr has a line that begins with `loopctl:`, and often one that begins with `hint:`.'],
  ['2', 'The command was called in a wrong way.'],
  ['130', 'It was interrupted, and what it had begun was undone.'],
  [
    'run',
    '`loopctl run` ends as its command did: with its exit status, or by the signal that ended it. 127: the command was not found. 126: it could not be started.',
  ],
]

export const ENVIRONMENT: readonly (readonly [name: string, meaning: string])[] = [
  ['LOOP_DEVICE', '`loopctl run` sets it for its command: the path of the device.'],
  ['LOOP_MOUNT', '`loopctl run --mount` sets it for its command: the folder that has the files.'],
  ['NO_COLOR', 'With any value, nothing is in colour.'],
  ['FORCE_COLOR', '1: in colour where stdout is no terminal too.'],
  ['TERM', 'dumb: no bar is drawn.'],
  [
    'LC_ALL, LC_CTYPE, LANG',
    'Where the first that is set names UTF-8, `loopctl list --tree` draws with lines, else with ASCII.',
  ],
]

export const FILES: readonly (readonly [path: string, meaning: string])[] = [
  ['/dev/loopN', 'The devices. /dev/loopNpM is partition M of one.'],
  ['/dev/loop-control', 'Makes and removes devices.'],
  ['/sys/block/loopN', 'What the kernel tells of a device; `loopctl list` reads nothing else.'],
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
