import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync, readlinkSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, vi } from 'vitest'
import { attach, type LoopDevice, type MigrateOptions, type Progress } from '../../lib/index.ts'
import { binding } from '../../lib/kernel/binding.ts'
import { needs } from '../needs.ts'
import { limit } from '../scale.ts'
import { failure, sysfs, test as onDevices } from './support.ts'

const MiB = 1 << 20
const WAIT = { timeout: limit(10_000) }

function run(command: string, ...args: string[]): void {
  execFileSync(command, args, { stdio: 'pipe' })
}

/** A filesystem that answers no write from freeze() to thaw(): FIFREEZE. */
class Place {
  readonly path: string
  #isFrozen = false

  constructor(folder: string) {
    const image = join(folder, 'place.image')
    writeFileSync(image, '')
    truncateSync(image, 32 * MiB)
    run('mkfs.ext4', '-q', '-O', '^has_journal', image)
    this.path = join(folder, 'place')
    mkdirSync(this.path)
    run('mount', '-o', 'loop', image, this.path)
  }

  freeze(): void {
    if (this.#isFrozen) return
    run('fsfreeze', '--freeze', this.path)
    this.#isFrozen = true
  }

  thaw(): void {
    if (!this.#isFrozen) return
    run('fsfreeze', '--unfreeze', this.path)
    this.#isFrozen = false
  }

  /** Everything in it but what mkfs makes. */
  get names(): string[] {
    return readdirSync(this.path).filter((name) => name !== 'lost+found')
  }

  unmount(): void {
    this.thaw()
    run('umount', this.path)
  }
}

const test = onDevices.extend<{ place: Place; disk: string }>({
  place: async ({ folder }, use) => {
    needs('mkfs.ext4')
    const place = new Place(folder)
    await use(place)
    place.thaw()
    await vi.waitFor(() => expect(binding().workersSync()).toMatchObject({ givenUp: 0, working: 0, queued: 0 }), WAIT)
    place.unmount()
  },
  disk: async ({ folder }, use) => {
    const path = join(folder, 'disk')
    writeFileSync(path, randomBytes(MiB))
    await use(path)
  },
})

/** Freezes the place at the first word of a phase, and calls back. */
function freezing(place: Place, phase: Progress['phase'], then?: () => void): Pick<MigrateOptions, 'onProgress'> {
  return {
    onProgress: (progress) => {
      if (progress.phase !== phase) return
      place.freeze()
      then?.()
    },
  }
}

/** Files and folders there that this process has open. */
function descriptorsIn(folder: string): string[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${fd}`)
      return target.startsWith(folder) ? [target] : []
    } catch {
      return []
    }
  })
}

/** All that the migration has had and made is gone once the filesystem answers, and the device is as it was. */
async function expectNothingLeft(device: LoopDevice, disk: string, place: Place): Promise<void> {
  expect(sysfs(device.number, 'loop/backing_file')).toBe(disk)
  place.thaw()
  await vi.waitFor(() => {
    expect(binding().workersSync()).toMatchObject({ givenUp: 0, working: 0, queued: 0 })
    expect(place.names).toEqual([])
    expect(descriptorsIn(place.path)).toEqual([])
  }, WAIT)
  expect(sysfs(device.number, 'loop/backing_file')).toBe(disk)
  const destination = join(place.path, 'copy')
  await device.migrate(destination)
  expect(readFileSync(destination).equals(readFileSync(disk))).toBe(true)
  expect(sysfs(device.number, 'loop/backing_file')).toBe(destination)
  await device.migrate(`${disk}.back`)
}

describe('where the filesystem of the destination does not answer', () => {
  test('the timeout is heard within a call', async ({ disk, place }) => {
    await using device = await attach(disk, { readOnly: true })
    const options = { timeout: limit(500), ...freezing(place, 'copy') }
    const error = await failure('timeout', () => device.migrate(join(place.path, 'copy'), options))
    expect(error).toMatchObject({ path: join(place.path, 'copy') })
    expect(error.message).not.toContain('not known')
    await expectNothingLeft(device, disk, place)
  })

  test('the signal is heard within a call', async ({ disk, place }) => {
    await using device = await attach(disk, { readOnly: true })
    const controller = new AbortController()
    let isFrozen = false
    const isInCall = () => expect([isFrozen, binding().workersSync().working]).toEqual([true, 1])
    const options = { signal: controller.signal, ...freezing(place, 'copy', () => (isFrozen = true)) }
    const migration = device.migrate(join(place.path, 'copy'), options)
    await vi.waitFor(isInCall, WAIT)
    controller.abort('enough')
    await expect(migration).rejects.toBe('enough')
    await expectNothingLeft(device, disk, place)
  })

  for (const overwrite of [false, true]) {
    test(`once the switch has begun only the timeout is heard, overwrite: ${overwrite}`, async ({ disk, place }) => {
      const destination = join(place.path, 'copy')
      if (overwrite) writeFileSync(destination, 'before')
      await using device = await attach(disk, { readOnly: true })
      const controller = new AbortController()
      const abort = () => controller.abort('not heard')
      const options = {
        overwrite,
        signal: controller.signal,
        timeout: limit(1_000),
        ...freezing(place, 'switch', abort),
      }
      const error = await failure('timeout', () => device.migrate(destination, options))
      expect(error.message).toContain('what came of it is not known')
      if (overwrite) {
        place.thaw()
        await vi.waitFor(() => expect(place.names).toEqual(['copy']), WAIT)
        expect(readFileSync(destination, 'utf8')).toBe('before')
        run('rm', destination)
      }
      await expectNothingLeft(device, disk, place)
    })
  }

  test('the lower device of a stack is let go of too', async ({ disk, place }) => {
    await using device = await attach(disk, { readOnly: true, swappable: true })
    const { lower, backingFile } = await device.status()
    const options = { timeout: limit(500), ...freezing(place, 'copy') }
    await failure('timeout', () => device.migrate(join(place.path, 'copy'), options))
    // The place in the queue is kept until the call has come back.
    await failure('timeout', () => device.status({ timeout: 50 }))
    place.thaw()
    await vi.waitFor(() => expect(descriptorsIn(place.path)).toEqual([]), WAIT)
    expect(place.names).toEqual([])
    expect(await device.status()).toMatchObject({ lower, backingFile })
    await device.migrate(join(place.path, 'copy'))
    await device.migrate(`${disk}.back`)
  })
})
