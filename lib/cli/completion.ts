/** `loopctl completion`: scripts for shells, written from the definitions of the commands. They never run loopctl. */

import type { Argument, Command, Option } from 'commander'
import { bashScript } from './completion-bash.ts'
import { fishScript } from './completion-fish.ts'
import type { CommandWords, Completed, OptionWords } from './completion-words.ts'
import { zshScript } from './completion-zsh.ts'
import { COLUMNS_HELP } from './columns.ts'
import { UsageError } from './parse.ts'

/** What is completed for a value of that name; for any other it is the words that its name lists, as in `<on|off>`. */
const KINDS: Record<string, Completed> = {
  'file': 'file',
  'image': 'file',
  'destination': 'file',
  'dir': 'folder',
  'dirs': 'folder',
  'device': 'device',
  'devices': 'device',
  'device|file': 'device or file',
  'n': 'free',
  'command': 'command',
  'columns': COLUMNS_HELP.map(([name]) => name),
}

export function completionScript(shell: string, program: Command): string {
  const words = program
    .createHelp()
    .visibleCommands(program)
    .map((command) => wordsOf(command, program))
  const options = optionsOf(program)
  if (shell === 'bash') return bashScript(words, options)
  if (shell === 'zsh') return zshScript(words, options)
  if (shell === 'fish') return fishScript(words, options)
  throw new UsageError(`there is no completion for ${shell}`)
}

function wordsOf(command: Command, program: Command): CommandWords {
  const help = command.createHelp()
  const isHelp = command.name() === 'help'
  const values = isHelp
    ? [help.visibleCommands(program).map((other) => other.name())]
    : command.registeredArguments.map((argument) => valueOf(argument, command.name()))
  const isVariadic = command.registeredArguments.at(-1)?.variadic ?? false
  // What follows a command is its own.
  const rest = values.at(-1) === 'command' ? 'file' : values.at(-1)
  return {
    name: command.name(),
    about: help.subcommandDescription(command),
    options: isHelp ? [] : optionsOf(command),
    values,
    ...(isVariadic && rest !== undefined && { rest }),
  }
}

function optionsOf(command: Command): OptionWords[] {
  const help = command.createHelp()
  return help.visibleOptions(command).map((option) => {
    const { short, long, description, required, optional } = option
    return {
      ...(short !== undefined && { short }),
      long: long ?? '',
      about: description.replace(/ \(default: .*\)$/, ''),
      ...((required || optional) && { value: valueOfOption(option) }),
      isOptional: optional,
    }
  })
}

function valueOf(argument: Argument, command: string): Completed {
  const kind = KINDS[argument.name()] ?? argument.argChoices ?? []
  // Those that are attached cannot be removed, nor those that are there be added; a new image has a new name.
  if (command === 'add') return []
  return command === 'remove' && kind === 'device' ? 'free' : kind
}

function valueOfOption({ flags, optional, argChoices }: Option): Completed {
  const name = /[<[]=?(.*)[>\]]$/.exec(flags)?.[1] ?? ''
  const listed = optional || name.includes('|') ? name.split('|') : []
  return KINDS[name] ?? argChoices ?? listed.filter((word) => word !== 'bytes' && word !== 'number' && word !== 'label')
}
