/** The completion of fish. */

import type { CommandWords, Completed, OptionWords } from './completion-words.ts'

export function fishScript(commands: readonly CommandWords[], programOptions: readonly OptionWords[]): string {
  const lines = [
    ...programOptions.map((option) => lineOf('__loopctl_is_first', option)),
    ...commands.map(({ name, about }) => `complete -c loopctl -n __loopctl_is_first -a ${name} -d ${quote(about)}`),
    ...commands.flatMap(({ name, options, values, rest }) => {
      const condition = quote(`__loopctl_is ${name}`)
      const kinds = [...values, ...(rest === undefined ? [] : [rest])].map((value) => quote(textOf(value)))
      const valued = options.flatMap(({ short, long, value, isOptional }) =>
        value === undefined || isOptional ? [] : [short ?? '', long],
      )
      const words = [quote(valued.filter((text) => text !== '').join(' ')), rest === undefined ? 'no' : 'yes', ...kinds]
      return [
        ...options.map((option) => lineOf(condition, option)),
        ...options.flatMap((option) => (option.isOptional ? [afterEquals(condition, option)] : [])),
        `complete -c loopctl -n ${condition} -a ${quote(`(__loopctl_argument ${words.join(' ')})`)}`,
      ]
    }),
  ]
  return SCRIPT.replace('LINES', lines.join('\n'))
}

function lineOf(condition: string, { short, long, about, value, isOptional }: OptionWords): string {
  const names = [...(short === undefined ? [] : ['-s', short.slice(1)]), '-l', long.slice(2)].join(' ')
  const line = `complete -c loopctl -n ${condition} ${names} -d ${quote(about)}`
  if (value === undefined || isOptional) return line
  return `${line} -x -a ${quote(offerOf(value))}`
}

/** `--partscan=user` is one word. */
function afterEquals(condition: string, { long, about, value }: OptionWords): string {
  const words = typeof value === 'object' ? value.map((word) => `${long}=${word}`) : []
  const isOption = `-n ${quote("string match -q -- '-*' (commandline -ct)")}`
  return `complete -c loopctl -n ${condition} ${isOption} -a ${quote(words.join(' '))} -d ${quote(about)}`
}

function textOf(value: Completed): string {
  return typeof value === 'string' ? value : value.join(' ')
}

function offerOf(value: Completed): string {
  return typeof value === 'string' ? `(__loopctl_offer ${quote(value)})` : value.join(' ')
}

/** For fish, in single quotes. */
function quote(text: string): string {
  return `'${text.replaceAll('\\', String.raw`\\`).replaceAll("'", String.raw`\'`)}'`
}

const SCRIPT = String.raw`# Completion of loopctl for fish, as 'loopctl completion fish' writes it.

function __loopctl_is_first
    test (count (commandline -opc)) -eq 1
end

function __loopctl_is
    set -l words (commandline -opc)
    test (count $words) -gt 1; and test "$words[2]" = $argv[1]
end

# What is offered for the argument at the cursor: the options with a value, whether the last kind goes on, the kinds.
function __loopctl_argument
    set -l valued (string split ' ' -- $argv[1])
    set -l goes_on $argv[2]
    set -l kinds $argv[3..]
    set -l words (commandline -opc)[3..]
    set -l position 1
    set -l is_literal no
    set -l is_value no
    for word in $words
        if test $is_value = yes
            set is_value no
        else if test $is_literal = no; and test "$word" = --
            set is_literal yes
        else if test $is_literal = no; and string match -q -- '-*' $word
            contains -- $word $valued; and set is_value yes
        else
            set position (math $position + 1)
        end
    end
    if test $position -gt (count $kinds); and test $goes_on = yes
        set position (count $kinds)
    end
    if test $position -le (count $kinds)
        __loopctl_offer $kinds[$position]
    end
end

function __loopctl_offer
    switch $argv[1]
        case file
            __fish_complete_path (commandline -ct)
        case folder
            __fish_complete_directories (commandline -ct) ''
        case device free
            __loopctl_devices $argv[1]
        case 'device or file'
            __loopctl_devices device
            __fish_complete_path (commandline -ct)
        case command
            complete -C (commandline -ct)
        case '*'
            string split -n ' ' -- $argv[1]
    end
end

# Devices as /sys has them: attached ones, or free ones.
function __loopctl_devices
    set -l token (commandline -ct)
    for entry in /sys/block/loop*
        set -l kind free
        test -d $entry/loop; and set kind device
        test $kind = $argv[1]; or continue
        set -l name (string replace /sys/block/ '' $entry)
        switch $token
            case '[0-9]*' '0*' '1*' '2*' '3*' '4*' '5*' '6*' '7*' '8*' '9*'
                string replace loop '' $name
            case 'l*'
                echo $name
            case '*'
                echo /dev/$name
        end
    end
end

complete -c loopctl -f
LINES
`
