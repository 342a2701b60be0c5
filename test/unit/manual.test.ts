import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { makeProgram } from '../../lib/cli/commands.ts'
import { env, needs } from '../needs.ts'

const PAGE = 'man/loopctl.1'

test('the manual page is what scripts/manual.js writes', () => {
  const written = execFileSync(process.execPath, ['scripts/manual.js'], { encoding: 'utf8' })
  expect(written, 'npm run build:manual').toBe(readFileSync(PAGE, 'utf8'))
})

test('groff sets it without a warning, all of it', () => {
  needs('groff')
  const words = ['-man', '-ww', '-Tascii', '-P-c', '-P-b', '-P-u', '-rLL=200n', PAGE]
  const text = execFileSync('sh', ['-c', 'exec groff "$@" 2>&1', 'sh', ...words], { encoding: 'utf8', env })
  expect(text).not.toMatch(/:\d+: warning/)
  for (const command of makeProgram().commands) {
    expect(text).toContain(`   ${command.name()} ${command.usage()}`)
    for (const { flags, description } of command.options) {
      expect(text.replaceAll(/\s+/g, ' ')).toContain(flags)
      expect(description).not.toBe('')
    }
  }
})

test('it has the sections that a manual page has', () => {
  const titles = [...readFileSync(PAGE, 'utf8').matchAll(/^\.SH (.*)$/gm)].map(([, title]) => title)
  expect(titles).toEqual([
    'NAME',
    'SYNOPSIS',
    'DESCRIPTION',
    'COMMANDS',
    'EXIT STATUS',
    'ENVIRONMENT',
    'FILES',
    'EXAMPLES',
    'SEE ALSO',
  ])
})

test('npm links it for man, which it does for an array alone', () => {
  const { man } = JSON.parse(readFileSync('package.json', 'utf8')) as { man: unknown }
  expect(man).toEqual([PAGE])
})
