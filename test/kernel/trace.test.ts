/** What loopctl tells of its calls and decisions: the diagnostics channel `loopctl:call`, and NODE_DEBUG=loopctl. */

import { execFileSync, spawnSync } from 'node:child_process'
import { channel, subscribe, unsubscribe } from 'node:diagnostics_channel'
import { closeSync, openSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect } from 'vitest'
import { attach, type TraceMessage } from '../../lib/index.ts'
import { blkRoGetSync } from '../../lib/ioctl.ts'
import { failure, test } from './support.ts'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))

async function listen(work: () => Promise<unknown>): Promise<TraceMessage[]> {
  const heard: TraceMessage[] = []
  const onMessage = (message: unknown) => heard.push(message as TraceMessage)
  subscribe('loopctl:call', onMessage)
  try {
    await work()
  } finally {
    unsubscribe('loopctl:call', onMessage)
  }
  return heard
}

function callsOf(heard: readonly TraceMessage[]) {
  return heard.filter((message) => message.type === 'call')
}

function decisionsOf(heard: readonly TraceMessage[]): string[] {
  return heard.flatMap((message) => (message.type === 'decision' ? [message.text] : []))
}

describe('the channel', () => {
  test('carries each call of an attach with its arguments, answer and time', async ({ image }) => {
    const path = image('disk.img')
    let number = -1
    const heard = await listen(async () => {
      await using device = await attach(path, { reference: 'tag' })
      number = device.number
    })
    const calls = callsOf(heard)
    const opened = calls.find(({ call }) => call === 'openRegular')
    expect(opened).toMatchObject({ arguments: [path, 2], answer: expect.any(Number) })
    const configured = calls.find(({ call, answer }) => call === 'LOOP_CONFIGURE' && answer === 0)
    // The descriptors of the device and of the file.
    expect(configured?.arguments).toEqual([
      expect.any(Number),
      opened?.answer,
      expect.objectContaining({ offset: 0n, flags: 4, fileName: 'tag' }),
    ])
    expect(configured?.microseconds).toBeGreaterThan(0)
    expect(calls.find(({ call }) => call === 'LOOP_GET_STATUS64')?.arguments[1]).toMatchObject({ number })
    for (const { microseconds } of calls) expect(microseconds).toBeGreaterThanOrEqual(0)
  })

  test('an errno has its name', async ({ image }) => {
    const heard = await listen(async () => {
      const device = await attach(image('disk.img'))
      await device.detach()
    })
    // The second one tells that the device is going.
    const cleared = callsOf(heard).filter(({ call }) => call === 'LOOP_CLR_FD')
    // One more is made where another program has just opened the device.
    expect(cleared[0]).toMatchObject({ answer: 0 })
    expect(cleared[0]).not.toHaveProperty('code')
    expect(cleared.at(-1)).toMatchObject({ answer: -6, code: 'ENXIO' })
  })

  test('carries what was decided: one hop, and step by step after a surprise', async ({ image }) => {
    const path = image('disk.img')
    await using device = await attach(path)
    const other = openSync(device.path, 'r')
    const heard = await listen(() => failure('in-use', () => device.detach({ timeout: 0 })))
    closeSync(other)
    const decisions = decisionsOf(heard)
    expect(decisions).toContainEqual(expect.stringMatching(/^in one hop: .*Clear, Vacate$/))
    expect(decisions).toContainEqual('Clear: step by step')
    expect(decisions).toContainEqual(expect.stringMatching(/^in-use: EBUSY: LOOP_CLR_FD /))
  })

  test('carries synchronous calls, and those of loopctl/ioctl', async ({ image }) => {
    await using device = await attach(image('disk.img'))
    const heard = await listen(async () => blkRoGetSync(device.fd))
    expect(callsOf(heard)).toEqual([
      { type: 'call', call: 'BLKROGET', arguments: [device.fd], answer: 0, microseconds: expect.any(Number) },
    ])
  })

  test('nothing is told, and no text is made, where nobody listens', async ({ image }) => {
    expect(channel('loopctl:call').hasSubscribers).toBe(false)
    await using device = await attach(image('disk.img'))
    expect(device.fd).toBeGreaterThan(0)
  })
})

describe('NODE_DEBUG=loopctl', () => {
  const script = `
    import { attach } from '${join(ROOT, 'dist/index.js')}'
    const device = await attach(process.argv[1])
    await device.detach()`
  const run = (path: string, debug: string) =>
    spawnSync(process.execPath, ['--input-type=module', '-e', script, path], {
      env: { ...process.env, NODE_DEBUG: debug },
      encoding: 'utf8',
    })

  test('prints them, a line each, on stderr', ({ image }) => {
    const { status, stderr } = run(image('disk.img'), 'loopctl')
    expect(status).toBe(0)
    const lines = stderr.trim().split('\n')
    for (const line of lines) expect(line).toMatch(/^LOOPCTL \d+: (?:-> \S.*|\w.*\(.*\) = -?\w+ \([\d.]+ us\))$/)
    expect(stderr).toMatch(/: openRegular\(".*disk\.img", O_RDWR\) = \d+ \(/)
    expect(stderr).toMatch(/: LOOP_CONFIGURE\(\d+, \d+, \{ blockSize: 0, .* fileName: '' \}\) = 0 \(/)
    expect(stderr).toMatch(/: openLoop\(\d+, O_RDONLY\|O_EXCL\) = \d+ \(/)
    expect(stderr).toMatch(/: LOOP_CLR_FD\(\d+\) = -ENXIO \(/)
    expect(stderr).toMatch(/: -> in one hop: Exclusive, Flush, Clear, Vacate$/m)
  })

  test('of another name prints nothing', ({ image }) => {
    expect(run(image('disk.img'), 'fs')).toMatchObject({ status: 0, stderr: '' })
  })

  test('is heard by the command too', ({ folder }) => {
    const path = join(folder, 'made.img')
    const command = [join(ROOT, 'dist/cli/main.js'), 'create', path, '1M']
    const { status, stderr } = spawnSync(process.execPath, command, {
      env: { ...process.env, NODE_DEBUG: 'loopctl' },
      encoding: 'utf8',
    })
    expect(status).toBe(0)
    expect(stderr).toMatch(/^LOOPCTL \d+: /)
    expect(execFileSync('stat', ['-c', '%s', path], { encoding: 'utf8' }).trim()).toBe(String(1 << 20))
  })
})
