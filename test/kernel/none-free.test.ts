/** Where no device is free one is made, and nothing is left of it. What other programs have free stays theirs. */

import { existsSync } from 'node:fs'
import { afterEach, beforeEach, describe, expect, vi } from 'vitest'
import { attach, doctor } from '../../lib/index.ts'
import { limit } from '../scale.ts'
import { removeDevice, sysfs, test } from './support.ts'

const made: number[] = []
let onMade = () => {}

vi.mock(import('../../lib/handle/free-devices.ts'), async (original) => ({
  ...(await original()),
  likelyFree: () => undefined,
  findFree: async () => [],
}))

vi.mock(import('../../lib/attach/loop-control.ts'), async (original) => {
  const { addDevice, ...others } = await original()
  return {
    ...others,
    addDevice: async (...given) => {
      const number = await addDevice(...given)
      made.push(number)
      onMade()
      return number
    },
  }
})

beforeEach(() => {
  made.length = 0
  onMade = () => {}
})

afterEach(async () => void (await Promise.all(made.map(removeDevice))))

function left(): number[] {
  return made.filter((number) => existsSync(`/sys/block/loop${number}`))
}

describe('where no device is free', () => {
  test('one is made', async ({ image }) => {
    const file = image('disk')
    await using device = await attach(file)
    expect(made).toEqual([device.number])
    expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
    await device.detach()
  })

  test('an attach that is given up removes what it has made', async ({ image }) => {
    const controller = new AbortController()
    const reason = new Error('enough')
    onMade = () => controller.abort(reason)
    await expect(attach(image('disk'), { signal: controller.signal })).rejects.toBe(reason)
    expect(made).toHaveLength(1)
    // Another program that looks at every device has it open for a moment.
    await vi.waitFor(() => expect(left()).toEqual([]), { timeout: limit(5_000) })
  })

  test('doctor() attaches, and removes what it has made', async () => {
    const { canAttach } = await doctor()
    expect(canAttach).toBe(true)
    expect(made.length).toBeGreaterThan(0)
    expect(left()).toEqual([])
  })
})
