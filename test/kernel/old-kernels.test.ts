/** What is done where the kernel lacks something, on a kernel that has it: only the probes are told otherwise. */

import { closeSync, openSync, readFileSync, writeSync } from 'node:fs'
import { beforeEach, describe, expect, vi } from 'vitest'
import { attach, open } from '../../lib/index.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import { countDescriptors, failure, losetup, sysfs, test } from './support.ts'
import { eachCall } from '../scale.ts'

const has = vi.hoisted(() => ({ configure: true, diskSeq: true, seqPerAttachment: true }))

vi.mock('../../lib/kernel/features.ts', async (original) => {
  const real = await original<typeof import('../../lib/kernel/features.ts')>()
  return {
    ...real,
    knownFeatures: () => {
      const { loopConfigure, diskSeq, ...others } = real.knownFeatures()
      return { ...others, loopConfigure: has.configure && loopConfigure, diskSeq: has.diskSeq && diskSeq }
    },
    isKnown: (name: 'loopConfigure' | 'diskSeq') =>
      (name === 'loopConfigure' ? has.configure : has.diskSeq) && real.isKnown(name),
    hasLoopConfigure: (fd: number) => has.configure && real.hasLoopConfigure(fd),
    hasDiskSeq: (fd: number) => has.diskSeq && real.hasDiskSeq(fd),
    diskSeqCountsAttachments: () => has.seqPerAttachment && real.diskSeqCountsAttachments(),
  }
})

beforeEach(() => {
  Object.assign(has, { configure: true, diskSeq: true, seqPerAttachment: true })
})

/** The names of the native calls that the operation makes. */
async function callsOf(operation: () => Promise<unknown>): Promise<string[]> {
  const calls: string[] = []
  observe((call) => calls.push(call))
  try {
    await operation()
  } finally {
    observe(undefined)
  }
  return calls
}

describe('before 5.8, without LOOP_CONFIGURE', () => {
  test('attaches through LOOP_SET_FD and LOOP_SET_STATUS64, with every option', async ({ image }) => {
    has.configure = false
    const file = image('disk')
    const fd = openSync(file, 'r+')
    writeSync(fd, 'window', 4096)
    closeSync(fd)
    const options = { offset: 4096, sizeLimit: 8192, blockSize: 4096, directIO: true, partscan: true, reference: 'tag' }
    const calls = await callsOf(async () => {
      await using device = await attach(file, options)
      expect(await device.status()).toMatchObject({ ...options, size: 8192, autoclear: true, readOnly: false })
      expect(losetup(device.path)).toMatchObject({
        'offset': 4096,
        'sizelimit': 8192,
        'autoclear': true,
        'log-sec': 4096,
      })
      expect(readFileSync(device.path).subarray(0, 6).toString()).toBe('window')
    })
    expect(calls).toContain('loopSetFd')
    expect(calls).toContain('loopSetStatus64')
    expect(calls).not.toContain('loopConfigure')
  })

  test('read-only, and without autoclear', async ({ image }) => {
    has.configure = false
    const device = await attach(image('disk'), { readOnly: true, autoclear: false })
    expect(await device.status()).toMatchObject({ readOnly: true, autoclear: false })
    expect(sysfs(device.number, 'ro')).toBe('1')
    expect(await device.detach()).toBe('detached')
  })

  test('many at once, and what fails is undone', async ({ image }) => {
    has.configure = false
    const files = Array.from({ length: 12 }, (_, i) => image(`disk${i}`, 4096, i + 1))
    const descriptors = countDescriptors()
    const devices = await Promise.all(files.map((file) => attach(file)))
    for (const [i, device] of devices.entries()) expect(readFileSync(device.path)[0]).toBe(i + 1)
    await failure('already-attached', () => attach(image('other'), { number: devices[0]?.number }))
    await failure('direct-io-unavailable', () => attach(image('direct'), { directIO: true, offset: 100 }))
    for (const device of devices) expect(await device.detach()).toBe('detached')
    expect(countDescriptors()).toBe(descriptors)
  })

  test('given up at its k-th call, for every k, it leaves nothing', async ({ image }) => {
    has.configure = false
    const file = image('disk')
    const { length } = await callsOf(async () => (await attach(file)).close())
    const reason = new Error('enough')
    for (const k of eachCall(length)) {
      const controller = new AbortController()
      let seen = 0
      observe(() => {
        if (++seen === k) controller.abort(reason)
      })
      const result = await attach(file, { signal: controller.signal }).then(
        (device) => device.detach(),
        (error: unknown) => error,
      )
      observe(undefined)
      expect([reason, 'detached'], `call ${k}`).toContain(result)
      await using again = await attach(file)
      expect(sysfs(again.number, 'loop/backing_file')).toBe(file)
    }
  })
})

describe('identity', () => {
  for (const [name, lacking] of [
    ['before 5.15, without disk sequence numbers', { diskSeq: false }],
    ['before 6.5, where they do not move at every attach', { seqPerAttachment: false }],
  ] as const) {
    test(`${name}, the backing file decides`, async ({ image }) => {
      const first = image('first')
      const second = image('second')
      Object.assign(has, lacking)
      await using mine = await attach(first)
      expect(mine.ref).toMatchObject({
        number: mine.number,
        backing: expect.stringMatching(/^\d+:\d+ \d+ 0$/) as string,
      })
      expect('diskSeq' in mine.ref).toBe(name.includes('6.5'))
      const { ref } = mine
      await (await open(ref)).close()
      await mine.setStatus({ offset: 512 })
      // a change of our own is still ours
      expect((await mine.status()).offset).toBe(512)
      await failure('replaced', () => open(ref))
      await mine.detach()
      const free = await open(mine.number)

      await using other = await attach(second, { number: mine.number })
      await failure('replaced', () => open(ref))
      await failure('replaced', () => free.status())
      await failure('replaced', () => free.detach())
      await free.close()
      expect(sysfs(other.number, 'loop/backing_file')).toBe(second)
    })
  }
})
