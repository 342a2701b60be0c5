/** loopctl list: its columns, units, headings, references and tree. */

import { execFileSync, spawnSync } from 'node:child_process'
import { beforeEach, describe, expect } from 'vitest'
import { attach } from '../../lib/index.ts'
import { needs } from '../needs.ts'
import { sysfs, test } from './support.ts'

const MAIN = 'dist/cli/main.js'
const MiB = 1 << 20

function loopctl(...words: string[]): { status: number | null; stdout: string; stderr: string } {
  return spawnSync(process.execPath, [MAIN, ...words], { encoding: 'utf8' })
}

/** The cells of each line. */
function cells(...words: string[]): string[][] {
  const { status, stdout, stderr } = loopctl('list', ...words)
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
  return stdout
    .trimEnd()
    .split('\n')
    .map((line) => line.split(/ {2,}/))
}

/** What the command writes to a terminal. */
function onTerminal(...words: string[]): string {
  const line = [process.execPath, MAIN, ...words].map((word) => `'${word}'`).join(' ')
  const options = ['--quiet', '--return', '--command', line, '/dev/null']
  return execFileSync('script', options, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] })
}

describe('columns', () => {
  test('--output: these, in this order, in any case; +: beside the usual ones', async ({ image }) => {
    const file = image('disk', MiB)
    await using device = await attach(file, { readOnly: true, reference: 'my disk', offset: 4096 })
    expect(cells('--output', 'ref,NAME,RO', file)).toEqual([
      ['REF', 'NAME', 'RO'],
      ['my disk', device.path, '1'],
    ])
    expect(cells('--noheadings', '-o', '+REF', file)).toEqual([
      [device.path, `${MiB - 4096}`, '4096', '0', '512', 'read-only,autoclear', file, 'my disk'],
    ])
  })

  test('every column, with losetup and sysfs as witnesses', async ({ image }) => {
    const file = image('disk', MiB)
    await using device = await attach(file, { reference: 'tag' })
    const all = 'NAME,MAJ:MIN,DISKSEQ,RO,AUTOCLEAR,PARTSCAN,DIO,BACK-MAJ:MIN,BACK-INO,LOG-SEC'
    const [head, row] = cells('-o', all, file)
    expect(head).toEqual(all.split(','))
    const theirs = 'NAME,MAJ:MIN,RO,AUTOCLEAR,PARTSCAN,DIO,BACK-MAJ:MIN,BACK-INO,LOG-SEC'
    const losetup = execFileSync('losetup', ['--noheadings', '--raw', '--list', '--output', theirs, device.path])
    const [, , diskSeq, ...rest] = row ?? []
    expect([row?.[0], row?.[1], ...rest]).toEqual(String(losetup).replaceAll('\\x20', '').trim().split(/ +/))
    expect(diskSeq).toBe(sysfs(device.number, 'diskseq'))
  })

  test('an unknown one is a wrong usage that names those there are', () => {
    expect(loopctl('list', '--output', 'NAME,COLOUR')).toEqual(
      expect.objectContaining({
        status: 2,
        stdout: '',
        stderr: expect.stringMatching(
          /^loopctl: there is no column 'COLOUR'\nhint: the columns are NAME, MAJ:MIN, .*\n$/,
        ) as string,
      }),
    )
  })

  test('--json: the members that are in these columns', async ({ image }) => {
    const file = image('disk', MiB)
    await using device = await attach(file, { reference: 'tag' })
    const { stdout } = loopctl('list', '--json', '--output', 'NAME,REF,BACK-FILE,FLAGS', file)
    expect(JSON.parse(stdout)).toEqual([
      {
        path: device.path,
        reference: 'tag',
        backingFile: file,
        backingDeleted: false,
        readOnly: false,
        autoclear: true,
        partscan: false,
        directIO: false,
      },
    ])
  })
})

describe('sizes', () => {
  test('for people on a terminal, in bytes elsewhere and with --bytes', async ({ image }) => {
    const file = image('disk', 3 * MiB + 512)
    await using device = await attach(file, { offset: 1024, sizeLimit: MiB + (MiB >> 1) })
    expect(sysfs(device.number, 'size')).toBe('3072')
    const words = ['list', '--noheadings', '-o', 'SIZE,OFFSET,SIZELIMIT,LOG-SEC', file]
    expect(onTerminal(...words).trim()).toBe('1.5M  1K  1.5M  512B')
    expect(onTerminal('list', '--bytes', ...words.slice(1)).trim()).toBe('1572864  1024  1572864  512')
    expect(loopctl(...words).stdout.trim()).toBe('1572864  1024  1572864  512')
  })

  test('a size is rounded, an offset never', async ({ image }) => {
    const file = image('disk', 3 * MiB)
    await using device = await attach(file, { offset: MiB + 512 })
    expect(sysfs(device.number, 'loop/offset')).toBe(String(MiB + 512))
    expect(onTerminal('list', '--noheadings', '-o', 'SIZE,OFFSET', file).trim()).toBe(`2M  ${MiB + 512}B`)
  })
})

describe('--tree', () => {
  beforeEach(() => needs('sfdisk'))

  test('partitions, and a device on top of another, below their device', async ({ image }) => {
    const file = image('disk', 8 * MiB)
    execFileSync('sfdisk', ['--quiet', file], { input: 'label: gpt\nsize=1M\nsize=2M\n' })
    await using lower = await attach(file, { partscan: 'user', overlap: 'allow' })
    await using upper = await attach(lower.path, { readOnly: true })
    const run = (locale: string) =>
      spawnSync(process.execPath, [MAIN, 'list', '--tree', '--noheadings', '-o', 'NAME,SIZE,OFFSET', file], {
        encoding: 'utf8',
        env: { ...process.env, LC_ALL: locale },
      }).stdout.replaceAll(/ +/g, ' ')
    const lines = [
      `${lower.path} ${8 * MiB} 0`,
      `├─${lower.path}p1 ${MiB} ${MiB}`,
      `├─${lower.path}p2 ${2 * MiB} ${2 * MiB}`,
      `└─${upper.path} ${8 * MiB} 0`,
      '',
    ]
    expect(run('C.UTF-8')).toBe(lines.join('\n'))
    expect(run('C')).toBe(lines.join('\n').replaceAll('├─', '|-').replaceAll('└─', '`-'))
    const [root] = JSON.parse(loopctl('list', '--tree', '--json', file).stdout) as [
      { path: string; children: object[] },
    ]
    expect(root).toMatchObject({
      path: lower.path,
      children: [
        { path: `${lower.path}p1`, start: MiB, size: MiB, children: [] },
        { path: `${lower.path}p2`, children: [] },
        { path: upper.path, lower: lower.number, children: [] },
      ],
    })
    await upper.detach()
  })
})
