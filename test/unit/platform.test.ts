import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import * as loopctl from '../../lib/index.ts'
import * as ioctl from '../../lib/ioctl.ts'

interface Result {
  how: string
  isLoopError?: boolean
  reason?: string
  code?: string
  message?: string
}

function functionsOf(module: object): string[] {
  return Object.entries(module)
    .filter(([, member]) => typeof member === 'function')
    .map(([name]) => name)
}

const classes = new Set(['LoopControl', 'LoopDevice', 'LoopError'])
const publicFunctions = [
  ...functionsOf(loopctl).filter((name) => !classes.has(name) && name !== 'doctor'),
  ...functionsOf(ioctl),
  'LoopControl.open',
]

/** In a process of its own, which believes that it is on that platform from before the first import. */
function run(platform: string): { status: number | null; stderr: string; stdout: string } {
  const script = fileURLToPath(new URL('../kernel/fixtures/platform.mjs', import.meta.url))
  const { status, stderr, stdout } = spawnSync(process.execPath, [script, platform], { encoding: 'utf8' })
  return { status, stderr, stdout }
}

function failures(platform: string): [name: string, result: Result][] {
  const results = JSON.parse(run(platform).stdout) as Record<string, Result>
  return Object.entries(results).filter(([name]) => name !== 'doctor')
}

/** The one that does not fail. */
function doctorReport(platform: string): unknown {
  return (JSON.parse(run(platform).stdout) as { doctor: unknown }).doctor
}

describe.each(['darwin', 'win32'])('on %s', (platform) => {
  test('loopctl and loopctl/ioctl can be imported', () => {
    expect(run(platform)).toMatchObject({ status: 0, stderr: '' })
  })

  test('every public function fails with unsupported-platform, in the way that it fails', () => {
    const results = failures(platform)
    expect(results.map(([name]) => name).toSorted()).toEqual(publicFunctions.toSorted())
    for (const [name, result] of results) {
      expect(result, name).toEqual({
        how: name.endsWith('Sync') || name === 'watch' ? 'threw' : 'rejected',
        isLoopError: true,
        reason: 'unsupported-platform',
        code: 'ENOTSUP',
        message: `ENOTSUP: load: loop devices exist on Linux only, this is ${platform}`,
      })
    }
  })

  test('doctor reports it', () => {
    expect(doctorReport(platform)).toMatchObject({
      canAttach: false,
      checks: [{ name: 'platform', status: 'failure', message: expect.stringContaining(`this is ${platform}`) }],
    })
  })
})
