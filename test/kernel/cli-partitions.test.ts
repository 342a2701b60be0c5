import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { describe, expect, onTestFinished } from 'vitest'
import type { Partition } from '../../lib/index.ts'
import { needs } from '../needs.ts'
import { sysfs, test } from './support.ts'

const MAIN = 'dist/cli/main.js'
const MiB = 1 << 20
const TABLE = 'label: gpt\nsize=1M,type=U,name=boot\nsize=2M,type=L,name="the root"\n'

beforeEach(() => needs('sfdisk'))

function loopctl(...words: string[]): { status: number | null; stdout: string; stderr: string } {
  return spawnSync(process.execPath, [MAIN, ...words], { encoding: 'utf8' })
}

function partitioned(file: string): string {
  execFileSync('sfdisk', ['--quiet', file], { input: TABLE })
  return file
}

/** Kernels without a parser for the table, as that of a small virtual machine may be, are told of. */
function withoutNoParser(stderr: string): string {
  return stderr.replace(/^loopctl: warning: this kernel has no parser for the GPT, which has 2 partitions: .*\n/, '')
}

/** Attaches, which has to print the device; detached when the test is done with it. */
function attached(words: string[], use: (path: string, number: number) => void): void {
  const { status, stdout, stderr } = loopctl('attach', ...words)
  const path = stdout.trim()
  onTestFinished(() => void (existsSync(`/sys/block/${path.slice('/dev/'.length)}/loop`) && loopctl('detach', path)))
  expect({ status, stderr: withoutNoParser(stderr) }).toEqual({ status: 0, stderr: '' })
  try {
    use(path, Number(/^\/dev\/loop(\d+)$/.exec(path)?.[1]))
  } finally {
    expect(loopctl('detach', path)).toEqual(expect.objectContaining({ status: 0, stderr: '' }))
  }
}

describe('loopctl partitions', () => {
  test('a table, and with --json what the library gives; gone with the device', ({ image }) => {
    const file = partitioned(image('disk', 8 * MiB))
    attached(['--partscan=user', file], (path, number) => {
      const { stdout } = loopctl('partitions', path)
      expect(stdout.split('\n').map((line) => line.split(/ {2,}/))).toEqual([
        ['DEVICE', 'START', 'SIZE', 'TYPE', 'LABEL', 'FLAGS'],
        [`${path}p1`, '1048576', '1048576', 'EFI System', 'boot', '-'],
        [`${path}p2`, '2097152', '2097152', 'Linux filesystem', 'the root', '-'],
        [''],
      ])
      const partitions = JSON.parse(loopctl('partitions', '--json', path).stdout) as Partition[]
      expect(partitions).toMatchObject([
        { number: 1, path: `${path}p1`, device: sysfs(number, `loop${number}p1/dev`), table: 'gpt', label: 'boot' },
        { number: 2, start: 2 * MiB, size: 2 * MiB, label: 'the root', bootable: false },
      ])
      expect(existsSync(`${path}p2`)).toBe(true)
    })
    expect(loopctl('list', file).stdout).toBe('')
  })

  test('--rescan finds those that nobody has looked for', ({ image }) => {
    attached([partitioned(image('disk', 8 * MiB))], (path) => {
      expect(loopctl('partitions', path)).toMatchObject({ status: 0, stdout: '', stderr: '' })
      expect(JSON.parse(loopctl('partitions', '--json', '--rescan', path).stdout)).toHaveLength(2)
    })
  })

  test('a damaged table is exit 1 and a clear word, and nothing is attached', ({ image }) => {
    const file = partitioned(image('disk', 8 * MiB))
    execFileSync('dd', ['if=/dev/zero', `of=${file}`, 'conv=notrunc', 'status=none', 'bs=512', 'seek=1', 'count=40'])
    execFileSync('truncate', ['--size=-1M', file])
    const { status, stdout, stderr } = loopctl('attach', '--partscan=user', file)
    expect({ status, stdout }).toEqual({ status: 1, stdout: '' })
    expect(stderr).toMatch(/^loopctl: EINVAL: .*GPT.*\n/)
    expect(loopctl('list', file).stdout).toBe('')
  })
})

describe('an optional value is one only after =', () => {
  for (const words of [['--partscan'], ['-P'], ['-rP'], ['-Pr'], ['-P=user'], ['-r', '--partscan=user']]) {
    test(words.join(' '), ({ image }) => {
      const file = partitioned(image('disk', 8 * MiB))
      attached([...words, file], (path, number) => {
        expect(sysfs(number, 'loop/backing_file')).toBe(file)
        const byUser = words.some((word) => word.endsWith('=user'))
        expect(sysfs(number, 'loop/partscan')).toBe(byUser ? '0' : '1')
        expect(existsSync(`${path}p1`)).toBe(true)
        expect(existsSync(`${path}p2`)).toBe(true)
        expect(sysfs(number, 'ro')).toBe(
          words.some((word) => word.includes('r') && !word.startsWith('--') && word !== '-P=user') ? '1' : '0',
        )
      })
    })
  }

  test('another value is a usage error', ({ image }) => {
    for (const word of ['-P=all', '--partscan=all']) {
      expect(loopctl('attach', word, image('disk')).status).toBe(2)
    }
    expect(loopctl('attach', '--block-size=automatic', image('disk')).status).toBe(2)
  })
})

test('--block-size auto is that of the image’s GPT', ({ image }) => {
  const file = image('disk', 8 * MiB)
  attached(['--block-size=4096', file], (path) => execFileSync('sfdisk', ['--quiet', path], { input: TABLE }))
  attached(['-b', 'auto', '--partscan=user', file], (path, number) => {
    expect(sysfs(number, 'queue/logical_block_size')).toBe('4096')
    expect(existsSync(`${path}p2`)).toBe(true)
  })
})
