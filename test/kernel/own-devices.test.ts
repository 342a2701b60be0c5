/** A run of the tests leaves no device that it has made, and removes no other. */

import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync } from 'node:fs'
import type { Readable, Writable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import { describe, expect, onTestFinished } from 'vitest'
import { attach, LoopControl } from '../../lib/index.ts'
import { removeDevice, sysfs, test, unusedNumber } from './support.ts'

const SCRIPT = fileURLToPath(new URL('../fixtures/devices.mjs', import.meta.url))
const BLOCK = 4

type Child = ChildProcessByStdio<Writable, Readable, Readable>

/** Makes `spares` devices, and one in the lowest block from `first` on that is not taken, of which there are two. */
async function start(first: number, spares: number): Promise<{ child: Child; said: string }> {
  const words = [first, first + 2 * BLOCK, BLOCK, spares, 200].map(String)
  const child = spawn(process.execPath, [SCRIPT, ...words], { stdio: ['pipe', 'pipe', 'pipe'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  const [said] = await Promise.race([once(child.stdout, 'data'), once(child.stderr, 'data')])
  return { child, said: String(said).trimEnd() }
}

async function end(child: Child): Promise<void> {
  const ended = once(child, 'close')
  child.stdin.end()
  child.stdout.resume()
  child.stderr.resume()
  await ended
}

/** Devices of the test's numbers. */
function devicesFrom(first: number): number[] {
  const numbers = readdirSync('/sys/block').flatMap((name) => Number(/^loop(\d+)$/.exec(name)?.[1] ?? []))
  return numbers.filter((number) => number >= first && number < first + 2 * BLOCK).toSorted((a, b) => a - b)
}

describe('the devices of a run', () => {
  test('are gone when the run is over, and nothing else is', async () => {
    const first = unusedNumber()
    await using control = await LoopControl.open()
    // Another program's, free
    const other = await control.add(first + 1)
    onTestFinished(() => removeDevice(other))
    const { child, said } = await start(first, 3)
    expect([first, first + BLOCK].map(String)).toContain(said)
    expect(devicesFrom(first)).toEqual([Number(said), other].toSorted((a, b) => a - b))
    await end(child)
    expect(devicesFrom(first)).toEqual([other])
  })

  test('two runs at once have different blocks, and a third finds none', async () => {
    const first = unusedNumber()
    const [one, two] = await Promise.all([start(first, 0), start(first, 0)])
    const blocks = [one, two].map(({ said }) => Number(said))
    expect(blocks.toSorted((a, b) => a - b)).toEqual([first, first + BLOCK])
    const third = await start(first, 0)
    expect(third.said).toContain('all 2 blocks of numbers are taken')
    await end(one.child)
    expect(devicesFrom(first)).toEqual([Number(two.said)])
    await end(two.child)
    expect(devicesFrom(first)).toEqual([])
  })

  test('one that another program has attached is left to it, and named', async ({ image }) => {
    const first = unusedNumber()
    const { child, said } = await start(first, 0)
    const number = Number(said)
    await using device = await attach(image('disk'), { number })
    onTestFinished(() => removeDevice(number))
    const warning = once(child.stderr, 'data')
    const ended = once(child, 'close')
    child.stdin.end()
    expect(String((await warning)[0])).toBe(`/dev/loop${number}, made for the tests, is left: it is in use\n`)
    expect(await ended).toEqual([0, null])
    expect(sysfs(number, 'loop/backing_file')).toMatch(/disk$/)
    await device.detach()
  })

  test('are gone too where the run is killed', async () => {
    const first = unusedNumber()
    // Another process holds the other end of stdin, and is killed.
    const script = `
      const { spawn } = require('node:child_process')
      const words = ${JSON.stringify([SCRIPT, first, first + 2 * BLOCK, BLOCK, 0, 200].map(String))}
      const child = spawn(process.execPath, words, { stdio: ['pipe', 'inherit', 'inherit'], detached: true })`
    const run = spawn(process.execPath, ['-e', script], { stdio: ['ignore', 'pipe', 'inherit'] })
    const [said] = await once(run.stdout, 'data')
    expect(existsSync(`/sys/block/loop${Number(String(said))}`)).toBe(true)
    // The pipe is closed when the other process has ended.
    const closed = once(run.stdout, 'close')
    run.kill('SIGKILL')
    await closed
    expect(devicesFrom(first)).toEqual([])
  })
})
