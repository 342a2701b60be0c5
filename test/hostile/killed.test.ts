import { spawnSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect } from 'vitest'
import { attach, open } from '../../lib/index.ts'
import { sysfs, test } from '../kernel/support.ts'
import { eachCall, limit, STEP } from '../scale.ts'
import { type Lack, whyNot, without } from './without.ts'

const MIGRANT = fileURLToPath(new URL('fixtures/migrant.mjs', import.meta.url))
const MiB = 1 << 20

const cases: [string, Lack[]][] = [
  ['with all that the kernel has', []],
  ['without O_TMPFILE', ['tmpfile']],
  ['without O_TMPFILE and flags of renameat2', ['tmpfile', 'flags']],
  ['without O_TMPFILE, flags of renameat2, and hard links', ['tmpfile', 'flags', 'links']],
]

describe.for(cases)('kill -9 at every call of a migrate, %s,', ([, lacks]) => {
  // With names to be had for nothing flags and links make no difference where nothing is replaced.
  for (const overwrite of lacks.length === 2 ? [true] : [false, true]) {
    test(
      `${overwrite ? 'with' : 'without'} overwrite: one complete file behind the device, and none half written by that name`,
      { timeout: limit(180_000), skip: lacks.length > 0 && whyNot !== '' },
      async ({ folder }) => {
        const bytes = randomBytes(MiB)
        const old = Buffer.from('old')
        const source = join(folder, 'disk')
        const place = join(folder, 'place')
        const destination = join(place, 'copy')
        writeFileSync(source, bytes)
        const attached = await attach(source, { readOnly: true })
        const { number } = attached
        const ends = { 'killed': 0, 'switched': 0, 'left beside': 0 }
        for (const k of eachCall()) {
          rmSync(place, { recursive: true, force: true })
          mkdirSync(place)
          if (overwrite) writeFileSync(destination, old)
          // Without the look at all other devices, which changes nothing and makes more calls than all the rest.
          const options = JSON.stringify({ overwrite, overlap: 'allow' })
          const command = [process.execPath, MIGRANT, String(number), destination, String(k), options]
          const { status, signal, stdout, stderr } = spawnSync(...without(lacks, command), { encoding: 'utf8' })
          const when = `killed at call ${k}`
          expect(signal ?? status, stdout + stderr).toBe(signal === null ? 0 : 'SIGKILL')

          const backing = sysfs(number, 'loop/backing_file') ?? ''
          const isSwitched = backing !== source
          if (isSwitched) expect(backing, when).toBe(destination)
          expect(readFileSync(backing).equals(bytes), when).toBe(true)
          const names = readdirSync(place).filter((name) => name !== 'copy')
          // At most the copy or what it replaces, and where a second name has to keep that, both.
          expect(names.length, `${when}: ${names.join()}`).toBeLessThanOrEqual(lacks.includes('flags') ? 2 : 1)
          for (const name of names) expect(name, when).toMatch(/^\.copy\.loopctl-[0-9a-f]{12}$/)
          const contents = names.map((name) => readFileSync(join(place, name)))
          if (existsSync(destination)) contents.push(readFileSync(destination))
          const under = existsSync(destination) ? readFileSync(destination) : undefined
          if (under) expect(under.equals(bytes) || (overwrite && under.equals(old)), when).toBe(true)
          // What is replaced is there until the switch, by one name or another.
          if (overwrite && !isSwitched)
            expect(
              contents.some((each) => each.equals(old)),
              when,
            ).toBe(true)
          // Nothing is moved away before something whole is there, where one call can do that.
          if (overwrite && !lacks.includes('links')) expect(under, when).toBeDefined()

          if (signal !== null) ends.killed++
          if (isSwitched) ends.switched++
          if (names.length > 0) ends['left beside']++
          if (isSwitched) {
            await using device = await open(number)
            await device.changeBackingFile(source)
          }
          if (signal === null) {
            expect(isSwitched, stdout).toBe(true)
            expect(names, stdout).toEqual([])
            break
          }
        }
        console.log(`${lacks.join() || 'all'}, overwrite: ${overwrite}: ${JSON.stringify(ends)}`)
        expect(ends.killed).toBeGreaterThan(30 / STEP)
        expect(ends.switched).toBeGreaterThan(1)
        const device = await open(number)
        await attached.close()
        expect(await device.detach()).toBe('detached')
      },
    )
  }
})
