/** The end of a process, or of a worker thread, that has devices: nothing is left, and nobody is waited for too long. */

import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import { describe, expect, vi } from 'vitest'
import { needs, needsKernel } from '../needs.ts'
import { limit, times } from '../scale.ts'
import { attachedNumbers, isIn, loopDescriptors, sysfs, test as onDevices } from './support.ts'

const WAIT = { timeout: limit(10_000) }
const LEAVING = fileURLToPath(new URL('fixtures/leaving.mjs', import.meta.url))
const ATTACHING = fileURLToPath(new URL('fixtures/attaching.mjs', import.meta.url))

/** A filesystem whose server can be stopped. */
interface Served {
  /** A file of a MiB. */
  image: string
  stop: () => Promise<void>
  go: () => void
  kill: () => Promise<void>
}

const test = onDevices.extend<{ served: Served }>({
  served: async ({ folder }, use) => {
    needs('fuse2fs')
    needsKernel('fuse')
    const [disk, mounted] = [`${folder}/disk.img`, `${folder}/served`]
    writeFileSync(disk, Buffer.alloc(16 << 20))
    execFileSync('mkfs.ext4', ['-q', '-F', disk])
    mkdirSync(mounted)
    const server = spawn('fuse2fs', ['-f', '-o', 'fakeroot', disk, mounted], { stdio: 'ignore' })
    const gone = once(server, 'exit')
    const isServed = () => readFileSync('/proc/self/mountinfo', 'utf8').includes(` ${mounted} `)
    await vi.waitFor(() => expect(isServed()).toBe(true), WAIT)
    try {
      const image = `${mounted}/image`
      writeFileSync(image, Buffer.alloc(1 << 20))
      await use({
        image,
        stop: async () => {
          server.kill('SIGSTOP')
          await vi.waitFor(() => expect(statesOf(server.pid)).toEqual(new Set(['T'])), WAIT)
        },
        go: () => server.kill('SIGCONT'),
        kill: async () => {
          server.kill('SIGKILL')
          await gone
        },
      })
    } finally {
      server.kill('SIGCONT')
      execFileSync('umount', ['-l', mounted])
      server.kill('SIGKILL')
      await gone
    }
  },
})

/** The states of the threads of a process, as procfs has them. */
function statesOf(pid: number | undefined): Set<string | undefined> {
  const tasks = `/proc/${pid}/task`
  return new Set(readdirSync(tasks).map((task) => /\) (\w)/.exec(readFileSync(`${tasks}/${task}/stat`, 'utf8'))?.[1]))
}

describe('an exit handler, while the server of the file is stopped', () => {
  for (const end of ['goes on', 'is killed'] as const) {
    for (const how of ['detachSync', 'dispose', 'in a worker', 'setStatus', 'refreshCapacity']) {
      test(`${how}: the process ends, and the device goes when the server ${end}`, async ({ served }) => {
        const child = spawn(process.execPath, [LEAVING, served.image, how], { stdio: ['pipe', 'pipe', 'inherit'] })
        try {
          const lines = createInterface({ input: child.stdout })
          const [device] = (await once(lines, 'line')) as [string]
          const number = Number(device.slice('/dev/loop'.length))
          const isAttached = () => sysfs(number, 'loop/backing_file') === served.image
          expect(isAttached()).toBe(true)
          await served.stop()
          const [said, exited] = [once(lines, 'line'), once(child, 'exit')]
          child.stdin.write('leave\n')
          // All of it before the server goes on.
          expect(JSON.parse(String((await said)[0]))).toEqual({
            ...(how !== 'dispose' && { result: 'deferred' }),
            fd: -1,
            warnings: ['data-lost'],
          })
          expect(await exited).toEqual([3, null])
          if (end === 'goes on') served.go()
          else await served.kill()
          await vi.waitFor(() => expect(isAttached()).toBe(false), WAIT)
        } finally {
          child.kill('SIGKILL')
        }
      })
    }
  }
})

describe('a worker thread that is terminated while it attaches and detaches', () => {
  test('leaves no descriptor, and no device', async ({ folder, image }) => {
    const before = loopDescriptors()
    for (let round = 0; round < times(8); round++) {
      const workers = [0, 1].map((i) => {
        const files = [0, 1, 2, 3].map((k) => image(`disk ${round} ${i} ${k}`))
        return new Worker(ATTACHING, { workerData: files })
      })
      const ended = workers.map(async (worker) => {
        let attached = 0
        await new Promise<void>((resolve, reject) => {
          worker.once('error', reject)
          // Each at another moment of its work.
          worker.on('message', () => {
            if (++attached === 3 + round) resolve()
          })
        })
        await worker.terminate()
      })
      await Promise.all(ended)
      expect(loopDescriptors()).toEqual(before)
      const left = attachedNumbers().map((number) => sysfs(number, 'loop/backing_file'))
      expect(left.filter((file) => isIn(folder, file))).toEqual([])
    }
  })
})
