import { getEventListeners } from 'node:events'
import * as fc from 'fast-check'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { backoff, Deadline } from '../../lib/common/deadline.ts'

const HOUR = 3_600_000

beforeEach(() => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'performance'] })
})

afterEach(() => {
  vi.useRealTimers()
  vi.restoreAllMocks()
})

function listeners({ signal }: AbortController): number {
  return getEventListeners(signal, 'abort').length
}

/** What becomes of the promise, as far as that is known. */
function outcome(promise: Promise<unknown>): () => unknown {
  let known: unknown = 'pending'
  promise.then(
    (value) => (known = { value }),
    (error: unknown) => (known = { error }),
  )
  return () => known
}

describe('Deadline', () => {
  test('what is left gets less, and is never less than nothing', () => {
    const deadline = new Deadline(1000)
    expect(deadline.left).toBe(1000)
    vi.advanceTimersByTime(400)
    expect(deadline.left).toBe(600)
    vi.advanceTimersByTime(10_000)
    expect(deadline.left).toBe(0)
  })

  test('without an end there is always something left', async () => {
    const deadline = new Deadline(Number.POSITIVE_INFINITY)
    vi.advanceTimersByTime(HOUR)
    expect(deadline.left).toBe(Number.POSITIVE_INFINITY)
    const paused = deadline.pause(5)
    await vi.advanceTimersByTimeAsync(5)
    expect(await paused).toBe(true)
  })

  test('a pause waits as long as asked, and answers true', async () => {
    const result = outcome(new Deadline(1000).pause(300))
    await vi.advanceTimersByTimeAsync(299)
    expect(result()).toBe('pending')
    await vi.advanceTimersByTimeAsync(1)
    expect(result()).toEqual({ value: true })
  })

  test('a pause ends with the time that is left; the next answers false at once', async () => {
    const deadline = new Deadline(1000)
    vi.advanceTimersByTime(900)
    const result = outcome(deadline.pause(HOUR))
    await vi.advanceTimersByTimeAsync(99)
    expect(result()).toBe('pending')
    await vi.advanceTimersByTimeAsync(1)
    expect(result()).toEqual({ value: true })
    expect(await deadline.pause(1)).toBe(false)
    expect(vi.getTimerCount()).toBe(0)
  })

  test('a timeout of 0 leaves nothing: a pause answers false without a timer', async () => {
    expect(await new Deadline(0).pause(HOUR)).toBe(false)
    expect(await new Deadline(0, new AbortController().signal).pause(HOUR)).toBe(false)
    expect(vi.getTimerCount()).toBe(0)
  })

  test('aborted before, it throws the reason itself, and a pause rejects with it even where nothing is left', async () => {
    const reason = new Error('enough')
    for (const timeout of [0, 1000]) {
      const deadline = new Deadline(timeout, AbortSignal.abort(reason))
      let thrown: unknown
      try {
        deadline.throwIfAborted()
      } catch (error) {
        thrown = error
      }
      expect(thrown).toBe(reason)
      await expect(deadline.pause(10)).rejects.toBe(reason)
    }
    expect(vi.getTimerCount()).toBe(0)
  })

  test('not aborted, or without a signal, it throws nothing', () => {
    expect(() => new Deadline(0).throwIfAborted()).not.toThrow()
    expect(() => new Deadline(0, new AbortController().signal).throwIfAborted()).not.toThrow()
  })

  test('aborted during a pause, it rejects at once with the reason, whatever that is', async () => {
    for (const reason of [new Error('enough'), 'a text', null]) {
      const controller = new AbortController()
      const result = outcome(new Deadline(HOUR, controller.signal).pause(HOUR))
      await vi.advanceTimersByTimeAsync(10)
      expect(result()).toBe('pending')
      controller.abort(reason)
      await vi.advanceTimersByTimeAsync(0)
      expect(result()).toEqual({ error: reason })
      expect(vi.getTimerCount()).toBe(0)
      expect(listeners(controller)).toBe(0)
    }
  })

  test('a pause has one listener while it lasts, and none afterwards', async () => {
    const controller = new AbortController()
    const deadline = new Deadline(HOUR, controller.signal)
    for (let i = 0; i < 3; i++) {
      const paused = deadline.pause(10)
      expect(listeners(controller)).toBe(1)
      await vi.advanceTimersByTimeAsync(10)
      expect(await paused).toBe(true)
      expect(listeners(controller)).toBe(0)
    }
  })

  test('an abort after a pause changes nothing of it, and ends the next', async () => {
    const controller = new AbortController()
    const deadline = new Deadline(HOUR, controller.signal)
    const first = outcome(deadline.pause(10))
    await vi.advanceTimersByTimeAsync(10)
    controller.abort(new Error('late'))
    await vi.advanceTimersByTimeAsync(0)
    expect(first()).toEqual({ value: true })
    await expect(deadline.pause(10)).rejects.toThrow('late')
  })
})

describe('backoff', () => {
  test('is never 0 and never more than 50 ms', () => {
    for (const random of [0, 0.5, 1 - Number.EPSILON]) {
      vi.spyOn(Math, 'random').mockReturnValue(random)
      fc.assert(
        fc.property(fc.integer({ min: 1, max: 2 ** 31 - 1 }), (attempt) => {
          expect(backoff(attempt)).toBeGreaterThanOrEqual(0.5)
          expect(backoff(attempt)).toBeLessThanOrEqual(50)
        }),
        { examples: [[1], [5], [6], [7], [1100]] },
      )
    }
  })

  test('begins with a millisecond or so, and gets longer', () => {
    vi.spyOn(Math, 'random').mockReturnValue(0.5)
    const waits = Array.from({ length: 20 }, (_, i) => backoff(i + 1))
    expect(waits[0]).toBe(1)
    expect(waits).toEqual(waits.toSorted((a, b) => a - b))
    expect(waits.at(-1)).toBeGreaterThan(25)
  })

  test('two that begin together do not stay in step', () => {
    vi.spyOn(Math, 'random').mockReturnValueOnce(0.1).mockReturnValueOnce(0.9)
    expect(backoff(3)).toBeLessThan(backoff(3))
  })
})
