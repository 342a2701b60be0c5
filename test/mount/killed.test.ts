/** Killed in the middle of mounting: the whole is there, or nothing. */

import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { describe, expect, vi } from 'vitest'
import { limit, times } from '../scale.ts'
import { attachedNumbers, sysfs } from '../kernel/support.ts'
import { makeFilesystem, mountsUnder, test } from './support.ts'

const FIXTURE = fileURLToPath(new URL('fixtures/mounter.mjs', import.meta.url))

describe('kill -9', () => {
  for (const phase of ['mount', 'hold', 'unmount']) {
    test(`while it says "${phase}"`, { timeout: limit(120_000) }, async ({ folder, place }) => {
      const image = join(folder, 'image')
      makeFilesystem('ext4', image)
      const devices = () => attachedNumbers().filter((number) => sysfs(number, 'loop/backing_file') === image)
      for (let round = 0; round < times(15); round++) {
        const child = spawn(process.execPath, [FIXTURE, image, place], { stdio: ['ignore', 'pipe', 'inherit'] })
        const exit = once(child, 'exit')
        let said = ''
        const reached = new Promise<void>((resolve) => {
          child.stdout.on('data', (chunk: Buffer) => {
            said += String(chunk)
            // Not in the first round of its own, which is slower.
            if (said.split(`${phase}\n`).length > 3) resolve()
          })
        })
        await reached
        // A moment that differs from round to round is what is wanted here.
        await setTimeout(round / 5)
        child.kill('SIGKILL')
        await exit

        const listed = mountsUnder(place)
        if (listed.length > 0) {
          expect(listed).toMatchObject([{ target: place, fstype: 'ext4' }])
          expect(devices().map((number) => `/dev/loop${number}`)).toEqual([listed[0]?.source])
          expect(readdirSync(place)).toEqual(['lost+found'])
          // All that is left to be done, and it takes the device along.
          execFileSync('umount', [place])
        }
        await vi.waitFor(() => expect(devices()).toEqual([]), { timeout: limit(5_000) })
        expect(readdirSync(place)).toEqual([])
      }
      execFileSync('e2fsck', ['-p', image], { stdio: 'ignore' })
    })
  }
})
