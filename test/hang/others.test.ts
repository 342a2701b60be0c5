import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { lookup } from 'node:dns/promises'
import { once } from 'node:events'
import { closeSync, openSync, writeSync } from 'node:fs'
import { stat } from 'node:fs/promises'
import { promisify } from 'node:util'
import { afterAll, describe, expect, vi } from 'vitest'
import { attach, find, list, type LoopDevice, open } from '../../lib/index.ts'
import { binding } from '../../lib/kernel/binding.ts'
import { failure, losetup, sysfs } from '../kernel/support.ts'
import { limit } from '../scale.ts'
import { endingOf, ERRORS, makeImage, SECOND } from './server.ts'
import { expectNoCallLeft, test } from './support.ts'

afterAll(expectNoCallLeft)

const WAIT = { timeout: limit(10_000) }

/** In the cache of the device, and not in its file. */
function makeDirty({ path }: LoopDevice): void {
  const fd = openSync(path, 'r+')
  writeSync(fd, Buffer.alloc(8192, 7), 0, 8192, 65_536)
  closeSync(fd)
}

function isAttached({ number }: LoopDevice): boolean {
  return sysfs(number, 'loop/backing_file') !== undefined
}

describe('while a server is stopped', () => {
  test('all else of the process goes on', async ({ folder, server }) => {
    const silent = await Promise.all(['a', 'b', 'c'].map((name) => attach(server.image(name))))
    const [healthy, first] = [makeImage(`${folder}/healthy`), makeImage(`${folder}/first`)]
    const device = await attach(first)
    await server.stop()
    const waiting = silent.flatMap((each) => [
      each.flush({ timeout: 60_000 }),
      each.refreshCapacity({ timeout: 60_000 }),
    ])

    await Promise.all([stat('/'), lookup('localhost'), promisify(randomBytes)(16)])
    const [second, found] = await Promise.all([attach(healthy), find(first)])
    expect(losetup(second.path)).toMatchObject({ 'back-file': healthy })
    expect(found.map(({ number }) => number)).toEqual([device.number])
    const fd = openSync(makeImage(`${folder}/third`), 'r+')
    const third = await attach(fd)
    closeSync(fd)
    expect(losetup(third.path)).toMatchObject({ 'back-file': `${folder}/third` })
    const numbers = (await list()).map(({ number }) => number)
    expect(numbers).toEqual(expect.arrayContaining([...silent, device, second, third].map(({ number }) => number)))
    expect(await Promise.all([device, second, third].map((each) => each.detach()))).toEqual(Array(3).fill('detached'))
    expect(silent.map(isAttached)).toEqual([true, true, true])

    server.go()
    await Promise.all(waiting)
    expect(await Promise.all(silent.map((each) => each.detach()))).toEqual(Array(3).fill('detached'))
  })

  test('looking at all devices again and again takes no thread each time', async ({ folder, server }) => {
    const silent = await attach(server.image('a'))
    const healthy = makeImage(`${folder}/healthy`)
    await server.stop()
    await Promise.all([find(healthy), list()])
    const { givenUp } = binding().workersSync()
    for (let i = 0; i < 200; i++) await Promise.all([find(healthy), list()])
    // Another program's device can have become silent meanwhile.
    expect(binding().workersSync().givenUp - givenUp).toBeLessThan(50)
    server.go()
    await silent.detach()
  })

  test('its device can be opened twice, tells what sysfs knows, and goes when the server does', async ({ server }) => {
    const file = server.image('a')
    const owned = await attach(file, { reference: 'a-tag' })
    await server.stop()
    for (let i = 0; i < 2; i++) {
      const opened = await open(owned.number, { timeout: SECOND })
      expect(await opened.status({ timeout: SECOND })).toMatchObject({
        backingFile: file,
        reference: null,
        backingDevice: null,
        backingInode: null,
        unanswered: expect.stringContaining('does not answer') as string,
        warnings: [{ code: 'not-answering' }],
      })
      await opened.close({ timeout: SECOND })
    }
    const error = await failure('timeout', () => owned.detach({ force: true, timeout: SECOND }))
    expect(error.path).toBe(owned.path)
    expect(isAttached(owned)).toBe(true)
    // What could not be called back ends with its server.
    await server.kill()
    expect(await owned.detach({ force: true })).toBe('detached')
  })

  test('close() ends though the device has what its file has not, and the server gets it later', async ({ server }) => {
    const device = await attach(server.image('a'))
    const { number, path } = device
    makeDirty(device)
    await server.stop()
    expect(await endingOf(device.close())).toEqual({ value: undefined })
    expect(device.fd).toBe(-1)
    await failure('closed', () => device.flush())
    server.go()
    await vi.waitFor(() => expect(sysfs(number, 'loop/backing_file'), path).toBe(undefined), WAIT)
    const again = await attach(`${server.folder}/a`, { readOnly: true })
    const fd = openSync(again.path, 'r')
    const bytes = Buffer.alloc(8192)
    expect(binding().preadSync(fd, bytes, 65_536n)).toBe(8192)
    closeSync(fd)
    expect(bytes).toEqual(Buffer.alloc(8192, 7))
    await again.detach()
  })
})

test.for(['detachSync', 'dispose', 'asyncDispose'] as const)(
  '%s ends while the server is stopped, and the device goes with it',
  async (how, { server }) => {
    const device = await attach(server.image('a'))
    await server.stop()
    try {
      if (how === 'detachSync') device.detachSync()
      else if (how === 'dispose') device[Symbol.dispose]()
      else await device[Symbol.asyncDispose]()
    } catch (error) {
      expect(error).toMatchObject({ reason: 'timeout', path: device.path })
    }
    expect(server.isStopped).toBe(true)
    server.go()
    await device.close()
    await vi.waitFor(() => expect(isAttached(device)).toBe(false), WAIT)
  },
)

/** A reader that was killed in the middle: its read is under way in the device, and nobody has that open any more. */
async function leaveReadUnderWay(path: string): Promise<void> {
  const reader = spawn('dd', [`if=${path}`, 'of=/dev/null', 'bs=4096', 'count=1'], { stdio: 'ignore' })
  const ended = once(reader, 'exit')
  await vi.waitFor(() => expect(sysfs(Number(path.slice('/dev/loop'.length)), 'inflight')).toMatch(/[1-9]/), WAIT)
  reader.kill('SIGKILL')
  await ended
}

describe('while a read is not answered', () => {
  test('a detach that succeeds late closes the handle, and the next one says that it is detached', async ({
    server,
  }) => {
    const device = await attach(server.image('a'), { readOnly: true })
    await server.behave({ READ: 'silent' })
    await leaveReadUnderWay(device.path)
    await failure('timeout', () => device.detach({ timeout: SECOND }))
    const next = device.detach({ timeout: 60_000 })
    await server.behave({})
    expect(await next).toBe('detached')
    expect(isAttached(device)).toBe(false)
    expect(await device.detach()).toBe('detached')
    await failure('closed', () => device.status())
  })

  test('list() ends though the kernel does not tell the block size of a device that is drained', async ({ server }) => {
    const device = await attach(server.image('a'), { readOnly: true })
    await server.behave({ READ: 'silent' })
    await leaveReadUnderWay(device.path)
    const setting = device.setBlockSize(1024, { timeout: 60_000 })
    const listed = async () => (await list()).find(({ number }) => number === device.number)
    const ending = await endingOf(listed())
    expect(ending).toMatchObject({ value: { backingFile: `${server.folder}/a`, readOnly: true } })
    await server.behave({})
    await setting
    expect(await listed()).toMatchObject({ blockSize: 1024 })
    await device.detach()
  })
})

describe('when a server has died', () => {
  test('its device is detached by force, and says what is lost', async ({ server }) => {
    const device = await attach(server.image('a'))
    makeDirty(device)
    await server.kill()
    const error = await failure('io', () => device.detach())
    expect(error.syscall).toBe('fsync')
    expect(isAttached(device)).toBe(true)
    expect(await device.detach({ force: true })).toBe('detached')
    expect(device.warnings).toMatchObject([{ code: 'data-lost' }])
    expect(isAttached(device)).toBe(false)
  })

  test('its device is detached lazily', async ({ server }) => {
    const device = await attach(server.image('a'))
    makeDirty(device)
    await server.kill()
    await device.detach({ lazy: true })
    expect(device.warnings).toMatchObject([{ code: 'data-lost' }])
    // Whoever looks at every device has it open for a moment.
    await vi.waitFor(() => expect(isAttached(device)).toBe(false), WAIT)
  })

  test.for(['detachSync', 'dispose', 'asyncDispose'] as const)('its device goes by %s', async (how, { server }) => {
    const device = await attach(server.image('a'))
    await server.kill()
    if (how === 'detachSync') device.detachSync()
    else if (how === 'dispose') device[Symbol.dispose]()
    else await device[Symbol.asyncDispose]()
    await vi.waitFor(() => expect(isAttached(device)).toBe(false), WAIT)
  })

  test('its device can be released, with every bit but autoclear as it was', async ({ server }) => {
    const file = server.image('a')
    const device = await attach(file, { offset: 4096, sizeLimit: 8192, partscan: true, reference: 'a-tag' })
    await server.behave(ERRORS)
    const path = await device.release()
    expect(losetup(path)).toMatchObject({ autoclear: false })
    await server.behave({})
    const kept = await open(path)
    expect(await kept.status()).toMatchObject({
      autoclear: false,
      backingFile: file,
      offset: 4096,
      sizeLimit: 8192,
      partscan: true,
      reference: 'a-tag',
    })
    expect(await kept.detach()).toBe('detached')
  })
})

test('a device of a dead server that was unmounted lazily is in nobody’s way', async ({ folder, server }) => {
  const device = await attach(server.image('a'))
  const [first, second] = [makeImage(`${folder}/first`), makeImage(`${folder}/second`)]
  await server.end()
  // Its path is that in a tree of its own, and so looks like one on the filesystem of the other files.
  expect(sysfs(device.number, 'loop/backing_file')).toMatch(/^\/a( \(deleted\))?$/)
  expect(await find(first)).toEqual([])
  const fd = openSync(second, 'r+')
  const other = await attach(fd)
  closeSync(fd)
  expect(await other.detach()).toBe('detached')
  expect(await device.detach({ force: true })).toBe('detached')
})

test('a file is found at a slow server, whose devices are waited for', async ({ server }) => {
  const file = server.image('a')
  const device = await attach(file)
  await server.behave({ GETATTR: 0.8, LOOKUP: 0.01 })
  expect((await find(file, { timeout: 60_000 })).map(({ number }) => number)).toEqual([device.number])
  const fd = openSync(file, 'r+')
  await failure('overlap', () => attach(fd, { timeout: 60_000 }))
  closeSync(fd)
  await server.behave({})
  await device.detach()
})

test('one signal that is aborted ends all that wait, with its reason', async ({ server }) => {
  const devices = await Promise.all(['a', 'b', 'c'].map((name) => attach(server.image(name))))
  await server.stop()
  const controller = new AbortController()
  const { signal } = controller
  const waiting = devices.flatMap((each) => [each.flush({ signal }), each.status({ signal }), each.release({ signal })])
  const reason = new Error('enough')
  controller.abort(reason)
  for (const ending of await Promise.all(waiting.map((each) => endingOf<unknown>(each)))) {
    expect(ending).toEqual({ error: reason })
  }
  server.go()
  expect(await Promise.all(devices.map((each) => each.detach()))).toEqual(Array(3).fill('detached'))
})
