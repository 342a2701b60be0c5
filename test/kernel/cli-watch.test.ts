import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { describe, expect, onTestFinished, vi } from 'vitest'
import { attach, type LoopDevice, type LoopEvent } from '../../lib/index.ts'
import { test } from './support.ts'

const MAIN = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url))

interface Started {
  child: ChildProcess
  said: () => string
  /** The exit code and what is on stderr. */
  ended: Promise<[number | null, string]>
}

function start(...words: string[]): Started {
  const child = spawn(process.execPath, [MAIN, 'watch', ...words], { stdio: ['ignore', 'pipe', 'pipe'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  const texts = { stdout: '', stderr: '' }
  child.stdout.on('data', (chunk: Buffer) => (texts.stdout += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (texts.stderr += chunk.toString()))
  const ended = once(child, 'close').then(([code]): [number | null, string] => [code as number | null, texts.stderr])
  return { child, said: () => texts.stdout, ended }
}

function eventually<T>(look: () => T): Promise<T> {
  return vi.waitFor(look, { timeout: 15_000, interval: 5 })
}

/** It says nothing when it begins: something is changed until it tells. */
async function watching({ said }: Started, device: LoopDevice): Promise<void> {
  for (let i = 1; !said().includes(device.path); i++) await device.setStatus({ sizeLimit: (i % 64) * 512 })
}

describe('loopctl watch', () => {
  test('a line each, and Ctrl-C ends it with 130', async ({ image }) => {
    const file = image('a\nb')
    await using other = await attach(image('other'))
    const started = start()
    await watching(started, other)
    const device = await attach(file)
    const shown = file.replace('\n', '\\x0a')
    const line = (type: string) => `${type}  ${device.path}  ${1 << 20}  ${shown}\n`
    await eventually(() => expect(started.said()).toContain(line('attach')))
    await device.detach()
    await eventually(() => expect(started.said()).toContain(line('detach')))
    expect(started.said()).toContain(`resize  ${other.path}  `)
    started.child.kill('SIGINT')
    expect(await started.ended).toEqual([130, ''])
  })

  test('--json: an event a line', async ({ image }) => {
    const file = image('disk')
    await using other = await attach(image('other'))
    const started = start('--json')
    await watching(started, other)
    const device = await attach(file)
    const { number } = device
    const events = () =>
      started
        .said()
        .split('\n')
        .slice(0, -1)
        .map((line) => JSON.parse(line) as LoopEvent)
    // The number can be another program's before and afterwards.
    const own = (type: string) =>
      events().filter((event) => event.type === type && 'info' in event && event.info.backingFile === file)
    const attached = { type: 'attach', number, info: { backingFile: file, size: 1 << 20, attached: true } }
    await eventually(() => expect(own('attach')).toHaveLength(1))
    expect(own('attach')[0]).toMatchObject(attached)
    await device.detach()
    await eventually(() => expect(own('detach')).toHaveLength(1))
    started.child.kill('SIGTERM')
    expect(await started.ended).toEqual([130, ''])
  })

  test('ends without a word when nobody reads any more', async ({ image }) => {
    await using other = await attach(image('other'))
    const started = start()
    await watching(started, other)
    started.child.stdout?.destroy()
    const over = new AbortController()
    void started.ended.then(() => over.abort())
    for (let i = 1; !over.signal.aborted; i++) await other.setStatus({ sizeLimit: (i % 64) * 512 })
    expect(await started.ended).toEqual([0, ''])
  })

  test('where the kernel sends nothing it says so first', async () => {
    const child = spawn('unshare', ['--user', '--map-root-user', '--net', process.execPath, MAIN, 'watch'])
    onTestFinished(() => void child.kill('SIGKILL'))
    const [first] = (await once(child.stdout, 'data')) as [Buffer]
    expect(first.toString()).toMatch(/^resync {2}no-netlink {2}\d+ devices\n$/)
  })
})
