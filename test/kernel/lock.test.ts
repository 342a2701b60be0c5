import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { describe, expect, vi } from 'vitest'
import { attach } from '../../lib/index.ts'
import { sysfs, test } from './support.ts'
import { limit, times } from '../scale.ts'

/** Another program that has the lock, and does not let go of it. */
async function holdLock(): Promise<ChildProcess> {
  const child = spawn('flock', ['/dev/loop-control', 'sh', '-c', 'echo locked; read line'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  await once(child.stdout, 'data')
  return child
}

async function end(child: ChildProcess): Promise<void> {
  child.stdin?.end('\n')
  await once(child, 'exit')
}

describe('the lock on /dev/loop-control', () => {
  test('is not waited for without end', async ({ image }) => {
    const holder = await holdLock()
    try {
      const files = [image('one'), image('two'), image('three')]
      const devices = await Promise.all(files.map((file) => attach(file)))
      for (const [i, device] of devices.entries()) {
        expect(sysfs(device.number, 'loop/backing_file')).toBe(files[i])
        await device.detach()
      }
      // One try is one try, which is another program's where that was offered the same device.
      const file = image('four')
      const device = await vi.waitFor(() => attach(file, { timeout: 0 }), { timeout: limit(5_000), interval: 5 })
      await device.detach()
    } finally {
      await end(holder)
    }
  })

  test('is let go after the attach, also after one that failed', async ({ image }) => {
    await using device = await attach(image('disk'))
    await expect(attach(image('other'), { number: device.number })).rejects.toThrow('EBUSY')
    await end(await holdLock())
  })

  test('without it, of several processes that attach one file at once exactly one stays', async ({ image }) => {
    const holder = await holdLock()
    try {
      for (let round = 0; round < Math.min(5, times(20)); round++) {
        const file = image(`disk${round}`)
        const rivals = await Promise.all(
          Array.from({ length: 6 }, async () => {
            const rival = fileURLToPath(new URL('fixtures/rival.mjs', import.meta.url))
            const child = spawn(process.execPath, [rival, file], { stdio: ['pipe', 'pipe', 'inherit', 'pipe'] })
            await once(child, 'spawn')
            return child
          }),
        )
        const answers = rivals.map(async ({ stdout }) => (stdout ? String((await once(stdout, 'data'))[0]).trim() : ''))
        for (const child of rivals) child.stdin?.end()
        const said = await Promise.all(answers)
        expect(said.filter((answer) => answer.startsWith('attached')).length, said.join(', ')).toBe(1)
        expect(said.filter((answer) => answer === 'overlap').length, said.join(', ')).toBe(5)
        await Promise.all(
          rivals.map(async (child) => {
            child.stdio[3]?.destroy()
            if (child.exitCode === null) await once(child, 'exit')
          }),
        )
      }
    } finally {
      await end(holder)
    }
  })
})
