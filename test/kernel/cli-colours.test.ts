import { execFileSync } from 'node:child_process'
import { describe, expect } from 'vitest'
import { test } from './support.ts'

const WORDS = `${process.execPath} dist/cli/main.js doctor`
const GREEN = '\u001B[32m✓\u001B[39m'

/** What doctor writes, with only these variables of those that colours hang on. */
function doctor(terminal: boolean, variables: Record<string, string> = {}): string {
  const env: NodeJS.ProcessEnv = { ...process.env, TERM: 'xterm', ...variables }
  for (const name of ['NO_COLOR', 'FORCE_COLOR', 'NODE_DISABLE_COLORS', 'CI']) {
    if (variables[name] === undefined) delete env[name]
  }
  const [program, ...words] = terminal
    ? ['script', '--quiet', '--return', '--command', WORDS, '/dev/null']
    : WORDS.split(' ')
  return execFileSync(program ?? '', words, { encoding: 'utf8', env, stdio: ['ignore', 'pipe', 'inherit'] })
}

describe('colours', () => {
  test('on a terminal', () => {
    expect(doctor(true)).toContain(`${GREEN} kernel`)
  })

  test('not on a terminal with NO_COLOR', () => {
    const output = doctor(true, { NO_COLOR: '1' })
    expect(output).toContain('✓ kernel')
    expect(output).not.toContain('\u001B')
  })

  test('not in a pipe', () => {
    const output = doctor(false)
    expect(output).toContain('✓ kernel')
    expect(output).not.toContain('\u001B')
  })

  test('in a pipe with FORCE_COLOR', () => {
    expect(doctor(false, { FORCE_COLOR: '1' })).toContain(`${GREEN} kernel`)
  })
})
