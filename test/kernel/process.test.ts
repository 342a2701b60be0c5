import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { describe, expect } from 'vitest'
import { attach, find } from '../../lib/index.ts'
import { limit } from '../scale.ts'
import { sysfs, test } from './support.ts'

const LONG = { timeout: limit(60_000) }

function fixture(name: string): string {
  return fileURLToPath(new URL(`fixtures/${name}`, import.meta.url))
}

describe('a process with devices', () => {
  test('garbage collection takes no owned device, and closes an opened handle with one warning', async ({ image }) => {
    const output = execFileSync(process.execPath, ['--expose-gc', fixture('forgotten.mjs'), image('disk')], {
      encoding: 'utf8',
    })
    const result = JSON.parse(output) as { number: number; warnings: { code: string; message: string }[] }
    expect(result).toMatchObject({ afterOwned: 1, opened: 2, afterOpened: 1 })
    expect(result.warnings).toEqual([
      { code: 'LOOPCTL_HANDLE_NOT_CLOSED', message: expect.stringContaining(`/dev/loop${result.number}`) as string },
    ])
  })

  test('a terminated worker thread leaks nothing and crashes nothing', LONG, async ({ image }) => {
    const images = Array.from({ length: 6 }, (_, i) => image(`disk${i}`, 65_536, i + 1))
    const output = execFileSync(process.execPath, [fixture('terminated-worker.mjs'), '25', ...images], {
      encoding: 'utf8',
    })
    const { before, after } = JSON.parse(output) as { before: number; after: number }
    expect(after).toBe(before)
    for (const file of images) expect(await find(file)).toEqual([])
  })

  test.for(['ended', 'terminated'])(
    'what a worker thread attached goes when it has %s',
    LONG,
    async (how, { image }) => {
      const file = image('disk')
      const output = execFileSync(process.execPath, [fixture('worker-ends.mjs'), how, file], { encoding: 'utf8' })
      expect(JSON.parse(output)).toEqual({ attached: false, open: [], warnings: [] })
      expect(await find(file)).toEqual([])
    },
  )

  test('what is attached goes with the process, however that ends', async ({ image }) => {
    for (const [end, autoclear, left] of [
      ['process.exit(0)', true, false],
      ["process.kill(process.pid, 'SIGKILL')", true, false],
      ["throw new Error('crash')", true, false],
      ['process.exit(0)', false, true],
    ] as const) {
      const file = image(`disk${end.length}${autoclear}`)
      const script = `
        import { attach } from 'loopctl'
        const device = await attach(${JSON.stringify(file)}, { autoclear: ${autoclear} })
        process.stdout.write(String(device.number), () => { ${end} })`
      const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
        stdio: ['ignore', 'pipe', 'ignore'],
      })
      const [output] = (await once(child.stdout, 'data')) as [Buffer]
      if (child.exitCode === null && child.signalCode === null) await once(child, 'exit')
      const number = Number(output.toString())
      expect(existsSync(`/sys/block/loop${number}/loop`) && sysfs(number, 'loop/backing_file') === file, end).toBe(left)
      if (left) execFileSync('losetup', ['--detach', `/dev/loop${number}`])
    }
  })

  test('a child process inherits no descriptor of a device', async ({ image }) => {
    await using device = await attach(image('disk'))
    const listed = execFileSync('ls', ['-l', '/proc/self/fd'], { encoding: 'utf8' })
    expect(listed).not.toContain(device.path)
  })
})
