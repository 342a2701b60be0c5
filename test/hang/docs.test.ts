import { readFileSync } from 'node:fs'
import { describe, expect, vi } from 'vitest'
import { attach } from '../../lib/index.ts'
import type * as deadlines from '../../lib/common/deadline.ts'
import { test } from '../kernel/support.ts'
import { CALLS, FUNCTIONS } from './calls.ts'

/** Default times in the order in which they were asked for. */
const asked: number[] = vi.hoisted(() => [])

vi.mock(import('../../lib/common/deadline.ts'), async (importOriginal) => {
  const original: typeof deadlines = await importOriginal()
  return {
    ...original,
    checkDeadline(given, timeout) {
      asked.push(timeout)
      return original.checkDeadline(given, timeout)
    },
    checkWait(options, timeout) {
      asked.push(timeout)
      return original.checkWait(options, timeout)
    },
  }
})

const TEXT = readFileSync(new URL('../../docs/waiting.md', import.meta.url), 'utf8')

/** Functions, and their default times as they are written. */
const ROWS = new Map(
  [...TEXT.matchAll(/^\| (`.+?`) +\| ([^|]+?) +\|/gm)].flatMap(([, names = '', time = '']) =>
    [...names.matchAll(/`([^`]+)`/g)].map(([, name = '']) => [name, time] as const),
  ),
)

describe('docs/waiting.md', () => {
  test('has every function', () => {
    expect([...ROWS.keys()].toSorted()).toEqual([...FUNCTIONS].toSorted())
  })

  const TAKES_NONE = new Set(['watch', 'doctor'])
  const ENDLESS = new Set(['LoopDevice.changeBackingFile', 'LoopDevice.migrate'])
  const timed = [...FUNCTIONS].filter((name) => !TAKES_NONE.has(name))

  test.for(timed)('says the default time of %s', async (name, { image, folder }) => {
    const device = await attach(image('a'), { readOnly: true })
    const each = CALLS.find((one) => one.name === name || one.name.startsWith(`${name}:`))
    const scene = { device, served: image('b'), healthy: image('c'), free: `${folder}/d`, servedFree: `${folder}/e` }
    asked.length = 0
    // Aborted before it begins, it gets no further than to its time.
    const reason = new Error('not at all')
    const calling = expect(each?.call(scene, { signal: AbortSignal.abort(reason) }))
    await (name.endsWith('.close') ? calling.resolves.toBe(undefined) : calling.rejects.toBe(reason))
    // The control device is opened first, with the same time as its methods have.
    const [first = Number.NaN] = asked
    const written = first === Number.POSITIVE_INFINITY ? 'none' : `${first.toLocaleString('en').replace(',', ' ')} ms`
    expect(ROWS.get(name)).toBe(written)
    expect(ENDLESS.has(name)).toBe(written === 'none')
    await device.close()
  })
})
