/** What bash completes: the script runs in a real bash, which is given the words as Tab gives them. */

import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { bashCompletion } from '../../lib/cli/completion.ts'
import { makeProgram } from '../../lib/cli/commands.ts'
import { attach, LoopControl } from '../../lib/index.ts'
import { test, unusedNumber } from './support.ts'

const program = makeProgram()
const SCRIPT = bashCompletion(program)

/** Neither Node nor loopctl is to be found; compopt works only under readline, and is written down here. */
const DRIVER = `set -u
PATH=/nowhere
compopt() { echo "compopt $*"; }
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_loopctl
printf '%s\\n' "\${COMPREPLY[@]}"`

/** The last word is the one that Tab is pressed in. */
function complete(...words: string[]): string[] {
  const output = execFileSync('/bin/bash', ['-c', `${SCRIPT}\n${DRIVER}`, 'bash', 'loopctl', ...words], {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  return output.split('\n').filter((line) => line !== '')
}

const FILES = ['compopt -o default']

describe('completion', () => {
  it('the script is one that bash takes without a word', () => {
    expect(execFileSync('/bin/bash', ['-n'], { input: SCRIPT, encoding: 'utf8', stdio: 'pipe' })).toBe('')
  })

  it('commands', () => {
    const names = program.commands.map((command) => command.name())
    expect(complete('')).toEqual(expect.arrayContaining([...names, 'help', '--version', '--help']))
    expect(complete('mig')).toEqual(['migrate'])
    expect(complete('help', 'res')).toEqual(['resize'])
    expect(complete('no-such-command', '')).toEqual([])
  })

  it.for(program.commands)('the options of $_name', (command) => {
    const longs = command.options.map(({ long }) => long)
    expect(complete(command.name(), '--')).toEqual([...longs, '--help'])
  })

  it.for<[words: string[], offered: string[]]>([
    [
      ['attach', '--overlap', ''],
      ['refuse', 'allow', 'reuse'],
    ],
    [
      ['attach', '--overlap', '=', 'r'],
      ['refuse', 'reuse'],
    ],
    [
      ['attach', '--overlap', '='],
      ['refuse', 'allow', 'reuse'],
    ],
    [
      ['attach', '--partscan', '='],
      ['kernel', 'user'],
    ],
    [['attach', '--direct-io', '=', 'p'], ['prefer']],
    [['attach', '-b', ''], ['auto']],
    [['attach', '--offset', ''], []],
    [
      ['set', '7', '--autoclear', ''],
      ['on', 'off'],
    ],
    [['set', '7', '--direct-io', 'of'], ['off']],
  ])('a choice: %s', ([words, offered]) => {
    expect(complete(...words)).toEqual(offered)
  })

  it.for([
    [['attach', '']],
    [['attach', 'dis']],
    [['attach', '--partscan', '']],
    [['attach', '--overlap', '=', 'reuse', '']],
    [['attach', '-o', '4096', '--read-only', '']],
    [['attach', '--', '-']],
    [['run', '-r', '']],
    [['run', 'disk.img', '--', 'mkfs.ext4', '-', '']],
    [['list', '']],
    [['detach', '--file', '']],
    [['change', 'loop7', '']],
    [['migrate', '7', 'x']],
  ])('a file: %s', ([words = []]) => {
    expect(complete(...words)).toEqual(FILES)
  })

  it('nothing after the last word', () => {
    expect(complete('attach', 'disk.img', '')).toEqual([])
    expect(complete('doctor', '')).toEqual([])
  })

  it('a command after the file of run', () => {
    expect(complete('run', 'disk.img', '--', 'prin')).toContain('printf')
    expect(complete('run', 'disk.img', '--', '--')).toEqual([])
  })

  test('devices as they are in /sys: an attached one', async ({ image }) => {
    await using device = await attach(image('disk'))
    const name = `loop${device.number}`
    expect(complete('status', '')).toContain(`/dev/${name}`)
    expect(complete('detach', 'loop0', 'l')).toContain(name)
    expect(complete('resize', String(device.number))).toContain(String(device.number))
    expect(complete('remove', 'loop')).not.toContain(name)
    expect(complete('run', '--number', '')).not.toContain(`/dev/${name}`)
  })

  test('and a free one', async () => {
    await using control = await LoopControl.open()
    const number = await control.add(unusedNumber())
    try {
      expect(complete('remove', 'loop')).toContain(`loop${number}`)
      expect(complete('attach', '-n', '/dev/')).toContain(`/dev/loop${number}`)
      expect(complete('detach', '')).not.toContain(`/dev/loop${number}`)
    } finally {
      await control.remove(number)
    }
  })

  test('under readline: a command, an option with its value, a file name with a blank', ({ folder }) => {
    writeFileSync(join(folder, 'my disk.img'), '')
    writeFileSync(join(folder, 'completion'), SCRIPT)
    const keys = `. ./completion; loopctl() { printf '<%s>' "$@"; }\nloopctl att\t--over\treu\tmy\t\nexit\n`
    const screen = execFileSync('script', ['--quiet', '--command', 'bash --norc --noprofile', '/dev/null'], {
      cwd: folder,
      input: keys,
      encoding: 'utf8',
      env: { ...process.env, TERM: 'dumb' },
    })
    expect(screen).toContain('<attach><--overlap><reuse><my disk.img>')
  })
})
