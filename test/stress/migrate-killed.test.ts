import { execFileSync } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { closeSync, copyFileSync, existsSync, openSync, readdirSync, rmSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach, open } from '../../lib/index.ts'
import { sysfs, test } from '../kernel/support.ts'
import { limit, times } from '../scale.ts'
import { killIn } from './victims.ts'

const PHASES = ['copy', 'flush', 'verify', 'switch']
const KILLS = times(200)
const AT_LEAST = Math.floor(KILLS / 10)
const SIZE = Math.min(256, times(1_600)) << 20

/** Data, no hole in it. */
function writeData(path: string): void {
  const chunk = randomFillSync(Buffer.alloc(8 << 20))
  const fd = openSync(path, 'w')
  for (let at = 0; at < SIZE; at += chunk.length) {
    chunk.writeBigUInt64LE(BigInt(at))
    writeSync(fd, chunk, 0, chunk.length, at)
  }
  closeSync(fd)
}

function assertSame(path: string, reference: string, when: string): void {
  expect(() => execFileSync('cmp', ['--silent', path, reference]), `${path} ${when}`).not.toThrow()
}

describe('kill -9 of a migrate', () => {
  test(
    `${KILLS} times: one complete file behind the device, nothing half written under the final name`,
    { timeout: limit(60_000 + times(900_000)) },
    async ({ folder }) => {
      const reference = join(folder, 'reference')
      writeData(reference)
      const places = [join(folder, 'a.img'), join(folder, 'b.img')] as [string, string]
      copyFileSync(reference, places[0])
      const attached = await attach(places[0], { readOnly: true })
      let [current, other] = places
      const kills: Record<string, number> = {}
      let switched = 0

      for (let round = 0, total = 0; total < KILLS; round++) {
        const phase = PHASES[round % PHASES.length] ?? 'copy'
        // mostly soon after the phase has begun, sometimes far into it
        const moments = Math.floor(Math.random() ** 3 * (phase === 'switch' ? 2_000 : 30_000))
        const died = await killIn('migrant.mjs', [String(attached.number), other], phase, moments)
        const when = `after a kill in ${died}`
        if (died !== undefined) {
          kills[died] = (kills[died] ?? 0) + 1
          total++
        }
        const backing = sysfs(attached.number, 'loop/backing_file') ?? ''
        expect([current, other], when).toContain(backing)
        if (existsSync(other)) assertSame(other, reference, when)
        if (backing === other) {
          ;[current, other] = [other, current]
          switched++
        }
        rmSync(other, { force: true })
        for (const name of readdirSync(folder)) {
          expect(name, when).toMatch(/^(?:reference|[ab]\.img|\.[ab]\.img\.loopctl-[0-9a-f]{12})$/)
          // Nobody else takes it away: its name says nothing of whose it is.
          if (name.startsWith('.')) rmSync(join(folder, name))
        }
      }
      console.log(`kills by phase: ${JSON.stringify(kills)}; ${switched} had switched before`)
      for (const phase of PHASES) expect(kills[phase] ?? 0, `kills in ${phase}`).toBeGreaterThanOrEqual(AT_LEAST)

      // a handle does not follow what another process changes: from here on one of the device as it is now
      const device = await open(attached.number)
      await attached.close()
      await device.changeBackingFile(current)
      await device.migrate(other)
      rmSync(current)
      await device.migrate(current)
      expect(readdirSync(folder).toSorted()).toEqual(['a.img', 'b.img', 'reference'])
      assertSame(device.path, reference, 'at the end')
      expect(await device.detach()).toBe('detached')
    },
  )
})
