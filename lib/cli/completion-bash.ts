/** The completion of bash. */

import type { CommandWords, Completed, OptionWords } from './completion-words.ts'

export function bashScript(commands: readonly CommandWords[], programOptions: readonly OptionWords[]): string {
  const cases = commands.map(
    ({ name, options, values, rest }) => `    ${name})
      options='${options.map(({ long }) => long).join(' ')}'
      values=(${options.flatMap(valuesOf).join(' ')})
      kinds=(${values.map((value) => `'${textOf(value)}'`).join(' ')}) last='${rest === undefined ? '' : textOf(rest)}'
      ;;`,
  )
  const first = [...commands.map(({ name }) => name), ...programOptions.map(({ long }) => long)]
  return SCRIPT.replace('COMMANDS', first.join(' ')).replace('    CASES', cases.join('\n'))
}

function textOf(value: Completed): string {
  return typeof value === 'string' ? value.replace(' or ', '-') : value.join(' ')
}

/** `[--overlap]='refuse allow reuse'`, and the same with the `=`; only that where the value is optional. */
function valuesOf({ short, long, value, isOptional }: OptionWords): string[] {
  if (value === undefined) return []
  const before = isOptional ? [`${long}=`] : [short, long, `${long}=`]
  return before.filter((text) => text !== undefined).map((text) => `[${text}]='${textOf(value)}'`)
}

/** What bash is to expand is written `\${}`, which TypeScript leaves alone. */
const SCRIPT = String.raw`# Completion of loopctl for bash, as 'loopctl completion bash' writes it.

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
    folder) compopt -o dirnames ;;
    device-file)
      _loopctl_offer device
      compopt -o default
      ;;
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
