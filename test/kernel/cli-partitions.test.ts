import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, rmSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { beforeEach, describe, expect, onTestFinished } from 'vitest'
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
  return stderr.replace(
    /^loopctl: warning: this kernel has no parser for the GPT, which has 2 partitions: .*\nhint: .*\n/,
    '',
  )
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

describe('a file, without the kernel', () => {
  test('its partitions as a table, and with --json what the library gives', ({ image }) => {
    const file = partitioned(image('disk', 8 * MiB))
    const { stdout, stderr, status } = loopctl('partitions', file)
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    expect(stdout.split('\n').map((line) => line.trim().split(/ {2,}/))).toEqual([
      ['NUMBER', 'START', 'SIZE', 'TYPE', 'LABEL', 'FLAGS'],
      ['1', '1048576', '1048576', 'EFI System', 'boot', '-'],
      ['2', '2097152', '2097152', 'Linux filesystem', 'the root', '-'],
      [''],
    ])
    expect(JSON.parse(loopctl('partitions', '--json', file).stdout)).toMatchObject({
      table: 'gpt',
      blockSize: 512,
      warnings: [],
      partitions: [
        { number: 1, label: 'boot' },
        { number: 2, start: 2 * MiB, size: 2 * MiB },
      ],
    })
    expect(loopctl('list', file).stdout).toBe('')
    expect(loopctl('partitions', '--rescan', file).status).toBe(2)
    expect(loopctl('partitions', image('blank'))).toMatchObject({
      status: 1,
      stderr: expect.stringMatching(/there is no partition table/) as string,
    })
  })

  test('attach --partition: a number, a label, UUID=, TYPE=', ({ image }) => {
    const file = partitioned(image('disk', 8 * MiB))
    const { partitions } = JSON.parse(loopctl('partitions', '--json', file).stdout) as { partitions: Partition[] }
    for (const word of [
      '2',
      'the root',
      `UUID=${partitions[1]?.uuid}`,
      `TYPE=${partitions[1]?.type}`,
      'LABEL=the root',
    ]) {
      attached(['--partition', word, file], (_, number) => {
        expect(sysfs(number, 'loop/offset')).toBe(`${2 * MiB}`)
        expect(sysfs(number, 'loop/sizelimit')).toBe(`${2 * MiB}`)
      })
    }
    const { status, stderr } = loopctl('attach', '--partition=3', file)
    expect(status).toBe(1)
    expect(stderr).toContain('there is no partition 3: there are 1 ("boot"), 2 ("the root")')
    for (const word of ['0', 'UUID=1', 'TYPE=x']) expect(loopctl('attach', '--partition', word, file).status).toBe(2)
    expect(loopctl('attach', '--partition', '1', '--offset', '1M', file).status).toBe(2)
  })

  test('warnings are told on stderr, and with --json are in the answer too', ({ image }) => {
    const file = partitioned(image('disk', 8 * MiB))
    execFileSync('truncate', ['--size=3M', file])
    const { status, stderr } = loopctl('partitions', file)
    expect(status).toBe(0)
    expect(stderr).toMatch(/^loopctl: warning: partition 2 ends 1 MiB beyond the image; it is left out$/m)
    const json = loopctl('partitions', '--json', file)
    const warnings = [{ code: 'gpt-backup' }, { code: 'partition-left-out' }]
    expect(JSON.parse(json.stdout)).toMatchObject({ warnings })
    const lines = json.stderr.trimEnd().split('\n')
    expect(lines.map((line) => JSON.parse(line) as unknown)).toMatchObject(warnings.map((warning) => ({ warning })))
  })
})

describe('a device named otherwise', () => {
  test('by a link, as /dev/disk/by-... are; a partition is told to be one', ({ folder, image }) => {
    const file = partitioned(image('disk', 8 * MiB))
    attached(['--partscan=user', file], (path) => {
      const link = join(folder, 'link')
      symlinkSync(path, link)
      expect(JSON.parse(loopctl('status', '--json', link).stdout)).toMatchObject({ path, backingFile: file })
      expect(loopctl('partitions', link).stdout).toContain(`${path}p1`)
      for (const words of [
        ['detach', `${path}p1`],
        ['status', `${path}p2`],
        ['partitions', `${path}p1`],
      ]) {
        const { status, stderr } = loopctl(...words)
        expect(status, words.join(' ')).toBe(2)
        expect(stderr).toContain(`${words[1]} is a partition: name its device, ${path}.`)
      }
      const partitionLink = join(folder, 'partition')
      symlinkSync(`${path}p1`, partitionLink)
      expect(loopctl('detach', partitionLink)).toMatchObject({
        status: 2,
        stderr: expect.stringContaining(`is a partition: its device is ${path}`) as string,
      })
      expect(loopctl('detach', '/dev/null').status).toBe(2)
      expect(loopctl('detach', join(folder, 'nothing')).status).toBe(2)
    })
  })
})

describe('a file that was deleted and made again', () => {
  test('list and detach --file tell which device the former one is attached to', ({ image }) => {
    const file = image('build.img')
    attached([file], (path, number) => {
      rmSync(file)
      for (const again of [false, true]) {
        if (again) image('build.img')
        for (const words of [
          ['list', file],
          ['detach', '--file', file],
        ]) {
          const { status, stdout, stderr } = loopctl(...words)
          // Nothing to be listed is an answer; nothing to be detached is not what was asked for.
          const expected = again && words[0] === 'list' ? 0 : 1
          expect({ status, stdout }, words.join(' ')).toEqual({ status: expected, stdout: '' })
          expect(stderr).toContain(
            `${path} is attached to a deleted file of that name, ${file}: loopctl detach ${number}`,
          )
        }
      }
      expect(sysfs(number, 'loop/backing_file')).toBe(`${file} (deleted)`)
    })
  })
})

test('a file name that is no UTF-8', ({ folder, image }) => {
  const file = partitioned(image('disk', 8 * MiB))
  const script =
    'mv "$1" "$2/$(printf "b\\\\377.img")" && cd "$2" && for c in partitions "attach -r" list "detach --file"; do "$3" "$4" $c "$(printf "b\\\\377.img")" || exit 1; done'
  const output = execFileSync('sh', ['-c', script, 'sh', file, folder, process.execPath, join(process.cwd(), MAIN)], {
    encoding: 'utf8',
  })
  expect(output).toContain('the root')
  expect(output).toMatch(/^\/dev\/loop\d+\n/m)
  expect(output).toMatch(/read-only +\S+\/b\uFFFD\.img$/m)
})
