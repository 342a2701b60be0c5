#!/usr/bin/env node

import { isCommand, makeProgram } from './commands.ts'
import { ownWords, splitOptionalValues } from './parse.ts'
import { fail } from './terminal.ts'

try {
  const words = splitOptionalValues(process.argv.slice(2))
  await makeProgram(words[0]).parseAsync(unknownCommand(words) ?? words, { from: 'user' })
} catch (error) {
  fail(error, ownWords(process.argv).includes('--json'))
}

/** The word alone that is no command: with `help` before it, or `--help` after, commander would show the help of all. */
function unknownCommand([first = '-', second = '-']: string[]): string[] | undefined {
  const word = first === 'help' ? second : first
  return word.startsWith('-') || word === 'help' || isCommand(word) ? undefined : [word]
}
