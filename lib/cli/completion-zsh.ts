/** The completion of zsh. */

import type { CommandWords, Completed, OptionWords } from './completion-words.ts'

export function zshScript(commands: readonly CommandWords[], programOptions: readonly OptionWords[]): string {
  const described = commands.map(({ name, about }) => `    ${quote(`${name}:${about}`)}`)
  const cases = commands.map(({ name, options, values, rest }) => {
    const specs = [...options.flatMap(specsOf), ...values.map((value, i) => argumentOf(value, i, values, rest))]
    return `    ${name})\n      _arguments -s -S \\\n${specs.map((spec) => `        ${quote(spec)}`).join(' \\\n')}\n      ;;`
  })
  return SCRIPT.replace('    COMMANDS', described.join('\n'))
    .replace('OPTIONS', programOptions.map(({ long }) => long).join(' '))
    .replace('    CASES', cases.join('\n'))
}

/** For _arguments: `--overlap=[what it does]:value:(refuse allow reuse)`. */
function specsOf({ short, long, about, value, isOptional }: OptionWords): string[] {
  const text = `[${about.replaceAll(/[[\]:\\]/g, String.raw`\$&`)}]`
  const action = value === undefined ? '' : `${isOptional ? '::' : ':'}value:${actionOf(value)}`
  const sign = value === undefined ? '' : isOptional ? '=-' : '='
  const specs = [`${long}${sign}${text}${action}`]
  if (short !== undefined)
    specs.push(`${short}${value === undefined || isOptional ? '' : '+'}${text}${isOptional ? '' : action}`)
  // One of both is enough.
  return short === undefined ? specs : specs.map((spec) => `(${short} ${long})${spec}`)
}

function argumentOf(value: Completed, i: number, values: readonly Completed[], rest: Completed | undefined): string {
  const isLast = i === values.length - 1
  if (isLast && value === 'command') return `*::command:${ACTIONS.command}`
  return `${isLast && rest !== undefined ? '*' : i + 1}:argument:${actionOf(value)}`
}

function actionOf(value: Completed): string {
  if (typeof value !== 'string') return value.length === 0 ? '' : `(${value.join(' ').replaceAll(':', String.raw`\:`)})`
  return ACTIONS[value]
}

/** With a blank before it, _arguments gives a function no words of its own. */
const ACTIONS = {
  'file': '_files',
  'folder': '_files -/',
  'device': ' _loopctl_devices attached',
  'free': ' _loopctl_devices free',
  'device or file': ' _loopctl_devices_and_files',
  'command': ' _loopctl_command',
}

/** For zsh, in single quotes. */
function quote(text: string): string {
  return `'${text.replaceAll("'", String.raw`'\''`)}'`
}

const SCRIPT = String.raw`#compdef loopctl
# Completion of loopctl for zsh, as 'loopctl completion zsh' writes it.

_loopctl() {
  local curcontext=$curcontext command
  local -a named
  named=(
    COMMANDS
  )
  if ((CURRENT == 2)); then
    _describe command named
    compadd -- OPTIONS
    return
  fi
  command=$words[2]
  shift words
  ((CURRENT--))
  case $command in
    CASES
  esac
}

# Devices as /sys has them: attached ones, or free ones.
_loopctl_devices() {
  local entry kind
  local -a found
  for entry in /sys/block/loop<->(N); do
    kind=free
    [[ -d $entry/loop ]] && kind=attached
    [[ $kind == $1 ]] || continue
    case $PREFIX in
      [0-9]*) found+=(\${entry#/sys/block/loop}) ;;
      l*) found+=(\${entry#/sys/block/}) ;;
      *) found+=(/dev/\${entry#/sys/block/}) ;;
    esac
  done
  compadd -a found
}

_loopctl_devices_and_files() {
  _loopctl_devices attached
  _files
}

_loopctl_command() {
  local end=\${words[(i)--]}
  if ((end < CURRENT)); then
    shift $end words
    ((CURRENT -= end))
  fi
  _normal
}

if [[ $funcstack[1] == _loopctl ]]; then
  _loopctl "$@"
else
  compdef _loopctl loopctl
fi
`.replaceAll('\\${', '${')
