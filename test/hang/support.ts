/** `test` with a server of its own, after which nothing may be left: no device, no descriptor, no thread. */

import { mkdtempSync, readdirSync, readlinkSync, realpathSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test as base, expect, inject, vi } from 'vitest'
import { binding } from '../../lib/kernel/binding.ts'
import { needs, needsKernel } from '../needs.ts'
import { attachedNumbers, isIn, sysfs } from '../kernel/support.ts'
import { limit } from '../scale.ts'
import { Server } from './server.ts'

const WAIT = { timeout: limit(10_000) }

/** Devices attached to files in the folder, and descriptors of this process on such files and devices. */
function leftIn(folder: string): string[] {
  const devices = attachedNumbers()
    .filter((number) => isIn(folder, sysfs(number, 'loop/backing_file')))
    .map((number) => `/dev/loop${number}`)
  const descriptors = readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${fd}`)
      return target.startsWith(`${folder}/`) || devices.includes(target) ? [`${fd} -> ${target}`] : []
    } catch {
      return []
    }
  })
  return [...devices, ...descriptors]
}

const withServer = base.extend<{ folder: string; server: Server }>({
  // oxlint-disable-next-line no-empty-pattern -- vitest reads the fixtures' names off the pattern
  folder: async ({}, use) => {
    needs('python3')
    needsKernel('fuse')
    const folder = realpathSync(mkdtempSync(join(tmpdir(), 'loopctl-test-')))
    await use(folder)
    rmSync(folder, { recursive: true, force: true })
  },
  server: async ({ folder }, use) => {
    const server = await Server.start(`${folder}/served`)
    try {
      await use(server)
      await server.recover()
      await vi.waitFor(() => expect(leftIn(folder)).toEqual([]), WAIT)
    } finally {
      await server.end()
    }
  },
})

/** `test` for real devices, under a server that a test may stop. */
export const test: typeof withServer = inject('noKernel') === '' ? withServer : (withServer.skip as typeof withServer)

/** Of calls that were given up on none is under way any more, once the servers have gone on. */
export async function expectNoCallLeft(): Promise<void> {
  await vi.waitFor(() => expect(binding().workersSync()).toMatchObject({ givenUp: 0, working: 0, queued: 0 }), WAIT)
}
