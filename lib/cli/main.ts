#!/usr/bin/env node
import { makeProgram } from './commands.ts'
import { fail, ownWords, splitOptionalValues } from './terminal.ts'

try {
  await makeProgram().parseAsync(splitOptionalValues(process.argv.slice(2)), { from: 'user' })
} catch (error) {
  fail(error, ownWords(process.argv).includes('--json'))
}
