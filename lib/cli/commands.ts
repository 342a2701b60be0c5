/** The command's words. What each of them does is loaded when it is asked for: {@link later}. */

import { Argument, Command, Option } from 'commander'
import { ROOT } from '../kernel/binding.ts'
import { readFileSync } from '../kernel/files.ts'
import { SHELLS } from './completion-words.ts'
import { addHelp, addNotes } from './help.ts'
import { listAction } from './listing.ts'
import {
  BYTES,
  DEVICE,
  FILE,
  MOUNT_OPTIONS,
  blockSizeOption,
  overlapOption,
  withAttachOptions,
  withChangeOptions,
  withTimeout,
} from './options.ts'
import {
  parseDevice,
  parseDeviceOrFile,
  parseDevices,
  parseMount,
  parsePartition,
  parseSize,
  parseSwitch,
} from './parse.ts'
import { print, printHelp } from './terminal.ts'

// For the manual page
export { ENVIRONMENT, EXAMPLES, EXIT_STATUS, FILES, HELP, NOTES } from './help.ts'

const { version } = JSON.parse(String(readFileSync(`${ROOT}/package.json`))) as { version: string }

/** With all commands, or only that which the first word names. */
export function makeProgram(first?: string): Command {
  const program = addNotes(new Command('loopctl'))
    .description('attach files to Linux loop devices, and detach them')
    .version(version, '-V, --version', 'print the version')
    // Of 80 columns enough are left for what they do.
    .configureHelp({
      subcommandTerm: (one) => `${one.name()} ${argumentsOf(one)}`.trimEnd(),
      // They name the choices and the default themselves.
      optionDescription: ({ description }) => description,
      argumentDescription: ({ description }) => description,
    })
    .helpOption('-h, --help', 'print this help')
    .helpCommand('help [command]', 'print this help, or the help of one command')
    // Errors are thrown, and said in terminal.ts as all others are.
    .exitOverride()
    .configureOutput({ writeOut: printHelp, outputError: () => {} })

  // Where one is named, the others need not be defined, which takes a millisecond or two.
  const named = first !== undefined && isCommand(first) ? COMMANDS[first] : undefined
  for (const define of named ? [named] : Object.values(COMMANDS)) define(program)
  return program
}

export function isCommand(word: string): boolean {
  return Object.hasOwn(COMMANDS, word)
}

/** `<device> [size]`. */
function argumentsOf(one: Command): string {
  return one.usage().replace(/\[options\] ?/, '')
}

/** The commands, in the order of the help. */
const COMMANDS: Record<string, (program: Command) => Command> = {
  attach: (program) =>
    withTimeout(
      withAttachOptions(
        command(program, 'attach', 'attach a file, leave it attached, and print the path of the device'),
      ),
    )
      .argument('<file>', FILE)
      .action(later((actions) => actions.attachAction)),
  run: (program) =>
    withTimeout(
      withAttachOptions(command(program, 'run', 'attach a file while a command runs'))
        .addOption(
          new Option(
            '--mount [=dir]',
            'also mount the file: only the command sees the mount, or, with =dir, on that folder (default: off)',
          ).argParser(parseMount),
        )
        .option(
          '--lock',
          'lock the device, so that udev does not open it; a command that takes this lock itself waits for ever',
        )
        .option('--options <list>', MOUNT_OPTIONS),
    )
      .usage('[options] <file> -- <command...>')
      .argument('<file>', FILE)
      .argument('<command...>', 'the command to run; LOOP_DEVICE in its environment is the path of the device')
      .action(later((actions) => actions.runAction)),
  detach: (program) =>
    withTimeout(command(program, 'detach', 'detach devices, and print whether they are detached'), '4000')
      .argument('[devices...]', DEVICE, parseDevices)
      .option('--lazy', 'if the device is in use, let the kernel detach it when its last user closes it')
      .option('--file <file>', 'detach all devices that are attached to this file')
      .option('--unmount', 'first unmount everything that is mounted from the device')
      .action(later((actions) => actions.detachAction)),
  mount: (program) =>
    withTimeout(command(program, 'mount', 'attach an image and mount it; unmounting also detaches it'), '10000')
      .argument('<image>', FILE)
      .argument('<dir>', 'the folder to mount it on')
      .option('-r, --read-only', 'attach and mount the image read-only')
      .option('-o, --options <list>', MOUNT_OPTIONS)
      .option('-t, --type <name>', 'the type of the filesystem (default: found by the superblock)')
      .option(
        '--partition <number|label>',
        'mount this partition; also LABEL=..., UUID=... and TYPE=... (default: the only one with a filesystem)',
        parsePartition,
      )
      .option('--offset <bytes>', 'the byte of the image at which the filesystem begins (default: 0)', parseSize)
      .option('--size-limit <bytes>', 'how many bytes of the image to use at most (default: 0, all)', parseSize)
      .addOption(blockSizeOption())
      .addOption(overlapOption())
      .option('--make-dir', 'make the folder if it does not exist')
      .action(later((actions) => actions.mountAction)),
  umount: (program) =>
    withTimeout(command(program, 'umount', 'unmount filesystems of loop devices'), '10000')
      .argument('<dirs...>', 'the folders on which they are mounted')
      .option('--lazy', 'if files are open, let the kernel unmount the filesystem when they are closed')
      .action(later((actions) => actions.umountAction)),
  create: (program) =>
    withTimeout(command(program, 'create', 'make a new image, filled with zeros'), '10000')
      .argument('<file>', 'the path of the image')
      .argument('<size>', 'the size in bytes, or with a unit', parseSize)
      .option('--allocate', 'reserve the blocks of the image now (default: make a sparse file)')
      .option('--overwrite', 'replace an existing file')
      .action(later((actions) => actions.createAction)),
  list: (program) =>
    withTimeout(command(program, 'list', 'list the attached devices'), '5000')
      .argument('[file]', 'list only the devices that are attached to this file')
      .option('--all', 'also list free devices')
      .option(
        '-o, --output <columns>',
        'print these columns, separated by commas; +COL adds a column to the default ones (default: NAME,SIZE,OFFSET,SIZELIMIT,LOG-SEC,FLAGS,BACK-FILE)',
      )
      .option('--noheadings', 'do not print the headings')
      .option('--bytes', BYTES)
      .option('--tree', 'also print partitions, and print devices on top of other devices below these')
      .action(listAction),
  status: (program) =>
    withTimeout(command(program, 'status', 'show everything about one attached device'), '5000')
      .argument('<device>', DEVICE, parseDevice)
      .action(later((actions) => actions.statusAction)),
  change: (program) =>
    withChangeOptions(command(program, 'change', 'switch a read-only device to another file with the same content'))
      .argument('<device>', DEVICE, parseDevice)
      .argument('<file>', FILE)
      .option('--verify', 'compare the contents of both files first')
      .action(later((actions) => actions.changeAction)),
  migrate: (program) =>
    withChangeOptions(
      command(program, 'migrate', 'move the file of a device to another place, while the device is in use'),
    )
      .argument('<device>', DEVICE, parseDevice)
      .argument('<destination>', 'the path of the copy')
      .option('--no-verify', 'do not read the copy back and compare it (default: compare it)')
      .option('--no-sparse', 'write zeros where the file has holes (default: keep the holes)')
      .option('--overwrite', 'replace an existing file')
      .action(later((actions) => actions.migrateAction)),
  resize: (program) =>
    withTimeout(command(program, 'resize', 'give a device the new size of its file, or make both larger'))
      .argument('<device>', DEVICE, parseDevice)
      .argument('[size]', 'the new size, which must not be smaller (default: the size of the file)', parseSize)
      .addOption(
        new Option('--partition <last>', 'with a size: also make the last partition larger (default: none)').choices([
          'last',
        ]),
      )
      .action(later((actions) => actions.resizeAction)),
  set: (program) =>
    withTimeout(command(program, 'set', 'change settings of an attached device; the others stay as they are'))
      .argument('<device>', DEVICE, parseDevice)
      .option('--direct-io <on|off>', `bypass the page cache of the file ${UNCHANGED}`, parseSwitch)
      .option('--block-size <bytes>', `logical block size ${UNCHANGED}`, parseSize)
      .option('--offset <bytes>', `the byte of the file at which the device begins ${UNCHANGED}`, parseSize)
      .option(
        '--size-limit <bytes>',
        `how many bytes of the file the device shows at most; 0: all ${UNCHANGED}`,
        parseSize,
      )
      .option(
        '--autoclear <on|off>',
        `let the kernel detach the device when its last user closes it ${UNCHANGED}`,
        parseSwitch,
      )
      .option('--partscan', 'let the kernel look for partitions; this cannot be turned off again')
      .option('--reference <tag>', `a tag of at most 63 bytes ${UNCHANGED}`)
      .addOption(
        new Option(
          '--overlap <mode>',
          'if another device shows the same bytes, and one of the two can write: refuse, or allow it (default: refuse)',
        ).choices(['refuse', 'allow']),
      )
      .action(later((actions) => actions.setAction)),
  partitions: (program) =>
    withTimeout(command(program, 'partitions', 'list the partitions of an attached device, or of a file'))
      .argument('<device|file>', `${DEVICE}; or an image, which is not attached`, parseDeviceOrFile)
      .option('--rescan', 'first look for partitions again')
      .option('--bytes', BYTES)
      .action(later((actions) => actions.partitionsAction)),
  add: (program) =>
    withTimeout(command(program, 'add', 'make a device, and print its path'))
      .argument('[device]', `${DEVICE} (default: the next unused one)`, parseDevice)
      .action(later((actions) => actions.addAction)),
  remove: (program) =>
    withTimeout(command(program, 'remove', 'remove devices that are not attached'))
      .argument('<devices...>', DEVICE, parseDevices)
      .action(later((actions) => actions.removeAction)),
  free: (program) =>
    withTimeout(command(program, 'free', 'print the path of a free device, without reserving it')).action(
      later((actions) => actions.freeAction),
    ),
  watch: (program) =>
    command(program, 'watch', 'print what happens to the loop devices, until Ctrl-C').action(
      later((actions) => actions.watchAction),
    ),
  doctor: (program) =>
    command(program, 'doctor', 'check whether attaching works on this machine').action(
      later((actions) => actions.doctorAction),
    ),
  completion: (program) =>
    addHelp(program.command('completion'))
      .description('print the completion script for a shell')
      .addArgument(new Argument('[shell]', 'bash, zsh or fish (default: bash)').choices(SHELLS))
      .action(async (shell: string = 'bash') => {
        const { completionScript } = await import('./completion.ts')
        await print(completionScript(shell, makeProgram()))
      }),
}

/** An action that is loaded when it is run: with it comes the whole library, which the help and list do without. */
function later<Values extends unknown[]>(
  pick: (actions: typeof import('./actions.ts')) => (...values: Values) => Promise<void>,
): (...values: Values) => Promise<void> {
  return async (...values) => pick(await import('./actions.ts'))(...values)
}

const UNCHANGED = '(default: unchanged)'

function command(program: Command, name: string, description: string): Command {
  return addHelp(program.command(name))
    .description(description)
    .helpOption('-h, --help', 'print this help')
    .option('--json', 'print results and messages as JSON')
}
