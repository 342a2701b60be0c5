import { describe, expect } from 'vitest'
import { find, open } from '../../lib/index.ts'
import { test } from '../kernel/support.ts'
import { limit, times } from '../scale.ts'
import { killIn } from './victims.ts'

const PHASES = ['attach', 'hold', 'detach', 'release']

const KILLS = times(500)
const AT_LEAST = Math.floor(KILLS / 25)
const AT_ONCE = 4

describe('kill -9', () => {
  test(
    `${KILLS} processes killed at random moments leave nothing attached but what was released`,
    { timeout: limit(60_000 + times(300_000)) },
    async ({ image }) => {
      const kills: Record<string, number> = {}
      const left: string[] = []
      let released = 0
      let next = 0
      const slaughter = async (slot: number) => {
        while (next < KILLS) {
          const round = next++
          const file = image(`disk${slot}-${round}`, 65_536, 1)
          const phase = PHASES[round % PHASES.length] ?? 'attach'
          const died = (await killIn('victim.mjs', [file], phase, Math.floor(Math.random() * 40))) ?? 'nowhere'
          kills[died] = (kills[died] ?? 0) + 1
          for (const info of await find(file)) {
            // The kernel lets go when the last descriptor is closed, and the process is gone: nothing to wait for.
            if (died === 'release') released++
            else left.push(`${info.path} after a kill in ${died}`)
            const device = await open(info)
            await device.detach()
          }
        }
      }
      await Promise.all(Array.from({ length: AT_ONCE }, (_, slot) => slaughter(slot)))
      console.log(`kills by phase: ${JSON.stringify(kills)}; ${released} devices were released before`)
      expect(left).toEqual([])
      for (const phase of PHASES) expect(kills[phase] ?? 0, `kills in ${phase}`).toBeGreaterThanOrEqual(AT_LEAST)
    },
  )
})
