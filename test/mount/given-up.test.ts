/** Calls that do not come back in time: everybody goes on, and their threads undo them when they do. */

import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, existsSync, openSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeEach, describe, expect, onTestFinished, vi } from 'vitest'
import { attach, createImage, mountImage } from '../../lib/index.ts'
import { binding } from '../../lib/kernel/binding.ts'
import { GivenUp } from '../../lib/kernel/bounded.ts'
import { O_PATH } from '../../lib/kernel/files.ts'
import { Sequence } from '../../lib/kernel/sequence.ts'
import { encodePath } from '../../lib/kernel/uapi.ts'
import { env, needs } from '../needs.ts'
import { limit } from '../scale.ts'
import { attachedNumbers, countDescriptors, failure, sysfs } from '../kernel/support.ts'
import { expectDetached, makeFilesystem, mountsUnder, test as base } from './support.ts'

interface Frozen {
  /** A filesystem of its own, which can be made to answer no write until it is told to go on. */
  outer: { path: string; freeze: () => void; thaw: () => void }
}

const test = base.extend<Frozen>({
  outer: async ({ folder }, use) => {
    needs('fsfreeze')
    makeFilesystem('ext4', join(folder, 'outer.img'))
    const path = join(folder, 'outer')
    let isFrozen = false
    const thaw = () => {
      if (isFrozen) execFileSync('fsfreeze', ['--unfreeze', path], { env })
      isFrozen = false
    }
    const mount = await mountImage(join(folder, 'outer.img'), path, { makeTarget: true })
    try {
      await use({
        path,
        freeze: () => {
          // What is being written is waited for: only what comes after that is held up.
          execFileSync('fsfreeze', ['--freeze', path], { env })
          isFrozen = true
        },
        thaw,
      })
    } finally {
      thaw()
      await mount.unmount()
    }
  },
})

const LONG = { timeout: limit(60_000) }

function devicesOf(image: string): number[] {
  return attachedNumbers().filter((number) => sysfs(number, 'loop/backing_file') === image)
}

/** How often the event loop came round while the operation ran. */
async function countTurns(operation: () => Promise<unknown>): Promise<number> {
  let turns = 0
  const ticking = setInterval(() => turns++, 1)
  try {
    await operation()
  } finally {
    clearInterval(ticking)
  }
  return turns
}

describe('the filesystem that the image is in does not take what is written', () => {
  test(
    'a mount: given up in time, the device waits for its call; then nothing is left of it',
    LONG,
    async ({ outer, place }) => {
      const image = join(outer.path, 'image')
      makeFilesystem('ext2', image)
      const device = await attach(image)
      const descriptors = countDescriptors()
      const target = join(place, 'made')
      outer.freeze()
      const turns = await countTurns(async () => {
        const error = await failure('timeout', () => device.mount(target, { makeTarget: true, timeout: 300 }))
        expect(error).toMatchObject({ code: 'ETIMEDOUT', path: device.path })
      })
      expect(turns).toBeGreaterThan(10)
      const reason = new Error('enough')
      await expect(device.mount(null, { signal: AbortSignal.timeout(50) })).rejects.toMatchObject({
        name: 'TimeoutError',
      })
      await expect(device.mount(null, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
      const waiting = await failure('timeout', () => device.status({ timeout: 20 }))
      expect(waiting.message).toContain('a call before it does not come back')

      outer.thaw()
      expect((await device.status()).attached).toBe(true)
      expect(readdirSync(place)).toEqual([])
      expect(mountsUnder(place)).toEqual([])
      expect(countDescriptors()).toBe(descriptors)
      expect(await device.detach()).toBe('detached')
    },
  )

  test('mountImage: the device goes when the call comes back', LONG, async ({ outer, place }) => {
    const image = join(outer.path, 'image')
    makeFilesystem('ext2', image)
    const descriptors = countDescriptors()
    for (const target of [place, null]) {
      outer.freeze()
      await failure('timeout', () => mountImage(image, target, { timeout: 400 }))
      expect(mountsUnder(place)).toEqual([])
      outer.thaw()
      await vi.waitFor(() => expect(devicesOf(image)).toEqual([]), { timeout: limit(5_000) })
      await vi.waitFor(() => expect(countDescriptors()).toBe(descriptors), { timeout: limit(5_000) })
    }
  })

  test('an unmount: it may come about later, and the next one says so', LONG, async ({ outer, place }) => {
    const image = join(outer.path, 'image')
    makeFilesystem('ext2', image)
    const descriptors = countDescriptors()
    for (const target of [place, null]) {
      const mount = await mountImage(image, target)
      writeFileSync(join(mount.path, 'file'), 'x')
      outer.freeze()
      const turns = await countTurns(() => failure('timeout', () => mount.unmount({ timeout: 200 })))
      expect(turns).toBeGreaterThan(10)
      outer.thaw()
      expect(await mount.unmount()).toBe('unmounted')
      expect(mountsUnder(place)).toEqual([])
      expectDetached(image)
      await vi.waitFor(() => expect(countDescriptors()).toBe(descriptors))
    }
  })

  test('detach with unmount: given up, and done again', LONG, async ({ outer, place }) => {
    const image = join(outer.path, 'image')
    makeFilesystem('ext2', image)
    const device = await attach(image)
    await device.mount(place)
    writeFileSync(join(place, 'file'), 'x')
    outer.freeze()
    await failure('timeout', () => device.detach({ unmount: true, timeout: 200 }))
    await failure('timeout', () => device.status({ timeout: 20 }))
    outer.thaw()
    expect(await device.detach({ unmount: true })).toBe('detached')
    expect(mountsUnder(place)).toEqual([])
  })

  test('createImage: nothing is left', LONG, async ({ outer }) => {
    const before = readdirSync(outer.path)
    const descriptors = countDescriptors()
    outer.freeze()
    await failure('timeout', () => createImage(join(outer.path, 'disk.img'), 1 << 20, { timeout: 200 }))
    outer.thaw()
    await vi.waitFor(() => expect(countDescriptors()).toBe(descriptors))
    await vi.waitFor(() => expect(readdirSync(outer.path)).toEqual(before))
    await createImage(join(outer.path, 'disk.img'), 1 << 20)
    expect(existsSync(join(outer.path, 'disk.img'))).toBe(true)
  })
})

/** Runs the sequence with a last call that waits for a lock, gives it up, looks, and has it come back. */
async function giveUp(sequence: Sequence, undo: (sequence: Sequence) => void, file: string, look: () => void) {
  writeFileSync(file, '')
  const child = spawn('flock', ['--exclusive', file, 'sh', '-c', 'echo ready; exec cat'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  onTestFinished(() => void child.kill('SIGKILL'))
  await once(child.stdout, 'data')
  const fd = openSync(file, 'r')
  sequence.call('flock', fd, 2)
  undo(sequence)
  const error: unknown = await sequence.run({ left: 200 }).catch((reason: unknown) => reason)
  if (!(error instanceof GivenUp)) expect.fail(String(error))
  look()
  child.stdin.end()
  await error.back
  closeSync(fd)
}

describe('what threads undo', () => {
  beforeEach(() => needs('flock'))

  test('a folder that was made', async ({ folder, place }) => {
    const parent = openSync(place, O_PATH)
    writeFileSync(join(place, 'other'), '')
    const sequence = new Sequence()
    sequence.call('mkdirat', parent, encodePath('made'), 0o755)
    sequence.try('mkdirat', parent, encodePath('other'), 0o755)
    const look = () => expect(readdirSync(place)).toEqual(['made', 'other'])
    await giveUp(sequence, () => {}, join(folder, 'lock'), look)
    expect(readdirSync(place)).toEqual(['other'])
    closeSync(parent)
  })

  test('a mount that was moved into the tree: by its own descriptor, and no other', async ({ folder, place }) => {
    for (const name of ['ext4', 'ext2'] as const) makeFilesystem(name, join(folder, name))
    await using below = await attach(join(folder, 'ext2'))
    await using beneath = await below.mount(place)
    await using device = await attach(join(folder, 'ext4'))
    const unseen = await device.mount(null)
    const fd = Number(unseen.path.split('/').at(-1))
    // It is not in the tree: nothing is unmounted.
    expect(binding().umountAtSync(fd, encodePath(''), 2)).toBe(-22)

    const target = openSync(place, O_PATH)
    const sequence = new Sequence()
    sequence.call('moveMount', fd, target)
    const undo = () => {
      sequence.undoing()
      sequence.call('umountAt', fd, encodePath(''), 2)
    }
    const look = () => expect(mountsUnder(place).map(({ fstype }) => fstype)).toEqual(['ext2', 'ext4'])
    await giveUp(sequence, undo, join(folder, 'lock'), look)
    expect(mountsUnder(place).map(({ fstype }) => fstype)).toEqual(['ext2'])
    closeSync(target)
    await unseen.unmount()
    expect(readFileSync('/proc/self/mountinfo', 'utf8')).not.toContain(device.path)
    await beneath.unmount()
  })
})
