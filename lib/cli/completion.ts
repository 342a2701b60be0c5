/** `loopctl completion`: a script for bash, written from the definitions of the commands. */

import type { Argument, Command, Option } from 'commander'

/** What is completed for a value of that name; for any other it is the words that its name lists, as in `<on|off>`. */
const KINDS: Record<string, string> = {
  file: 'file',
  destination: 'file',
  device: 'device',
  devices: 'device',
  n: 'free',
  command: 'command',
}

/** The script asks the kernel's files in /sys for devices, and never runs loopctl. */
export function bashCompletion(program: Command): string {
  const help = program.createHelp()
  const commands = help.visibleCommands(program)
  const cases = commands.map((command) => {
    const options = help.visibleOptions(command)
    const { registeredArguments } = command
    const names = command.name() === 'help' ? commands.map((other) => other.name()).join(' ') : undefined
    const kinds = registeredArguments.map((argument) => names ?? kindOfArgument(argument, command.name()))
    // What follows a command is its own.
    const last = registeredArguments.at(-1)?.variadic ? (kinds.at(-1) === 'command' ? 'file' : kinds.at(-1)) : ''
    return `    ${command.name()})
      options='${options.map(({ long }) => long).join(' ')}'
      values=(${options.flatMap(valuesOf).join(' ')})
      kinds=(${kinds.map((kind) => `'${kind}'`).join(' ')}) last='${last}'
      ;;`
  })
  const first = [...commands.map((command) => command.name()), ...help.visibleOptions(program).map(({ long }) => long)]
  return SCRIPT.replace('COMMANDS', first.join(' ')).replace('    CASES', cases.join('\n'))
}

function kindOfArgument(argument: Argument, command: string): string {
  const kind = KINDS[argument.name()] ?? ''
  // They are not for what is attached.
  return command === 'remove' && kind === 'device' ? 'free' : command === 'add' ? '' : kind
}

/** `[--overlap]='refuse allow reuse'`, and the same with the `=`; only that where the value is optional. */
function valuesOf({ flags, short, long, required, optional, argChoices }: Option): string[] {
  const name = /[<[]=?(.*)[>\]]$/.exec(flags)?.[1] ?? ''
  const words =
    KINDS[name] ??
    (argChoices ?? (optional || name.includes('|') ? name.split('|') : [])).filter((word) => word !== 'bytes').join(' ')
  const before = required ? [short, long, `${long}=`] : optional ? [`${long}=`] : []
  return before.filter((text) => text !== undefined).map((text) => `[${text}]='${words}'`)
}

/** What bash is to expand is written `\${}`, which TypeScript leaves alone. */
const SCRIPT = String.raw`# Completion of loopctl for bash, as 'loopctl completion' writes it.

_loopctl() {
  local cur=\${COMP_WORDS[COMP_CWORD]} prev=\${COMP_WORDS[COMP_CWORD - 1]}
  local options='' last='' word literal='' i position=0
  local -a kinds=()
  local -A values=()
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    _loopctl_offer 'COMMANDS'
    return
  fi
  case \${COMP_WORDS[1]} in
    CASES
    *) return ;;
  esac
  for ((i = 2; i < COMP_CWORD; i++)); do
    word=\${COMP_WORDS[i]}
    if [[ ! $literal && $word == -- ]]; then
      literal=yes
    elif [[ ! $literal && $word == = ]]; then
      ((i++))
    elif [[ ! $literal && $word == -* ]]; then
      [[ \${values[$word]+set} && \${COMP_WORDS[i + 1]} != = ]] && ((i++))
    else
      ((position++))
    fi
  done
  # For bash '--overlap=reuse' is three words.
  if [[ $cur == = ]]; then
    cur='' prev+='='
  elif [[ $prev == = ]]; then
    prev=\${COMP_WORDS[COMP_CWORD - 2]}=
  fi
  if [[ ! $literal && $prev == -* && \${values[$prev]+set} ]]; then
    _loopctl_offer "\${values[$prev]}"
  elif [[ ! $literal && $cur == -* ]]; then
    _loopctl_offer "$options"
  else
    _loopctl_offer "\${kinds[position]:-$last}"
  fi
}

# Offers files, devices, commands, or one of the words.
_loopctl_offer() {
  local path name
  case $1 in
    file) compopt -o default ;;
    command) mapfile -t COMPREPLY < <(compgen -c -- "$cur") ;;
    device | free)
      for path in /sys/block/loop[0-9]*; do
        if [[ -d $path/loop ]]; then name=device; else name=free; fi
        [[ -d $path && $name == "$1" ]] || continue
        case $cur in
          [0-9]*) name=\${path#/sys/block/loop} ;;
          l*) name=\${path#/sys/block/} ;;
          *) name=/dev/\${path#/sys/block/} ;;
        esac
        [[ $name == "$cur"* ]] && COMPREPLY+=("$name")
      done
      ;;
    *) mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur") ;;
  esac
}

complete -F _loopctl loopctl
`.replaceAll('\\${', '${')
