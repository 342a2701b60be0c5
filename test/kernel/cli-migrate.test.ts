import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync, readlinkSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { find, open } from '../../lib/index.ts'
import { sysfs, test } from './support.ts'

const MAIN = 'dist/cli/main.js'

function loopctl(...words: string[]): { status: number | null; stdout: string; stderr: string } {
  return spawnSync(process.execPath, [MAIN, ...words], { encoding: 'utf8' })
}

/** Attached through the command, and so still there for the next one. */
async function attached(words: string[], use: (path: string, number: number) => unknown): Promise<void> {
  const path = execFileSync(process.execPath, [MAIN, 'attach', '--read-only', ...words], { encoding: 'utf8' }).trim()
  const number = Number(path.slice('/dev/loop'.length))
  try {
    await use(path, number)
  } finally {
    const device = await open(number)
    await device.detach()
  }
}

describe('loopctl migrate', () => {
  test('says nothing, moves the file, and with --json tells what it did', async ({ folder, image }) => {
    const file = image('disk', 1 << 20, 7)
    const first = join(folder, 'first')
    const second = join(folder, 'second')
    await attached([file], (path, number) => {
      expect(loopctl('migrate', path, first)).toMatchObject({ status: 0, stdout: '', stderr: '' })
      expect(sysfs(number, 'loop/backing_file')).toBe(first)
      expect(readFileSync(first).equals(readFileSync(file))).toBe(true)
      const { status, stdout } = loopctl('migrate', '--json', '--no-verify', '--no-sparse', String(number), second)
      expect(status).toBe(0)
      expect(JSON.parse(stdout)).toMatchObject({ destination: second, bytesCopied: 1 << 20, verified: false })
      expect(sysfs(number, 'loop/backing_file')).toBe(second)
    })
  })

  test('refuses a destination that exists; --overwrite replaces it', async ({ image }) => {
    const file = image('disk', 65_536, 7)
    const other = image('other', 512, 1)
    await attached([file], (path, number) => {
      const refused = loopctl('migrate', path, other)
      expect(refused.status).toBe(1)
      expect(refused.stderr).toMatch(/^loopctl: EEXIST: .*\nhint: .*\n$/)
      expect(readFileSync(other)[0]).toBe(1)
      expect(loopctl('migrate', '--overwrite', path, other).status).toBe(0)
      expect(sysfs(number, 'loop/backing_file')).toBe(other)
      expect(readFileSync(other)[0]).toBe(7)
    })
  })

  test('draws a bar on a terminal, and only there', async ({ folder, image }) => {
    const file = image('disk', 8 << 20, 7)
    await attached([file], (path) => {
      const words = [process.execPath, MAIN, 'migrate', path, join(folder, 'copy')].join(' ')
      const output = execFileSync('script', ['--quiet', '--return', '--command', words, '/dev/null'], {
        encoding: 'utf8',
        stdio: ['ignore', 'pipe', 'inherit'],
      })
      expect(output).toMatch(/\w+ +\[[=-]+\] \d+% \d+ MiB/)
    })
  })

  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    test(`${signal} undoes it: exit 130, no copy, no draft, the device as before`, async ({ folder, image }) => {
      const file = image('disk', 256 << 20, 7)
      const copy = join(folder, 'copy')
      await attached([file], async (path, number) => {
        const child = spawn(process.execPath, [MAIN, 'migrate', path, copy], { stdio: ['ignore', 'pipe', 'pipe'] })
        const exit = once(child, 'exit')
        // it has its copy open, which has no name: it is at work
        const working = () => filesOf(child.pid).some((each) => each.startsWith(`${folder}/#`))
        while (!working() && child.exitCode === null) await new Promise(setImmediate)
        child.kill(signal)
        expect(await exit).toEqual([130, null])
        expect(readdirSync(folder)).toEqual(['disk'])
        expect(sysfs(number, 'loop/backing_file')).toBe(file)
      })
    })
  }

  test('--timeout and --overlap: given up in time, and what another device has is not replaced', async ({
    folder,
    image,
  }) => {
    const file = image('disk', 64 << 20, 7)
    const copy = join(folder, 'copy')
    await attached([file], (path, number) => {
      const late = loopctl('migrate', '--timeout', '1', path, copy)
      expect(late.status).toBe(1)
      expect(late.stderr).toContain('ETIMEDOUT')
      expect(readdirSync(folder)).toEqual(['disk'])
      writeFileSync(copy, 'old')
      execFileSync('truncate', ['--size=1M', copy])
      const other = execFileSync('losetup', ['--find', '--show', copy], { encoding: 'utf8' }).trim()
      try {
        const refused = loopctl('migrate', '--overwrite', path, copy)
        expect(refused.status).toBe(1)
        expect(refused.stderr).toContain(other)
        expect(sysfs(number, 'loop/backing_file')).toBe(file)
        expect(loopctl('migrate', '--overwrite', '--overlap', 'allow', path, copy)).toMatchObject({ status: 0 })
        expect(sysfs(number, 'loop/backing_file')).toBe(copy)
      } finally {
        execFileSync('losetup', ['--detach', other])
      }
    })
  })
})

/** What a process has open, as far as it lives. */
function filesOf(pid: number | undefined): string[] {
  try {
    return readdirSync(`/proc/${pid}/fd`).map((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`))
  } catch {
    return []
  }
}

describe('loopctl attach --swappable', () => {
  test('makes a stack that a later process finds, and list explains', async ({ folder, image }) => {
    const file = image('disk', 16 << 20)
    truncateSync(file, 16 << 20)
    execFileSync('mkfs.ext4', ['-q', file])
    const copy = join(folder, 'copy')
    const mountPoint = join(folder, 'mnt')
    execFileSync('mkdir', [mountPoint])
    await attached(['--swappable', file], (path, number) => {
      execFileSync('mount', ['-o', 'ro', path, mountPoint])
      try {
        const { stdout } = loopctl('list')
        const [lower] = (JSON.parse(loopctl('list', '--json', file).stdout) as { number: number }[]).map(
          (i) => i.number,
        )
        expect(stdout).toContain(`/dev/loop${lower} -> ${file}`)
        expect(loopctl('migrate', path, copy)).toMatchObject({ status: 0, stderr: '' })
        expect(sysfs(lower ?? -1, 'loop/backing_file')).toBe(copy)
        expect(sysfs(number, 'loop/backing_file')).toBe(`/dev/loop${lower}`)
        writeFileSync('/proc/sys/vm/drop_caches', '3')
        expect(readdirSync(mountPoint)).toContain('lost+found')
        expect(JSON.parse(loopctl('status', '--json', path).stdout)).toMatchObject({ swappable: true, lower })
      } finally {
        execFileSync('umount', [mountPoint])
      }
    })
    expect(await find(copy)).toEqual([])
    expect(existsSync(file)).toBe(true)
  })

  test('detach --file takes the whole stack', async ({ image }) => {
    const file = image('disk')
    expect(loopctl('attach', '--read-only', '--swappable', file).status).toBe(0)
    expect(loopctl('detach', '--file', file)).toMatchObject({ status: 0, stderr: '' })
    expect(await find(file)).toEqual([])
  })

  test('without --read-only is wrong usage', async ({ image }) => {
    expect(loopctl('attach', '--swappable', image('disk'))).toMatchObject({ status: 2, stdout: '' })
  })
})
