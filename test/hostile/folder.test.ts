import { execFileSync, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { chmodSync, chownSync, lstatSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect } from 'vitest'
import { attach, LoopError } from '../../lib/index.ts'
import { countDescriptors, sysfs, test } from '../kernel/support.ts'
import { limit } from '../scale.ts'

const MALLORY = fileURLToPath(new URL('fixtures/mallory.mjs', import.meta.url))
const [NOBODY, VICTIM] = [65_534, 1_000]
const MIGRATIONS = 200

/** What can come of it: everything else is a fault. */
const REFUSALS = new Set([
  'contention',
  'content-differs',
  'destination-exists',
  'no-such-file',
  'not-a-file-or-block-device',
  // A link of his on the way
  'permission',
])

test(
  `${MIGRATIONS} migrations into a folder whose owner does his worst: a refusal, or a right copy`,
  { timeout: limit(180_000) },
  async ({ folder }) => {
    chmodSync(folder, 0o755)
    const home = join(folder, 'home')
    const elsewhere = join(folder, 'elsewhere')
    for (const path of [home, elsewhere, join(home, 'images'), join(home, 'other')]) mkdirSync(path)
    for (const path of [home, join(home, 'images'), join(home, 'other')]) chownSync(path, NOBODY, NOBODY)
    // Of another user, in a folder that is everybody's
    chmodSync(elsewhere, 0o1777)
    const precious = join(elsewhere, 'precious')
    writeFileSync(precious, 'of the victim', { mode: 0o600 })
    chownSync(precious, VICTIM, VICTIM)
    for (const path of [join(elsewhere, 'node'), join(home, 'fifo')]) {
      execFileSync('mkfifo', [path])
      chownSync(path, NOBODY, NOBODY)
    }
    // Whoever opens one of the FIFOs for reading lets its writer go on: they stand for all that must not be opened.
    const opened: string[] = []
    const writers = [join(elsewhere, 'node'), join(home, 'fifo')].map((path) => {
      const writer = spawn('sh', ['-c', 'exec 3>"$0"; echo opened; read line', path], {
        stdio: ['pipe', 'pipe', 'inherit'],
      })
      writer.stdout.on('data', () => opened.push(path))
      return writer
    })

    const bytes = randomBytes(256 << 10)
    const source = join(folder, 'disk')
    writeFileSync(source, bytes)
    await using device = await attach(source, { readOnly: true })
    const mallory = spawn(process.execPath, [MALLORY, home, 'disk.img', elsewhere, String(NOBODY)], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    let said = ''
    mallory.stdout.on('data', (text: Buffer) => (said += String(text)))
    const outcomes: Record<string, number> = {}
    const ended = once(mallory, 'exit')
    try {
      await once(mallory.stdout, 'data')
      const descriptors = countDescriptors()
      for (let i = 0; i < MIGRATIONS; i++) {
        let outcome = 'copied'
        try {
          await device.migrate(join(home, 'images', 'disk.img'), { overwrite: i % 3 !== 0, verify: i % 2 === 0 })
        } catch (error) {
          if (!LoopError.is(error)) throw error
          outcome = error.reason
          expect(REFUSALS, error.message).toContain(outcome)
        }
        outcomes[outcome] = (outcomes[outcome] ?? 0) + 1
        // What needs no answer is closed on a thread.
        await expect.poll(countDescriptors).toBe(descriptors)
        execFileSync('blockdev', ['--flushbufs', device.path])
        expect(readFileSync(device.path).equals(bytes), outcome).toBe(true)
        if (outcome === 'copied') await device.changeBackingFile(source)
        expect(sysfs(device.number, 'loop/backing_file')).toBe(source)
      }
    } finally {
      mallory.kill('SIGKILL')
      await ended
      for (const writer of writers) {
        writer.kill('SIGKILL')
        await once(writer, 'exit')
      }
    }
    console.log(`migrations into mallory's folder: ${JSON.stringify(outcomes)}`)
    expect(opened).toEqual([])
    expect(said).toBe('ready\n')
    expect(outcomes['copied']).toBeGreaterThan(0)
    expect(readFileSync(precious, 'utf8')).toBe('of the victim')
    expect(lstatSync(precious)).toMatchObject({ uid: VICTIM, nlink: 1 })
    expect(statSync(precious).mode & 0o777).toBe(0o600)
    expect(readdirSync(elsewhere).toSorted()).toEqual(['node', 'precious'])
  },
)
