/** What the shells complete: the scripts run in a real shell, which is given the words as Tab gives them. */

import { execFileSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeEach, describe, expect, it, onTestFinished } from 'vitest'
import { completionScript } from '../../lib/cli/completion.ts'
import { makeProgram } from '../../lib/cli/commands.ts'
import { attach, LoopControl } from '../../lib/index.ts'
import { env, needs } from '../needs.ts'
import { test, unusedNumber } from './support.ts'

const program = makeProgram()
const SCRIPT = completionScript('bash', program)

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
    [['attach', '--partscan', '=', 'u'], ['user']],
    [['list', '-o', 'BACK-M'], ['BACK-MAJ:MIN']],
    [
      ['completion', ''],
      ['bash', 'zsh', 'fish'],
    ],
    [['attach', '--direct-io', '=', 'p'], ['prefer']],
    [['attach', '-b', ''], ['auto']],
    [['attach', '--offset', ''], []],
    [
      ['set', '7', '--autoclear', ''],
      ['on', 'off'],
    ],
    [['set', '7', '--direct-io', 'of'], ['off']],
  ])('a choice: %s', ([words, expected]) => {
    expect(complete(...words)).toEqual(expected)
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

  it('a folder', () => {
    expect(complete('umount', '')).toEqual(['compopt -o dirnames'])
    expect(complete('mount', 'disk.img', '')).toEqual(['compopt -o dirnames'])
  })

  it('a device or a file', () => {
    expect(complete('partitions', '')).toEqual(expect.arrayContaining(FILES))
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

/** What is offered for the last word, without its description. */
function offered(folder: string, line: string): string[] {
  writeFileSync(join(folder, 'script.fish'), completionScript('fish', program))
  const script = 'source script.fish; complete --do-complete $argv[1]'
  const output = execFileSync('fish', ['--no-config', '-c', script, line], {
    cwd: folder,
    encoding: 'utf8',
    env: { ...env, HOME: folder },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  return output
    .split('\n')
    .filter((text) => text !== '')
    .map((text) => text.replace(/\t.*/, ''))
}

describe('fish', () => {
  beforeEach(() => needs('fish'))

  test('commands, options, values, files and folders', ({ folder }) => {
    writeFileSync(join(folder, 'my disk.img'), '')
    mkdirSync(join(folder, 'mnt'))
    expect(offered(folder, 'loopctl ')).toEqual(
      ['help', ...program.commands.map((command) => command.name())].toSorted(),
    )
    expect(offered(folder, 'loopctl att')).toEqual(['attach'])
    expect(offered(folder, 'loopctl --v')).toEqual(['--version'])
    expect(offered(folder, 'loopctl list --no')).toEqual(['--noheadings'])
    expect(offered(folder, 'loopctl attach --overlap ')).toEqual(['allow', 'refuse', 'reuse'])
    expect(offered(folder, 'loopctl attach --overlap=al')).toEqual(['--overlap=allow'])
    expect(offered(folder, 'loopctl attach --partscan=')).toEqual(['--partscan=kernel', '--partscan=user'])
    expect(offered(folder, 'loopctl attach -r my')).toEqual(['my disk.img'])
    expect(offered(folder, 'loopctl attach -o 4096 my')).toEqual(['my disk.img'])
    expect(offered(folder, 'loopctl attach disk.img my')).toEqual([])
    expect(offered(folder, 'loopctl umount m')).toEqual(['mnt/'])
    expect(offered(folder, 'loopctl help res')).toEqual(['resize'])
    expect(offered(folder, 'loopctl run disk.img -- printen')).toEqual(['printenv'])
    expect(offered(folder, 'loopctl run disk.img -- ls my')).toEqual(['my disk.img'])
  })

  test('devices', async ({ folder, image }) => {
    await using device = await attach(image('disk'))
    expect(offered(folder, 'loopctl status ')).toContain(device.path)
    expect(offered(folder, 'loopctl status loop')).toContain(`loop${device.number}`)
    expect(offered(folder, `loopctl detach ${device.number}`)).toContain(`${device.number}`)
    expect(offered(folder, 'loopctl remove ')).not.toContain(device.path)
  })
})

/** The words of the line once Tab has been pressed where it has one. */
function completed(folder: string, ...lines: string[]): string[] {
  writeFileSync(join(folder, '_loopctl'), completionScript('zsh', program))
  const before = `autoload -U compinit; compinit -D -u; . ./_loopctl; loopctl() { printf '<%s>' "$@"; echo . }`
  const screen = execFileSync('script', ['--quiet', '--command', 'zsh -f -i', '/dev/null'], {
    cwd: folder,
    input: [before, ...lines.map((line) => `loopctl ${line}`), 'exit', ''].join('\n'),
    encoding: 'utf8',
    env: { ...env, TERM: 'dumb' },
  })
  return [...screen.matchAll(/^.*?((?:<[^>]*>)+)\.\r?$/gm)].map(([, words = '']) => words)
}

describe('zsh', () => {
  beforeEach(() => needs('zsh'))

  test('it is a script that zsh takes', ({ folder }) => {
    const path = join(folder, '_loopctl')
    writeFileSync(path, completionScript('zsh', program))
    expect(execFileSync('zsh', ['-n', path], { encoding: 'utf8' })).toBe('')
  })

  test('commands, options, values, files, folders and devices', async ({ folder, image }) => {
    writeFileSync(join(folder, 'my disk.img'), '')
    mkdirSync(join(folder, 'mnt'))
    // No other device has a number that begins like it.
    const number = 400_000 + unusedNumber()
    onTestFinished(async () => {
      await using control = await LoopControl.open()
      await control.remove(number)
    })
    await using device = await attach(image('disk'), { number })
    expect(device.number).toBe(number)
    const half = `${number}`.slice(0, -1)
    expect(
      completed(
        folder,
        'att\t--overlap reu\t-r my\t',
        'attach --partscan=u\t',
        'list --noh\t -o BACK-I\t',
        'umount m\t',
        `status /dev/loop${half}\t`,
        `status loop${half}\t`,
        `remove ${half}\t`,
        'run my\t-- printen\t',
        'run my\t-- ls my\t',
      ),
    ).toEqual([
      '<attach><--overlap><reuse><-r><my disk.img>',
      '<attach><--partscan=user>',
      '<list><--noheadings><-o><BACK-INO>',
      '<umount><mnt>',
      `<status></dev/loop${number}>`,
      `<status><loop${number}>`,
      `<remove><${half}>`,
      '<run><my disk.img><--><printenv>',
      '<run><my disk.img><--><ls><my disk.img>',
    ])
  })
})
