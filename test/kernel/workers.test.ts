import { execFile } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { lookup } from 'node:dns/promises'
import { once } from 'node:events'
import { copyFileSync, existsSync, readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs'
import { stat } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { constants } from 'node:os'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { Worker } from 'node:worker_threads'
import { describe, expect, vi } from 'vitest'
import { attach, LoopControl } from '../../lib/index.ts'
import { binding, NoThread } from '../../lib/kernel/binding.ts'
import { callWithin, GivenUp, listUnanswering, within } from '../../lib/kernel/bounded.ts'
import { callWithinSync, closeWithinSync } from '../../lib/kernel/bounded-sync.ts'
import { close, closeSync, openSync } from '../../lib/kernel/files.ts'
import { Sequence } from '../../lib/kernel/sequence.ts'
import { decodeU64, encodeConfig, encodePath, newU64 } from '../../lib/kernel/uapi.ts'
import { limit } from '../scale.ts'
import { sysfs, test as onDevices } from './support.ts'

const [O_RDONLY, O_RDWR] = [0, 2]
const [LOCK_SH, LOCK_EX, LOCK_NB, LOCK_UN] = [1, 2, 4, 8]
const ADDON = fileURLToPath(new URL('../../build/Release/loopctl.node', import.meta.url))

/** flock(2) waits as long as somebody else has the lock: a call that hangs for as long as a test likes. */
class Hanging {
  readonly path: string
  readonly #holder: number
  readonly #opened: number[] = []

  constructor(path: string) {
    writeFileSync(path, '')
    this.path = path
    this.#holder = openSync(path, O_RDWR)
    this.begin()
  }

  begin(): void {
    expect(binding().flockSync(this.#holder, LOCK_EX | LOCK_NB)).toBe(0)
  }

  /** A descriptor on which LOCK_SH hangs. */
  open(): number {
    const fd = openSync(this.path, O_RDWR)
    expect(fd).toBeGreaterThan(2)
    this.#opened.push(fd)
    return fd
  }

  /** All calls come back. */
  end(): void {
    binding().flockSync(this.#holder, LOCK_UN)
  }

  /** Descriptors of the file, of this process. */
  count(): number {
    return readdirSync('/proc/self/fd').filter((fd) => {
      try {
        return readlinkSync(`/proc/self/fd/${fd}`) === this.path
      } catch {
        return false
      }
    }).length
  }

  close(): void {
    this.end()
    for (const fd of [this.#holder, ...this.#opened]) closeSync(fd)
  }
}

const test = onDevices.extend<{ hanging: Hanging }>({
  hanging: async ({ folder }, use) => {
    const hanging = new Hanging(`${folder}/lock`)
    await use(hanging)
    hanging.end()
    await vi.waitFor(() => expect(binding().workersSync()).toMatchObject({ givenUp: 0, working: 0, queued: 0 }), WAIT)
    hanging.close()
    expect(hanging.count()).toBe(0)
  },
})

const WAIT = { timeout: limit(10_000) }

function givenUp(promise: Promise<unknown>): Promise<GivenUp> {
  return promise.then(
    (answer) => expect.fail(`answered ${String(answer)}`),
    (error: unknown) => (error instanceof GivenUp ? error : expect.fail(String(error))),
  )
}

function givenUpSync(operation: () => void): GivenUp {
  try {
    operation()
  } catch (error) {
    if (error instanceof GivenUp) return error
    throw error
  }
  return expect.fail('it came back')
}

/** Those of the addon, by their ids. */
function threads(): string[] {
  return readdirSync('/proc/self/task').filter((id) => {
    try {
      return readFileSync(`/proc/self/task/${id}/comm`, 'utf8') === 'loopctl\n'
    } catch {
      return false
    }
  })
}

describe('threads of the addon', () => {
  test('are as many as are wanted, and end when nothing is to be done', async () => {
    const { made } = binding().workersSync()
    const answers = await Promise.all(Array.from({ length: 500 }, () => binding().pageSize()))
    expect(new Set(answers)).toEqual(new Set([binding().pageSizeSync()]))
    expect(binding().workersSync().made - made).toBe(500)
    const ids = threads()
    expect(ids.length).toBeGreaterThan(0)
    expect(ids.length).toBeLessThanOrEqual(33) // and the one that watches over those that wait
    for (const id of ids) {
      let status = ''
      try {
        status = readFileSync(`/proc/self/task/${id}/status`, 'utf8')
      } catch {
        continue // It has just ended.
      }
      const blocked = BigInt(`0x${/^SigBlk:\s*(\w+)$/m.exec(status)?.[1]}`)
      for (const signal of [constants.signals.SIGTERM, constants.signals.SIGINT, constants.signals.SIGCHLD]) {
        expect((blocked >> BigInt(signal - 1)) & 1n).toBe(1n)
      }
    }
    await vi.waitFor(() => expect(threads()).toEqual([]), WAIT)
    expect(binding().workersSync()).toMatchObject({ working: 0, idle: 0 })
    expect(await binding().pageSize()).toBe(binding().pageSizeSync())
  })

  test('40 calls that hang stop neither fs, dns and crypto nor other calls', async ({ hanging }) => {
    const fds = Array.from({ length: 40 }, () => hanging.open())
    let back = 0
    const calls = fds.map(async (fd) => {
      expect(await binding().flock(fd, LOCK_SH)).toBe(0)
      back++
    })
    await Promise.all([stat('/'), lookup('localhost'), promisify(randomBytes)(16), binding().pageSize()])
    expect(back).toBe(0)
    expect(binding().workersSync()).toMatchObject({ givenUp: 0 })
    hanging.end()
    await Promise.all(calls)
  })

  test('two copies of the addon do not know of each other', async ({ folder, hanging }) => {
    const copy = `${folder}/copy.node`
    copyFileSync(ADDON, copy)
    const other = createRequire(import.meta.url)(copy) as ReturnType<typeof binding>
    const before = other.workersSync()
    const call = binding().flock(hanging.open(), LOCK_SH)
    expect(await other.pageSize()).toBe(await binding().pageSize())
    expect(other.workersSync()).toMatchObject({ made: before.made + 1, givenUp: 0 })
    hanging.end()
    expect(await call).toBe(0)
  })
})

describe('a call that hangs', () => {
  test('is given up on when its time is up, and keeps others from its device or file only', async ({ hanging }) => {
    const error = await givenUp(within({ left: 20 }, hanging.path).flock(hanging.open(), LOCK_SH))
    expect(error).toMatchObject({ call: 'flock', asked: hanging.path, hasBegun: true, isAborted: false })
    expect(error.message).toContain(hanging.path)
    expect(binding().workersSync()).toMatchObject({ givenUp: 1, writtenOff: 1 })
    expect(listUnanswering()).toEqual([hanging.path])

    const { made } = binding().workersSync()
    const next = await givenUp(within({ left: 20 }, hanging.path).pageSize())
    expect(next).toMatchObject({ asked: hanging.path, hasBegun: false })
    expect(await callWithin(20, hanging.path, 'pageSize')).toBe(undefined)
    expect(binding().workersSync().made).toBe(made)
    expect(await within({ left: limit(20_000) }, 'another').pageSize()).toBe(binding().pageSizeSync())

    const waiting = within({ left: Infinity }, hanging.path).pageSize()
    hanging.end()
    expect(await error.back).toBe(0)
    expect(await waiting).toBe(binding().pageSizeSync())
    expect(listUnanswering()).toEqual([])
    await vi.waitFor(() => expect(binding().workersSync()).toMatchObject({ givenUp: 0, writtenOff: 0 }), WAIT)
  })

  test('is given up on by a signal, of which any number of calls listen', async ({ hanging }) => {
    const warnings: Error[] = []
    const warn = (warning: Error) => warnings.push(warning)
    process.on('warning', warn)
    try {
      const controller = new AbortController()
      const { signal } = controller
      const quick = Array.from({ length: 5_000 }, () => within({ left: Infinity, signal }).pageSize())
      const stuck = givenUp(within({ left: Infinity, signal }).flock(hanging.open(), LOCK_SH))
      expect(new Set(await Promise.all(quick))).toEqual(new Set([binding().pageSizeSync()]))
      const reason = new Error('enough')
      controller.abort(reason)
      expect(await stuck).toMatchObject({ isAborted: true, cause: reason, hasBegun: true })
      expect(await givenUp(within({ left: Infinity, signal }).pageSize())).toMatchObject({ hasBegun: false })
      await new Promise(setImmediate)
      expect(warnings).toEqual([])
    } finally {
      process.off('warning', warn)
    }
  })

  test('of one device or file there are at most four at once, before any was given up on', async ({ hanging }) => {
    const bound = { left: Infinity }
    const calls = Array.from({ length: 10 }, () => within(bound, 7).flock(hanging.open(), LOCK_SH))
    expect(await within(bound, 8).pageSize()).toBe(binding().pageSizeSync())
    expect(binding().workersSync().working).toBeLessThanOrEqual(4)
    hanging.end()
    expect(await Promise.all(calls)).toEqual(calls.map(() => 0))
  })

  test('and was given up on before it had a thread never begins', async ({ hanging }) => {
    const addon = createRequire(import.meta.url)(ADDON) as ReturnType<typeof binding>
    const held: Promise<number>[] = []
    let never: Promise<number> | undefined
    // Others take long meanwhile where the machine is busy, and then there are more threads.
    for (let i = 0; i < 100 && never === undefined; i++) {
      const call = addon.flock(hanging.open(), LOCK_SH)
      if (addon.workersSync().queued > 0 && addon.giveUpSync(addon.lastCallSync()) === 1) never = call
      else held.push(call)
    }
    expect(await never).toBe(undefined)
    hanging.end()
    expect(await Promise.all(held)).toEqual(held.map(() => 0))
  })

  test('closes what its sequence opened, and makes only the undoing calls of it', async ({ hanging }) => {
    const before = hanging.count()
    const sequence = new Sequence()
    const first = sequence.call('open', encodePath(hanging.path), O_RDONLY)
    const second = sequence.call('open', encodePath(hanging.path), O_RDONLY)
    const locked = sequence.call('flock', first, LOCK_SH)
    const never = sequence.call('pageSize')
    sequence.part()
    const nor = sequence.call('pageSize')
    sequence.undoing()
    const undone = sequence.expect(-constants.errno.EBADF, 'fsync', -1)
    const further = sequence.call('open', encodePath(hanging.path), O_RDONLY)
    const error = await givenUp(sequence.run({ left: 20 }, hanging.path))
    expect(error).toMatchObject({ call: 'sequence', hasBegun: true })
    expect(first.answer).toBe(undefined)
    expect(hanging.count()).toBe(before + 2)
    hanging.end()
    await error.back
    expect(locked.answer).toBe(0)
    expect([never.answer, nor.answer]).toEqual([undefined, undefined])
    expect([undone.answer, further.succeeded]).toEqual([-constants.errno.EBADF, true])
    expect(second.succeeded).toBe(true)
    expect(hanging.count()).toBe(before)
    // and with it the lock is gone
    const fd = hanging.open()
    expect(binding().flockSync(fd, LOCK_EX | LOCK_NB)).toBe(0)
  })

  test('undoing calls are not made where all goes well', async () => {
    const sequence = new Sequence()
    const made = sequence.call('pageSize')
    sequence.undoing()
    const undone = sequence.call('pageSize')
    await sequence.run({ left: limit(20_000) })
    expect([made.answer, undone.answer]).toEqual([binding().pageSizeSync(), undefined])
  })

  test('detaches what its sequence attached, whichever descriptor is left', async ({ hanging, image }) => {
    await using control = await LoopControl.open()
    const number = await control.add(700_000 + (process.pid % 10_000))
    try {
      for (const closesFirst of [false, true]) {
        const file = image(`disk${closesFirst}`)
        const locked = hanging.open()
        const sequence = new Sequence()
        const backing = sequence.call('openRegular', encodePath(file), O_RDWR)
        const device = sequence.call('openLoop', number, O_RDWR)
        const configured = sequence.call('loopConfigure', device, backing, encodeConfig(0, {}))
        sequence.call('openLoop', number, O_RDONLY)
        if (closesFirst) sequence.call('close', device)
        sequence.call('flock', locked, LOCK_SH)
        const error = await givenUp(sequence.run({ left: 200 }, number))
        expect(sysfs(number, 'loop/backing_file')).toBe(file)
        hanging.end()
        await error.back
        expect(configured.answer).toBe(0)
        await vi.waitFor(() => expect(existsSync(`/sys/block/loop${number}/loop`)).toBe(false), WAIT)
        binding().flockSync(locked, LOCK_UN)
        hanging.begin()
      }
    } finally {
      await control.remove(number)
    }
  })

  test('keeps the descriptor that it uses: it is closed when it has come back', async ({ hanging }) => {
    const fd = openSync(hanging.path, O_RDWR)
    const error = await givenUp(within({ left: 20 }).flock(fd, LOCK_SH))
    const before = hanging.count()
    expect(await close(fd)).toBe(0)
    expect(hanging.count()).toBe(before)
    hanging.end()
    await error.back
    await vi.waitFor(() => expect(hanging.count()).toBe(before - 1), WAIT)
  })

  test('128 times, is the last: others are refused, but closing is not', async ({ hanging }) => {
    const fds = Array.from({ length: 128 }, () => hanging.open())
    const stuck = await Promise.all(fds.map((fd, i) => givenUp(within({ left: 300 }, `file ${i}`).flock(fd, LOCK_SH))))
    const begun = stuck.filter(({ hasBegun }) => hasBegun)
    // Those that had to wait for a thread in vain are tried again, until all have had one.
    while (begun.length < 128) {
      const error = await givenUp(within({ left: 300 }, `file ${begun.length} more`).flock(hanging.open(), LOCK_SH))
      if (error.hasBegun) begun.push(error)
    }
    expect(binding().workersSync()).toMatchObject({ givenUp: 128 })
    expect(threads().length).toBeLessThanOrEqual(160)
    await expect(binding().pageSize()).rejects.toBeInstanceOf(NoThread)
    await expect(new Sequence().run()).rejects.toBeInstanceOf(NoThread)
    expect(listUnanswering()).toHaveLength(128)
    const fd = openSync(hanging.path, O_RDONLY)
    expect(await close(fd)).toBe(0)
    hanging.end()
    expect(await Promise.all(begun.map(({ back }) => back))).toEqual(begun.map(() => 0))
    await vi.waitFor(async () => expect(await binding().pageSize()).toBe(binding().pageSizeSync()), WAIT)
  })
})

describe('a call that the thread of JavaScript waits for', () => {
  test('has its answer at once, and fills what it is given', async ({ image }) => {
    await using device = await attach(image('disk', 2 << 20))
    const size = newU64()
    expect(callWithinSync(limit(20_000), device.number, 'blkGetSize64', device.fd, size)).toBe(0)
    expect(decodeU64(size)).toBe(2n << 20n)
    const sequence = new Sequence()
    const status = sequence.call('blkGetSize64', device.fd, size.fill(0))
    const failed = sequence.call('fsync', -1)
    const never = sequence.call('pageSize')
    sequence.runWithinSync(limit(20_000), device.number)
    expect([status.answer, failed.answer, never.answer]).toEqual([0, -constants.errno.EBADF, undefined])
    expect(decodeU64(size)).toBe(2n << 20n)
    // and what others wait for is told as ever
    expect(await binding().pageSize()).toBe(binding().pageSizeSync())
  })

  test('is given up on when its time is up, and undone when it comes back', async ({ hanging }) => {
    const fd = hanging.open()
    const before = hanging.count()
    const sequence = new Sequence()
    const opened = sequence.call('open', encodePath(hanging.path), O_RDONLY)
    const locked = sequence.call('flock', fd, LOCK_SH)
    const never = sequence.call('pageSize')
    const error = givenUpSync(() => sequence.runWithinSync(20, hanging.path))
    expect(error).toMatchObject({ call: 'sequence', asked: hanging.path, hasBegun: true })
    expect(opened.answer).toBe(undefined)
    expect(hanging.count()).toBe(before + 1)
    expect(listUnanswering()).toEqual([hanging.path])
    expect(binding().workersSync()).toMatchObject({ givenUp: 1 })
    hanging.end()
    await error.back
    expect([opened.succeeded, locked.answer, never.answer]).toEqual([true, 0, undefined])
    expect(hanging.count()).toBe(before)
    expect(listUnanswering()).toEqual([])
  })

  test('begins although others of the same device are stuck', async ({ hanging }) => {
    const stuck = await givenUp(within({ left: 20 }, 7).flock(hanging.open(), LOCK_SH))
    expect(callWithinSync(limit(20_000), 7, 'pageSize')).toBe(binding().pageSizeSync())
    hanging.end()
    await stuck.back
  })

  test('leaves the descriptor to the call that hangs with it', async ({ hanging }) => {
    const fd = openSync(hanging.path, O_RDWR)
    expect(callWithinSync(20, undefined, 'flock', fd, LOCK_SH)).toBe(undefined)
    const before = hanging.count()
    closeWithinSync(fd, limit(20_000))
    expect(hanging.count()).toBe(before)
    hanging.end()
    await vi.waitFor(() => expect(hanging.count()).toBe(before - 1), WAIT)
  })

  test('is not mistaken for another one: what has settled is not waited for', async () => {
    const { lastCallSync, waitSync, giveUpSync } = binding()
    const promise = binding().pageSize()
    const call = lastCallSync()
    expect(waitSync(call, limit(20_000))).toBe(binding().pageSizeSync())
    expect(await promise).toBe(binding().pageSizeSync())
    expect(waitSync(call, limit(20_000))).toBe(null)
    expect(giveUpSync(call)).toBe(0)
    for (const other of [-1, 0.5, Number.NaN, 2 ** 60]) expect(waitSync(other, limit(20_000))).toBe(null)
  })
})

const FIXTURE = fileURLToPath(new URL('fixtures/hanging.mjs', import.meta.url))

describe('the end', () => {
  for (const [how, code] of [
    ['exit', 7],
    ['given-up', 0],
  ] as const) {
    test(`of a process does not wait for a call that hangs: ${how}`, async ({ hanging }) => {
      const child = execFile(process.execPath, [FIXTURE, how, hanging.path], { timeout: limit(15_000) })
      const [exitCode, signal] = (await once(child, 'exit')) as [number | null, string | null]
      expect({ exitCode, signal }).toEqual({ exitCode: code, signal: null })
    })
  }

  for (const how of ['terminated', 'ended'] as const) {
    test(`of a worker thread closes what it opened, but what a call uses when that is back: ${how}`, async ({
      hanging,
    }) => {
      const before = hanging.count()
      const worker = new Worker(FIXTURE, { workerData: { path: hanging.path, how } })
      await once(worker, 'message')
      // two that it keeps, two that are used by calls that hang, one of a sequence that hangs
      await vi.waitFor(() => expect(hanging.count()).toBe(before + 5), WAIT)
      const exit = once(worker, 'exit')
      if (how === 'terminated') await worker.terminate()
      else worker.postMessage('end', [])
      await exit
      expect(hanging.count()).toBe(before + 3)
      hanging.end()
      await vi.waitFor(() => expect(hanging.count()).toBe(before), WAIT)
    })
  }

  test('of a worker thread leaves alone what it has closed', async ({ hanging }) => {
    const before = hanging.count()
    const worker = new Worker(FIXTURE, { workerData: { path: hanging.path, how: 'closed' } })
    const [fds] = (await once(worker, 'message')) as [number[]]
    // the same numbers, by others
    const ours = fds.map(() => hanging.open())
    expect(new Set(ours)).toEqual(new Set(fds))
    const exit = once(worker, 'exit')
    worker.postMessage('end', [])
    await exit
    expect(hanging.count()).toBe(before + ours.length)
  })
})
