import { once } from 'node:events'
import { setImmediate } from 'node:timers/promises'
import * as fc from 'fast-check'
import { afterEach, describe, expect, test, vi } from 'vitest'

type OnPool = typeof import('../../lib/kernel/pool.ts').onPool

afterEach(() => {
  vi.unstubAllEnvs()
})

/** A pool of its own, made under that UV_THREADPOOL_SIZE. */
async function poolUnder(size: string | undefined): Promise<OnPool> {
  vi.resetModules()
  vi.stubEnv('UV_THREADPOOL_SIZE', size)
  return (await import('../../lib/kernel/pool.ts')).onPool
}

/** Jobs that run until they are told to end. */
class Jobs {
  readonly started: number[] = []
  readonly results: Promise<number>[] = []
  readonly #ends = new Map<number, { resolve: () => void; reject: (error: Error) => void }>()

  add(onPool: OnPool): void {
    const job = this.results.length
    const result = onPool(async () => {
      this.started.push(job)
      await new Promise<void>((resolve, reject) => this.#ends.set(job, { resolve, reject }))
      return job
    })
    // looked at later
    result.catch(() => {})
    this.results.push(result)
  }

  get running(): number[] {
    return [...this.#ends.keys()]
  }

  async end(job: number, error?: Error): Promise<void> {
    const { resolve, reject } = this.#ends.get(job) ?? expect.fail(`job ${job} does not run`)
    this.#ends.delete(job)
    if (error) reject(error)
    else resolve()
    // whatever follows from it has happened after that
    await setImmediate()
  }
}

/** How many of more jobs than libuv can have threads run at once. */
async function slotsUnder(size: string | undefined): Promise<number> {
  const onPool = await poolUnder(size)
  const jobs = new Jobs()
  for (let i = 0; i < 1100; i++) jobs.add(onPool)
  await setImmediate()
  return jobs.running.length
}

describe('onPool', () => {
  for (const [size, slots] of [
    [undefined, 2],
    ['1', 1],
    ['2', 1],
    ['3', 1],
    ['4', 2],
    ['5', 2],
    ['64', 32],
    ['1024', 512],
    // libuv has no more than 1024
    ['100000', 512],
  ] as const) {
    test(`with UV_THREADPOOL_SIZE ${size ?? 'unset'} it runs ${slots} at once`, async () => {
      expect(await slotsUnder(size)).toBe(slots)
    })
  }

  test('with UV_THREADPOOL_SIZE 0 or no number, which libuv takes for 1, it runs 1 at once', async () => {
    expect([await slotsUnder('0'), await slotsUnder('many'), await slotsUnder('')]).toEqual([1, 1, 1])
  })

  test('the first come is the first served, whoever ends when, and never more at once than there are slots', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom(['1', 1] as const, ['4', 2] as const, ['8', 4] as const),
        fc.array(fc.oneof(fc.constant('come' as const), fc.nat(100)), { maxLength: 40 }),
        async ([size, slots], steps) => {
          const onPool = await poolUnder(size)
          const jobs = new Jobs()
          const check = () => {
            const { started, running, results } = jobs
            expect(started).toEqual([...started.keys()])
            // no slot is idle while somebody waits, and none is there twice
            const ended = started.length - running.length
            expect(running).toHaveLength(Math.min(slots, results.length - ended))
          }
          for (const step of steps) {
            if (step === 'come') jobs.add(onPool)
            else if (jobs.running.length > 0) await jobs.end(jobs.running[step % jobs.running.length] ?? -1)
            await setImmediate()
            check()
          }
          while (jobs.running.length > 0) {
            await jobs.end(jobs.running[0] ?? -1)
            check()
          }
          expect(await Promise.all(jobs.results)).toEqual([...jobs.results.keys()])
        },
      ),
      { numRuns: 50 },
    )
  })

  test('who comes in the moment a slot gets free does not overtake those who wait', async () => {
    const onPool = await poolUnder('1')
    const order: string[] = []
    const first = onPool(async () => {
      order.push('first')
    })
    const waiting = onPool(async () => {
      order.push('waiting')
    })
    const late = first.then(() =>
      onPool(async () => {
        order.push('late')
      }),
    )
    await Promise.all([waiting, late])
    expect(order).toEqual(['first', 'waiting', 'late'])
  })

  test('a job that fails rejects with its error, and frees its slot', async () => {
    const onPool = await poolUnder('1')
    const jobs = new Jobs()
    for (let i = 0; i < 3; i++) jobs.add(onPool)
    const error = new Error('failed')
    await jobs.end(0, error)
    await expect(jobs.results[0]).rejects.toBe(error)
    expect(jobs.running).toEqual([1])
    await jobs.end(1, error)
    await jobs.end(2)
    expect(await jobs.results[2]).toBe(2)
  })

  test('a job that throws before it has begun frees its slot too', async () => {
    const onPool = await poolUnder('1')
    const error = new Error('thrown')
    for (let i = 0; i < 3; i++) {
      const failing = onPool(() => {
        throw error
      })
      await expect(failing).rejects.toBe(error)
    }
    expect(await onPool(async () => 'next')).toBe('next')
  })
})

const soon = () => Promise.resolve(7)

/** Until it is aborted. */
async function hang({ signal }: AbortController): Promise<void> {
  if (!signal.aborted) await once(signal, 'abort')
}

describe('onPoolWithin', () => {
  test('what never comes back is given up and takes no slot; what waits for one does not begin late', async () => {
    const { onPool, onPoolWithin } = await import('../../lib/kernel/pool.ts')
    expect(await onPoolWithin(1_000, soon)).toBe(7)
    const [comeBack, end] = [new AbortController(), new AbortController()]
    expect(await onPoolWithin(1, () => hang(comeBack))).toBe(undefined)
    // While that one is stuck no other is tried, and others have all the slots.
    expect(await onPoolWithin(1_000, soon)).toBe(undefined)
    expect(await onPool(soon)).toBe(7)
    comeBack.abort()
    await setImmediate()
    expect(await onPoolWithin(1_000, soon)).toBe(7)

    const busy = Array.from({ length: 1024 }, () => onPool(() => hang(end)))
    let began = false
    const late = await onPoolWithin(1, async () => {
      began = true
    })
    expect(late).toBe(undefined)
    end.abort()
    await Promise.all(busy)
    expect(await onPool(soon)).toBe(7)
    expect(began).toBe(false)
  })
})
