/** device.lock(): flock(2) on the device, as udev wants it; /proc/locks is the witness. */

import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync, readFileSync, statSync } from 'node:fs'
import { beforeEach, describe, expect, onTestFinished, vi } from 'vitest'
import { attach, open } from '../../lib/index.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import { env, needs, needsKernel } from '../needs.ts'
import { failure, test } from '../kernel/support.ts'
import { limit, times } from '../scale.ts'
import { expectDetached } from './support.ts'

/** Whether another process could not have the lock. */
function isLocked(path: string): boolean {
  return spawnSync('flock', ['--nonblock', '--exclusive', path, 'true']).status !== 0
}

/** Where udev runs, it has the lock for a moment to look at the device. */
async function expectUnlocked(path: string, message?: string): Promise<void> {
  await vi.waitFor(() => expect(isLocked(path), message).toBe(false), { timeout: limit(5_000) })
}

beforeEach(() => needs('flock'))

describe('the lock', () => {
  test('is there until it is released, and keeps nobody from the device', async ({ image }) => {
    await using device = await attach(image('disk'))
    await expectUnlocked(device.path)
    const lock = await device.lock()
    expect(isLocked(device.path)).toBe(true)
    const { ino } = statSync(device.path)
    expect(readFileSync('/proc/locks', 'utf8')).toMatch(new RegExp(`FLOCK .* WRITE ${process.pid} .*:${ino} `))
    expect(await device.lock()).toBe(lock)
    execFileSync('mkfs.ext4', ['-q', device.path], { env })

    await lock.release()
    await expectUnlocked(device.path)
    await lock.release()
    {
      await using again = await device.lock()
      expect(again).not.toBe(lock)
      expect(isLocked(device.path)).toBe(true)
    }
    await expectUnlocked(device.path)
  })

  test('ends with detach, with release, and with close', async ({ image }) => {
    const file = image('disk')
    for (const end of ['detach', 'release', 'close'] as const) {
      const device = await attach(file, { lock: true })
      const other = await open(device.number)
      expect(isLocked(device.path)).toBe(true)
      const lock = await device.lock()
      await (end === 'detach' ? device.detach({ lazy: true }) : device[end]())
      await expectUnlocked(device.path, end)
      await lock.release()
      await other.detach()
      expectDetached(file)
    }
  })

  test('of another process is waited for, until the time is up or the caller gives up', async ({ image }) => {
    await using device = await attach(image('disk'))
    const child = spawn('flock', ['--exclusive', device.path, 'sh', '-c', 'echo ready; exec cat'], {
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    onTestFinished(() => void child.kill('SIGKILL'))
    const exit = once(child, 'exit')
    await once(child.stdout, 'data')
    const error = await failure('timeout', () => device.lock({ timeout: 30 }))
    expect(error).toMatchObject({ code: 'ETIMEDOUT', syscall: 'flock', path: device.path })
    await failure('timeout', () => device.lock({ timeout: 0 }))
    const reason = new Error('enough')
    await expect(device.lock({ signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    // Other operations pass while it waits.
    const waiting = device.lock()
    expect((await device.status()).attached).toBe(true)
    child.stdin.end()
    await exit
    const lock = await waiting
    expect(isLocked(device.path)).toBe(true)
    await lock.release()
  })

  test('attach with lock: it is there before the device is configured, and all the time after', async ({ image }) => {
    const file = image('disk')
    await using before = await attach(file)
    const { number, path } = before
    await before.detach()
    // Once step by step, and once in one hop, which is what the second attach of a process is.
    for (const inSequences of [false, true]) {
      const locked: Record<string, boolean> = {}
      observe(
        (call) => {
          if (['loopConfigure', 'close', 'blkGetDiskSeq'].includes(call)) locked[call] = isLocked(path)
        },
        { inSequences },
      )
      onTestFinished(() => observe(undefined))
      const device = await attach(file, { number, lock: true })
      observe(undefined)
      expect(locked).toMatchObject({ loopConfigure: true, close: true })
      expect(isLocked(path)).toBe(true)
      expect(await device.detach()).toBe('detached')
      await expectUnlocked(path)
    }
  })

  test('a detach that fails does not lose it', async ({ image }) => {
    await using device = await attach(image('disk'), { lock: true })
    const lock = await device.lock()
    const fd = openSync(device.path, 'r')
    await failure('in-use', () => device.detach({ timeout: 20 }))
    expect(isLocked(device.path)).toBe(true)
    expect(await device.lock()).toBe(lock)
    closeSync(fd)
    await lock.release()
    await expectUnlocked(device.path)
    expect(await device.detach()).toBe('detached')
  })

  test('attach with lock: another process has it: undone; the command with --lock', async ({ image }) => {
    const file = image('disk')
    const command = new URL('../../dist/cli/main.js', import.meta.url).pathname
    const script = 'flock --nonblock --exclusive "$LOOP_DEVICE" true && echo free || echo locked'
    for (const [words, said] of [
      [[], 'free'],
      [['--lock'], 'locked'],
    ] as const) {
      const run = [command, 'run', ...words, file, '--', 'sh', '-c', script]
      expect(execFileSync(process.execPath, run, { encoding: 'utf8' }).trim()).toBe(said)
    }
    await expect(attach(file, { lock: 1 as never })).rejects.toBeInstanceOf(TypeError)
    await expect((await attach(file, { lock: true })).detach()).resolves.toBe('detached')
  })
})

test('mkfs under the lock is never disturbed', { timeout: 600_000 }, async ({ image }) => {
  needsKernel('udev')
  const file = image('disk', 16 << 20)
  for (let i = 0; i < times(200); i++) {
    await using device = await attach(file, { lock: true })
    execFileSync('mkfs.ext4', ['-q', '-F', device.path], { env })
    // Nobody else has it open: udev would.
    expect((await device.holders()).filter(({ kind }) => kind === 'process')).toEqual([])
    await device.detach()
  }
})
