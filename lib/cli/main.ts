#!/usr/bin/env node

import { makeProgram } from './commands.ts'
import { ownWords, splitOptionalValues } from './parse.ts'
import { fail } from './terminal.ts'

try {
  const words = splitOptionalValues(process.argv.slice(2))
  await makeProgram(words[0]).parseAsync(words, { from: 'user' })
} catch (error) {
  fail(error, ownWords(process.argv).includes('--json'))
}
