/** What the help says: each option's default, what a command prints, examples that the command understands. */

import { execFileSync } from 'node:child_process'
import { describe, expect, test } from 'vitest'
import { makeProgram } from '../../lib/cli/commands.ts'
import { EXAMPLES, HELP } from '../../lib/cli/help.ts'
import { ownWords, splitOptionalValues } from '../../lib/cli/parse.ts'

const program = makeProgram()

/** The help as it is printed. */
function helpOf(command: (typeof program.commands)[number]): string {
  let text = ''
  command.configureOutput({ writeOut: (more) => (text += more) })
  command.outputHelp()
  return text
}

describe.each(program.commands.map((command) => [command.name(), command] as const))('%s', (name, command) => {
  test('every option that has a value tells its default', () => {
    const valued = command.options.filter(({ required, optional, negate }) => required || optional || negate)
    // The files of detach have none: without the option devices are named.
    const untold = valued.filter(({ long, description }) => !description.includes('(default: ') && long !== '--file')
    expect(untold.map(({ long }) => long)).toEqual([])
  })

  test('it tells what it prints, and has examples', () => {
    const text = helpOf(command)
    expect(text).toMatch(/^Prints:\n {2}\S/m)
    expect(text).toMatch(/^Examples:\n {2}# \S.*\n {2}\S/m)
    expect(HELP[name]?.examples.length).toBeGreaterThan(0)
    // 80 columns, but for what cannot be broken
    const long = text.split('\n').filter((line) => line.length > 80 && !line.includes('loopctl'))
    expect(long).toEqual([])
  })
})

test('the help of all commands fits into 80 columns', () => {
  const lines = helpOf(program).split('\n')
  expect(lines.filter((line) => line.length > 80)).toEqual([])
  for (const title of ['Description', 'Exit status', 'Environment', 'Examples']) expect(lines).toContain(`${title}:`)
})

/** The arguments of loopctl in a line of shell, which can be in a substitution. */
function argumentsIn(line: string): string[] {
  const [, inner] = /\$\((loopctl .*)\)/.exec(line) ?? []
  const [, words = ''] = /^loopctl (.*?)(?: > \S+)?$/.exec(inner ?? line) ?? []
  const script = `device=/dev/loop7; set -- ${words}; for word; do printf '%s\\0' "$word"; done`
  return execFileSync('sh', ['-c', script], { encoding: 'utf8' }).split('\0').slice(0, -1)
}

test.each([...EXAMPLES, ...Object.values(HELP).flatMap(({ examples }) => examples)])('%s: %s', async (_, line) => {
  const words = argumentsIn(line)
  expect(words.length).toBeGreaterThan(0)
  const own = makeProgram(words[0])
  const [command] = own.commands
  let done = false
  command?.action(() => {
    done = true
  })
  await own.parseAsync(splitOptionalValues(words), { from: 'user' })
  expect(done, ownWords(words).join(' ')).toBe(true)
})
