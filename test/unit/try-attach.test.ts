import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, onTestFinished, test, vi } from 'vitest'
import { LoopError } from '../../lib/index.ts'
import { gpt, mbr, SAMPLE_SIZE } from '../../lib/doctor/images.ts'
import { within } from '../../lib/doctor/try-attach.ts'
import { env, needs } from '../needs.ts'

describe('within', () => {
  beforeEach(() => void vi.useFakeTimers())
  afterEach(() => void vi.useRealTimers())

  test('what hangs ends with timeout, is aborted, and what comes late is undone', async () => {
    let finish: ((value: string) => void) | undefined
    let aborted = false
    const undo = vi.fn<(value: string) => Promise<void>>().mockResolvedValue()
    const result = within(
      'open /dev/x',
      (signal) => {
        signal.addEventListener('abort', () => void (aborted = true))
        return new Promise<string>((resolve) => void (finish = resolve))
      },
      undo,
    )
    const ended = expect(result).rejects.toSatisfy((error) => LoopError.is(error, 'timeout'))
    await vi.advanceTimersByTimeAsync(60_000)
    await ended
    expect({ aborted, undone: undo.mock.calls }).toEqual({ aborted: true, undone: [] })
    finish?.('late')
    await vi.runAllTimersAsync()
    expect(undo.mock.calls).toEqual([['late']])
  })

  test('what ends in time is what it is, and no timer is left', async () => {
    await expect(within('x', async () => 7)).resolves.toBe(7)
    await expect(within('x', () => Promise.reject(new Error('no')))).rejects.toThrow('no')
    expect(vi.getTimerCount()).toBe(0)
  })
})

describe('the samples', () => {
  test.each([
    ['dos', async () => mbr()],
    ['gpt', gpt],
  ] as const)('sfdisk reads the one partition of the %s image', async (label, make) => {
    needs('sfdisk')
    const folder = mkdtempSync(join(tmpdir(), 'loopctl-test-'))
    onTestFinished(() => rmSync(folder, { recursive: true }))
    const file = join(folder, 'disk.img')
    const image = await make()
    expect(image.length).toBe(SAMPLE_SIZE)
    writeFileSync(file, image)
    const { stdout, stderr } = spawnSync('sfdisk', ['--json', file], { encoding: 'utf8', env })
    const { partitiontable } = JSON.parse(stdout) as { partitiontable: Record<string, unknown> }
    expect(stderr).toBe('')
    expect(partitiontable).toMatchObject({ label, partitions: [{ start: 64, size: 64 }] })
    expect(spawnSync('sfdisk', ['--verify', file], { encoding: 'utf8', env }).status).toBe(0)
  })
})
