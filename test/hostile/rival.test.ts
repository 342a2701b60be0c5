import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect } from 'vitest'
import { attach, LoopError, open } from '../../lib/index.ts'
import { countDescriptors, sysfs, test } from '../kernel/support.ts'
import { limit } from '../scale.ts'

const RIVAL = fileURLToPath(new URL('fixtures/rival.mjs', import.meta.url))
const MIGRATIONS = 100
const SIZE = 256 << 10
const OFFSET = 4096

/** What can come of it: everything else is a fault. */
const REFUSALS = new Set(['replaced', 'size-mismatch', 'would-shut-down-filesystem', 'content-differs'])

test(
  `${MIGRATIONS} migrations of a device that another process changes all the time: a refusal, or a right copy`,
  { timeout: limit(180_000) },
  async ({ folder }) => {
    const bytes = randomBytes(SIZE)
    const source = join(folder, 'disk')
    const twin = join(folder, 'twin')
    writeFileSync(source, bytes)
    copyFileSync(source, twin)
    const place = join(folder, 'place')
    mkdirSync(place)
    const attached = await attach(source, { readOnly: true })
    const { number } = attached
    const rival = spawn(process.execPath, [RIVAL, String(number), source, twin], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const ended = once(rival, 'exit')
    let said = ''
    rival.stdout.setEncoding('utf8').on('data', (text: string) => (said += text))
    const outcomes: Record<string, number> = {}
    try {
      await once(rival.stdout, 'data')
      const descriptors = countDescriptors()
      for (let i = 0; i < MIGRATIONS; i++) {
        const destination = join(place, `copy-${i}`)
        let outcome = 'copied'
        try {
          await using device = await open(number)
          await device.migrate(destination, { verify: i % 2 === 0 })
        } catch (error) {
          if (!LoopError.is(error)) throw error
          outcome = error.reason
          expect(REFUSALS, error.message).toContain(outcome)
        }
        outcomes[outcome] = (outcomes[outcome] ?? 0) + 1
        expect(countDescriptors()).toBe(descriptors)
        if (existsSync(destination)) {
          // What the device showed of the image is where it was; what it did not show is a hole, or not there.
          const copy = readFileSync(destination)
          const end = statSync(destination).size
          expect(copy.subarray(OFFSET).equals(bytes.subarray(OFFSET, end)), outcome).toBe(true)
          const head = copy.subarray(0, OFFSET)
          expect(head.equals(bytes.subarray(0, OFFSET)) || head.equals(Buffer.alloc(OFFSET)), outcome).toBe(true)
        } else expect(outcome).not.toBe('copied')
        expect(readdirSync(place).filter((name) => name.startsWith('.'))).toEqual([])
        // Its file has a name, whatever became of the migration.
        expect(sysfs(number, 'loop/backing_file')).not.toContain('(deleted)')
        for (const name of readdirSync(place)) {
          if (sysfs(number, 'loop/backing_file') !== join(place, name)) rmSync(join(place, name))
        }
      }
    } finally {
      rival.kill('SIGKILL')
      await ended
    }
    const changes = said.split('done').length - 1
    console.log(`migrations of the rival's device: ${JSON.stringify(outcomes)}, ${changes} changes of his`)
    expect(changes).toBeGreaterThan(0)
    expect(outcomes['copied']).toBeGreaterThan(0)
    const device = await open(number)
    await attached.close()
    expect(await device.detach()).toBe('detached')
  },
)
