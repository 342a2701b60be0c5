/** The command's words. What each of them does is loaded when it is asked for: {@link later}. */

import { Command, InvalidArgumentError, Option } from 'commander'
import { ROOT } from '../kernel/binding.ts'
import { readFileSync } from '../kernel/files.ts'
import { checkPartitionRef, type PartitionRef } from '../partitions/ref.ts'
import { bashCompletion } from './completion.ts'
import { listAction } from './listing.ts'
import {
  parseDevice,
  parseDeviceOrFile,
  parseDevices,
  parseSize,
  parseSwitch,
  parseWholeNumber,
  print,
} from './terminal.ts'

const { version } = JSON.parse(String(readFileSync(`${ROOT}/package.json`))) as { version: string }

/** With all commands, or only that which the first word names. */
export function makeProgram(first?: string): Command {
  const program = new Command('loopctl')
    .description('Linux loop devices: a file becomes a block device')
    .version(version)
    .exitOverride()
    .showHelpAfterError('(loopctl --help tells the usage)')
    .addHelpText('after', () => `\n${NOTES.map(([title, text]) => `${title}: ${text}`).join('\n')}`)

  // Where one is named, the others need not be defined, which takes a millisecond or two.
  const named = first !== undefined && Object.hasOwn(COMMANDS, first) ? COMMANDS[first] : undefined
  for (const define of named ? [named] : Object.values(COMMANDS)) define(program)
  return program
}

/** The commands, in the order of the help. */
const COMMANDS: Record<string, (program: Command) => Command> = {
  attach: (program) =>
    withAttachOptions(command(program, 'attach', 'attach a file, and print the device'))
      .argument('<file>', FILE)
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(later((actions) => actions.attachAction)),
  run: (program) =>
    withAttachOptions(
      command(program, 'run', 'attach a file for as long as a command runs, with the device in LOOP_DEVICE'),
    )
      .usage('[options] <file> -- <command...>')
      .argument('<file>', FILE)
      .argument('<command...>', 'what to run; signals and the exit status are passed on')
      .addOption(
        new Option(
          '--mount [=dir]',
          'mount it too, with the place in LOOP_MOUNT: where nobody else sees it, or on that folder',
        ).argParser(parseMount),
      )
      .option('--lock', 'lock the device against udev; a program that takes the lock itself would wait for ever')
      .option('--options <list>', 'mount options, with commas; nosuid,nodev unless suid,dev lifts them')
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(later((actions) => actions.runAction)),
  detach: (program) =>
    command(program, 'detach', 'detach, and tell whether it happened')
      .argument('[devices...]', DEVICE, parseDevices)
      .option('--lazy', 'where it is in use, leave it to the kernel to detach it after that')
      .option('--timeout <ms>', 'how long to wait for what passes by itself (default: 4000)', parseWholeNumber)
      .option('--file <file>', 'the devices attached to this file')
      .option('--unmount', 'unmount first what is mounted from it, the deepest first')
      .action(later((actions) => actions.detachAction)),
  mount: (program) =>
    command(program, 'mount', 'attach an image and mount it; the device goes when that is unmounted')
      .argument('<image>', FILE)
      .argument('<dir>', 'the folder to mount it on')
      .option('-r, --read-only', 'attach and mount read-only')
      .option('-o, --options <list>', 'mount options, with commas; nosuid,nodev unless suid,dev lifts them')
      .option('-t, --type <name>', 'the filesystem, where its superblock does not tell')
      .option('--partition <ref>', PARTITION, parsePartition)
      .option('--offset <bytes>', 'where in the image the filesystem begins', parseSize)
      .option('--size-limit <bytes>', 'how much of the image it has at most', parseSize)
      .option('-b, --block-size <bytes|auto>', 'logical block size; auto: that of the image’s GPT', parseBlockSize)
      .option('--make-dir', 'make the folder where there is none')
      .option('--timeout <ms>', 'give up after that (default: 10000)', parseWholeNumber)
      .action(later((actions) => actions.mountAction)),
  umount: (program) =>
    command(program, 'umount', 'unmount what is mounted from a loop device')
      .argument('<dirs...>', 'where it is mounted')
      .option('--lazy', 'where files of it are open, leave it to the kernel to unmount it after that')
      .option('--timeout <ms>', 'how long to wait for what passes by itself (default: 10000)', parseWholeNumber)
      .action(later((actions) => actions.umountAction)),
  create: (program) =>
    command(program, 'create', 'make a new image, which is all zeros')
      .argument('<file>', 'the image: a file that does not exist')
      .argument('<size>', 'bytes, or with a unit', parseSize)
      .option('--allocate', 'reserve its blocks now; else it is sparse')
      .option('--overwrite', 'replace a file that is there')
      .option('--timeout <ms>', 'give up after that (default: 10000)', parseWholeNumber)
      .action(later((actions) => actions.createAction)),
  list: (program) =>
    command(program, 'list', 'the attached devices')
      .argument('[file]', 'only those attached to this file')
      .option('--all', 'the free devices too')
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(listAction),
  status: (program) =>
    command(program, 'status', 'everything about one attached device')
      .argument('<device>', DEVICE, parseDevice)
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(later((actions) => actions.statusAction)),
  change: (program) =>
    withChangeOptions(command(program, 'change', 'another backing file of the same content, for a read-only device'))
      .argument('<device>', DEVICE, parseDevice)
      .argument('<file>', FILE)
      .option('--verify', 'compare the contents first')
      .action(later((actions) => actions.changeAction)),
  migrate: (program) =>
    withChangeOptions(command(program, 'migrate', 'move the backing file to another place, under the running system'))
      .argument('<device>', DEVICE, parseDevice)
      .argument('<destination>', 'where the copy goes: a file that does not exist')
      .option('--no-verify', 'do not read the copy back and compare it')
      .option('--no-sparse', 'write zeros where there are holes')
      .option('--overwrite', 'replace a file that is there')
      .action(later((actions) => actions.migrateAction)),
  resize: (program) =>
    command(program, 'resize', 'take over the new size of the backing file, or make both larger, and print it')
      .argument('<device>', DEVICE, parseDevice)
      .argument('[size]', 'the new size of the device; never smaller than now', parseSize)
      .addOption(
        new Option('--partition <last>', 'with a size: the last partition grows to the new end too').choices(['last']),
      )
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(later((actions) => actions.resizeAction)),
  set: (program) =>
    command(program, 'set', 'change settings of an attached device')
      .argument('<device>', DEVICE, parseDevice)
      .option('--direct-io <on|off>', 'bypass the page cache for the backing file', parseSwitch)
      .option('--block-size <bytes>', 'logical block size', parseSize)
      .option('--offset <bytes>', 'where in the file the device begins', parseSize)
      .option('--size-limit <bytes>', 'how much of the file it shows at most; 0: all', parseSize)
      .option('--autoclear <on|off>', 'detach when the last user closes it', parseSwitch)
      .option('--partscan', 'let the kernel look for partitions')
      .option('--reference <tag>', 'a tag of at most 63 bytes')
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(later((actions) => actions.setAction)),
  partitions: (program) =>
    command(program, 'partitions', 'the partitions of an attached device, or of a file')
      .argument('<device|file>', `${DEVICE}; or an image, which is not attached for it`, parseDeviceOrFile)
      .option('--rescan', 'look for them again first')
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(later((actions) => actions.partitionsAction)),
  add: (program) =>
    command(program, 'add', 'make a device, and print it')
      .argument('[device]', `${DEVICE}; without it the next unused one`, parseDevice)
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(later((actions) => actions.addAction)),
  remove: (program) =>
    command(program, 'remove', 'remove free devices')
      .argument('<devices...>', DEVICE, parseDevices)
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(later((actions) => actions.removeAction)),
  free: (program) =>
    command(program, 'free', 'print a free device; nothing is reserved')
      .option('--timeout <ms>', TIMEOUT, parseWholeNumber)
      .action(later((actions) => actions.freeAction)),
  watch: (program) =>
    command(program, 'watch', 'what happens to the devices, a line each, until Ctrl-C').action(
      later((actions) => actions.watchAction),
    ),
  doctor: (program) =>
    command(program, 'doctor', 'whether attaching works here, and what stands in its way').action(
      later((actions) => actions.doctorAction),
    ),
  completion: (program) =>
    program
      .command('completion')
      .description('print the completion script for bash')
      .action(() => print(bashCompletion(makeProgram()))),
}

/** An action that is loaded when it is run: with it comes the whole library, which the help and list do without. */
function later<Values extends unknown[]>(
  pick: (actions: typeof import('./actions.ts')) => (...values: Values) => Promise<void>,
): (...values: Values) => Promise<void> {
  return async (...values) => pick(await import('./actions.ts'))(...values)
}

/** What holds for every command: below the help, and in the manual page. */
export const NOTES = [
  ['Devices', '7, loop7, /dev/loop7 or the path of a link to it.'],
  ['Sizes', 'bytes, or with a unit: 1M and 1MiB are 1024 * 1024, 1MB is 1000 * 1000.'],
  ['Exit status', '0 done, 1 failed, 2 wrong usage, 130 interrupted, after undoing; of run that of its command.'],
  ['Environment', 'Colours are for terminals; NO_COLOR=1 turns them off, FORCE_COLOR=1 on.'],
] as const

const PARTITION = 'that partition: its number, or its label'
const FILE = 'an image, or any file or block device'
const TIMEOUT = 'give up on the whole of it after that (default: each step has its own time)'
const DEVICE = '7, loop7, /dev/loop7 or a link to it'

function command(program: Command, name: string, description: string): Command {
  return program.command(name).description(description).option('--json', 'print JSON, also of an error')
}

function withChangeOptions(target: Command): Command {
  return target
    .option('--force', 'even under a mounted filesystem, which the kernel may shut down')
    .addOption(new Option('--overlap <mode>', 'what if other devices have the files').choices(['refuse', 'allow']))
    .option('--timeout <ms>', 'give up after that (default: never)', parseWholeNumber)
}

function withAttachOptions(target: Command): Command {
  return target
    .option('-r, --read-only', 'attach read-only')
    .option('-o, --offset <bytes>', 'where in the file the device begins', parseSize)
    .option('-s, --size-limit <bytes>', 'how much of the file it shows at most', parseSize)
    .option('-b, --block-size <bytes|auto>', 'logical block size; auto: that of the image’s GPT', parseBlockSize)
    .addOption(
      new Option('--direct-io [=prefer]', 'bypass the page cache for the file; prefer: where it can be').argParser(
        parseDirectIO,
      ),
    )
    .addOption(
      new Option(
        '-P, --partscan [=kernel|user]',
        'partitions as /dev/loopNpM, by whatever works; kernel, user: by the kernel’s parsers, by BLKPG alone',
      ).argParser(parsePartscan),
    )
    .option('--partition <number|label>', 'one partition of the image; LABEL, UUID=..., TYPE=...', parsePartition)
    .option('--no-create-node', 'do not make a node that is missing in /dev')
    .option('-n, --number <n>', 'this device, made if there is none', parseDevice)
    .addOption(
      new Option('--overlap <mode>', 'what about other attachments of the same bytes').choices([
        'refuse',
        'allow',
        'reuse',
      ]),
    )
    .option('--reference <tag>', 'a tag of at most 63 bytes')
    .option('--swappable', 'a stack of two, so that change and migrate spare a mounted ext4 or xfs; needs --read-only')
}

function parseMount(text: string): true | string {
  if (text === '') throw new InvalidArgumentError('With a value it is --mount=DIR.')
  return text === 'true' ? true : text
}

function parseDirectIO(text: string): true | 'prefer' {
  if (text === 'true') return true
  if (text === 'prefer') return text
  throw new InvalidArgumentError('With a value it is --direct-io=prefer.')
}

function parsePartscan(text: string): true | 'kernel' | 'user' {
  if (text === 'true') return true
  if (text === 'kernel' || text === 'user') return text
  throw new InvalidArgumentError('With a value it is --partscan=kernel or --partscan=user.')
}

/** `2`, `UUID=...`, `TYPE=...`, `LABEL=...`, or a label as it is: where a label is digits, `LABEL=` tells. */
function parsePartition(text: string): PartitionRef {
  const [, name, value = ''] = /^(LABEL|UUID|TYPE)=(.*)$/is.exec(text) ?? []
  try {
    if (name !== undefined) return checkPartitionRef({ [name.toLowerCase()]: value })
    return checkPartitionRef(/^\d+$/.test(text) ? Number(text) : { label: text })
  } catch (error) {
    throw new InvalidArgumentError(error instanceof Error ? `${error.message}.` : String(error))
  }
}

function parseBlockSize(text: string): number | 'auto' {
  return text === 'auto' ? text : parseSize(text)
}
