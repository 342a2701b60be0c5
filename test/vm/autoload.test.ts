/** The loop driver as a module that is not loaded: only in a guest of scripts/vm-test, whose module can be taken out. */

import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { release } from 'node:os'
import { fileURLToPath } from 'node:url'
import { beforeEach, describe, expect, onTestFinished, test } from 'vitest'

const MAIN = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url))
const MODULES = `/lib/modules/${release()}`

/** In a process of its own, as the first that wants a device. */
function loopctl(...words: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [MAIN, ...words], { encoding: 'utf8' })
  return { status, stdout, stderr }
}

function makeImage(): string {
  const folder = mkdtempSync('/tmp/loopctl-autoload-')
  onTestFinished(() => rmSync(folder, { recursive: true }))
  const file = `${folder}/image`
  writeFileSync(file, 'what the image begins with'.padEnd(4096, '\0'))
  return file
}

beforeEach(() => {
  execFileSync('modprobe', ['--remove', 'loop'])
  expect(existsSync('/sys/module/loop')).toBe(false)
  expect(existsSync('/sys/block/loop0')).toBe(false)
  // The static node, as systemd makes it at boot of what the module says of itself
  const control = statSync('/dev/loop-control')
  expect(control.isCharacterDevice() && control.rdev === 10 * 256 + 237).toBe(true)
})

describe('loop is a module that is not loaded', () => {
  test('the first attach loads it, and works', () => {
    const { status, stdout, stderr } = loopctl('attach', makeImage())
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    const path = stdout.trim()
    expect(existsSync('/sys/module/loop')).toBe(true)
    expect(readFileSync(path).subarray(0, 26).toString()).toBe('what the image begins with')
    expect(loopctl('detach', path)).toEqual({ status: 0, stdout: 'detached\n', stderr: '' })
    expect(existsSync(`/sys/block/${path.slice('/dev/'.length)}/loop`)).toBe(false)
  })

  test('so does doctor, which says what it is', () => {
    const { checks } = JSON.parse(loopctl('doctor', '--json').stdout) as { checks: unknown[] }
    // Whether the rest of it is in time is another matter, where a guest is emulated
    expect(checks).toContainEqual({ name: 'loop driver', status: 'ok', message: 'a module, loaded' })
    expect(existsSync('/sys/module/loop')).toBe(true)
  })
})

describe('there is no such module', () => {
  beforeEach(() => {
    execFileSync('mount', ['-t', 'tmpfs', 'none', MODULES])
    onTestFinished(() => void execFileSync('umount', [MODULES]))
  })

  test('attach: no-loop-driver', () => {
    const { status, stderr } = loopctl('attach', '--json', makeImage())
    expect(status).toBe(1)
    expect(JSON.parse(stderr)).toMatchObject({ error: { reason: 'no-loop-driver', path: '/dev/loop-control' } })
    expect(existsSync('/sys/module/loop')).toBe(false)
  })

  test('doctor: the driver is absent, and what to do', () => {
    const { status, stdout } = loopctl('doctor', '--json')
    expect(status).toBe(1)
    const { canAttach, checks } = JSON.parse(stdout) as { canAttach: boolean; checks: Record<string, string>[] }
    expect(canAttach).toBe(false)
    expect(checks.find(({ name }) => name === 'loop driver')).toMatchObject({
      status: 'failure',
      message: 'absent',
      remedy: expect.stringContaining('modprobe') as string,
    })
  })
})
