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
import { print } from './terminal.ts'

// For the manual page
export { ENVIRONMENT, EXAMPLES, EXIT_STATUS, FILES, HELP, NOTES } from './help.ts'

const { version } = JSON.parse(String(readFileSync(`${ROOT}/package.json`))) as { version: string }

/** With all commands, or only that which the first word names. */
export function makeProgram(first?: string): Command {
  const program = addNotes(new Command('loopctl'))
    .description('Linux loop devices: a file becomes a block device')
    .version(version, '-V, --version', 'print the version')
    // Of 80 columns enough are left for what they do.
    .configureHelp({ subcommandTerm: (one) => `${one.name()} ${argumentsOf(one)}`.trimEnd() })
    .helpOption('-h, --help', 'print the help')
    .helpCommand('help [command]', 'print the help, of all or of one command')
    // Errors are thrown, and said in terminal.ts as all others are.
    .exitOverride()
    .configureOutput({ outputError: () => {} })

  // Where one is named, the others need not be defined, which takes a millisecond or two.
  const named = first !== undefined && Object.hasOwn(COMMANDS, first) ? COMMANDS[first] : undefined
  for (const define of named ? [named] : Object.values(COMMANDS)) define(program)
  return program
}

/** `<device> [size]`. */
function argumentsOf(one: Command): string {
  return one.usage().replace(/\[options\] ?/, '')
}

/** The commands, in the order of the help. */
const COMMANDS: Record<string, (program: Command) => Command> = {
  attach: (program) =>
    withTimeout(withAttachOptions(command(program, 'attach', 'attach a file, and print the path of the device')))
      .argument('<file>', FILE)
      .action(later((actions) => actions.attachAction)),
  run: (program) =>
    withTimeout(
      withAttachOptions(command(program, 'run', 'attach a file for as long as a command runs'))
        .addOption(
          new Option(
            '--mount [=dir]',
            'mount it too: where only the command sees it, or with =dir on that folder (default: off)',
          ).argParser(parseMount),
        )
        .option('--lock', 'keep udev away from the device; a command that takes that lock itself would wait for ever')
        .option('--options <list>', MOUNT_OPTIONS),
    )
      .usage('[options] <file> -- <command...>')
      .argument('<file>', FILE)
      .argument('<command...>', 'what to run: it has the path of the device in LOOP_DEVICE')
      .action(later((actions) => actions.runAction)),
  detach: (program) =>
    withTimeout(command(program, 'detach', 'detach devices, and print whether they are detached'), '4000')
      .argument('[devices...]', DEVICE, parseDevices)
      .option('--lazy', 'where the device is in use, let the kernel detach it when it is not any more')
      .option('--file <file>', 'the devices that are attached to this file')
      .option('--unmount', 'unmount first what is mounted from the device, the deepest folder first')
      .action(later((actions) => actions.detachAction)),
  mount: (program) =>
    withTimeout(command(program, 'mount', 'attach an image and mount it; unmounting detaches it'), '10000')
      .argument('<image>', FILE)
      .argument('<dir>', 'the folder to mount it on')
      .option('-r, --read-only', 'attach and mount it read-only')
      .option('-o, --options <list>', MOUNT_OPTIONS)
      .option('-t, --type <name>', 'the filesystem (default: what its superblock tells)')
      .option(
        '--partition <ref>',
        'the partition, by number or label (default: the only one with a filesystem)',
        parsePartition,
      )
      .option('--offset <bytes>', 'where in the image the filesystem begins (default: 0)', parseSize)
      .option('--size-limit <bytes>', 'how much of the image it has at most (default: 0, all of it)', parseSize)
      .addOption(blockSizeOption())
      .addOption(overlapOption())
      .option('--make-dir', 'make the folder if there is none')
      .action(later((actions) => actions.mountAction)),
  umount: (program) =>
    withTimeout(command(program, 'umount', 'unmount what is mounted from a loop device'), '10000')
      .argument('<dirs...>', 'where it is mounted')
      .option('--lazy', 'where files of it are open, let the kernel unmount it when they are closed')
      .action(later((actions) => actions.umountAction)),
  create: (program) =>
    withTimeout(command(program, 'create', 'make a new image, which has only zeros'), '10000')
      .argument('<file>', 'the image: a file that does not exist')
      .argument('<size>', 'its size in bytes, or with a unit', parseSize)
      .option('--allocate', 'reserve its blocks now (default: it is sparse)')
      .option('--overwrite', 'replace a file that exists')
      .action(later((actions) => actions.createAction)),
  list: (program) =>
    withTimeout(command(program, 'list', 'list the attached devices'), '5000')
      .argument('[file]', 'only the devices that are attached to this file')
      .option('--all', 'the free devices too')
      .option(
        '-o, --output <columns>',
        'these columns, separated by commas; +COL adds to the usual ones (default: NAME,SIZE,OFFSET,SIZELIMIT,LOG-SEC,FLAGS,BACK-FILE)',
      )
      .option('--noheadings', 'print no line of headings')
      .option('--bytes', BYTES)
      .option('--tree', 'show partitions, and devices on top of devices, below their device')
      .action(listAction),
  status: (program) =>
    withTimeout(command(program, 'status', 'show everything about one attached device'), '5000')
      .argument('<device>', DEVICE, parseDevice)
      .action(later((actions) => actions.statusAction)),
  change: (program) =>
    withChangeOptions(command(program, 'change', 'give a read-only device another file of the same content'))
      .argument('<device>', DEVICE, parseDevice)
      .argument('<file>', FILE)
      .option('--verify', 'compare the contents of both files first')
      .action(later((actions) => actions.changeAction)),
  migrate: (program) =>
    withChangeOptions(command(program, 'migrate', 'move the file of a device elsewhere, while the device is in use'))
      .argument('<device>', DEVICE, parseDevice)
      .argument('<destination>', 'the copy: a file that does not exist')
      .option('--no-verify', 'do not read the copy again and compare it (default: compare it)')
      .option('--no-sparse', 'write zeros where the file has holes (default: keep the holes)')
      .option('--overwrite', 'replace a file that exists')
      .action(later((actions) => actions.migrateAction)),
  resize: (program) =>
    withTimeout(command(program, 'resize', 'take over the new size of the file, or make file and device larger'))
      .argument('<device>', DEVICE, parseDevice)
      .argument(
        '[size]',
        'the new size of the device, which never becomes smaller (default: that of the file)',
        parseSize,
      )
      .addOption(
        new Option('--partition <last>', 'with a size: make the last partition larger too (default: none)').choices([
          'last',
        ]),
      )
      .action(later((actions) => actions.resizeAction)),
  set: (program) =>
    withTimeout(command(program, 'set', 'change settings of an attached device; the others stay as they are'))
      .argument('<device>', DEVICE, parseDevice)
      .option('--direct-io <on|off>', `bypass the page cache for the file ${AS_IT_IS}`, parseSwitch)
      .option('--block-size <bytes>', `logical block size ${AS_IT_IS}`, parseSize)
      .option('--offset <bytes>', `where in the file the device begins ${AS_IT_IS}`, parseSize)
      .option('--size-limit <bytes>', `how much of the file it shows at most; 0: all of it ${AS_IT_IS}`, parseSize)
      .option('--autoclear <on|off>', `detach it when its last user closes it ${AS_IT_IS}`, parseSwitch)
      .option('--partscan', 'let the kernel look for partitions')
      .option('--reference <tag>', `a tag of at most 63 bytes ${AS_IT_IS}`)
      .addOption(
        new Option(
          '--overlap <mode>',
          'where another device has the same bytes: refuse, or allow it (default: refuse)',
        ).choices(['refuse', 'allow']),
      )
      .action(later((actions) => actions.setAction)),
  partitions: (program) =>
    withTimeout(command(program, 'partitions', 'list the partitions of an attached device, or of a file'))
      .argument('<device|file>', `${DEVICE}; or an image, which is not attached for it`, parseDeviceOrFile)
      .option('--rescan', 'look for them again first')
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
    withTimeout(command(program, 'free', 'print the path of a free device, which is not reserved')).action(
      later((actions) => actions.freeAction),
    ),
  watch: (program) =>
    command(program, 'watch', 'print what happens to the devices, until Ctrl-C').action(
      later((actions) => actions.watchAction),
    ),
  doctor: (program) =>
    command(program, 'doctor', 'check whether attaching works on this machine').action(
      later((actions) => actions.doctorAction),
    ),
  completion: (program) =>
    addHelp(program.command('completion'))
      .description('print the script that completes the words of loopctl in a shell')
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

const AS_IT_IS = '(default: as it is)'

function command(program: Command, name: string, description: string): Command {
  return addHelp(program.command(name))
    .description(description)
    .helpOption('-h, --help', 'print this help')
    .option('--json', 'print results and errors as JSON')
}
