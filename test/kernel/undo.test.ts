import { execFileSync } from 'node:child_process'
import { closeSync, openSync, readdirSync, statSync } from 'node:fs'
import { afterEach, describe, expect, vi } from 'vitest'
import { attach, type AttachOptions, LoopControl, type LoopDevice, LoopError } from '../../lib/index.ts'
import { loopCtlAddSync } from '../../lib/ioctl.ts'
import { observe } from '../../lib/kernel/seam.ts'
import { knownPartitions, sfdisk, TWO, unusedNumber } from './partitioned.ts'
import { needs } from '../needs.ts'
import { countDescriptors, failure, sysfs, test } from './support.ts'
import { limit } from '../scale.ts'

afterEach(() => {
  observe(undefined)
  vi.restoreAllMocks()
})

/** The calls that an undisturbed attach makes. */
async function countCalls(operation: () => Promise<unknown>, inSequences: boolean): Promise<number> {
  let calls = 0
  observe(() => void calls++, { inSequences })
  await operation()
  observe(undefined)
  return calls
}

function nodes(): string[] {
  return readdirSync('/dev').filter((name) => name.startsWith('loop'))
}

describe('an attach that is given up at its k-th call, for every k, leaves nothing', () => {
  const cases: (readonly [string, AttachOptions])[] = [
    ['any free device', {}],
    ['a device that has to be made', { number: 0 }],
    ['everything asked for', { readOnly: true, offset: 512, sizeLimit: 8192, directIO: 'prefer', partscan: true }],
    ['reuse of what is not there', { overlap: 'reuse' }],
    ['partitions that the kernel is told of', { partscan: 'user' }],
    ['the same, of a device that has to be made', { partscan: 'user', number: 0 }],
  ]
  for (const [name, given] of cases) {
    for (const how of ['aborted', 'aborted, in sequences', 'out of time'] as const) {
      const inSequences = how === 'aborted, in sequences'
      // What is done in one sequence is done, however late.
      const isOne = how === 'out of time' && given.number === undefined && !given.directIO
      test(`${name}, ${how}`, { timeout: limit(60_000) }, async ({ image }) => {
        if (given.partscan === 'user') needs('sfdisk')
        const file = image('disk', 8 << 20)
        if (given.partscan === 'user') sfdisk(file, TWO)
        const number = unusedNumber()
        const options = given.number === undefined ? given : { ...given, number }
        const removeMade = async () => {
          if (options.number === undefined) return
          await using control = await LoopControl.open()
          await control.remove(number)
        }
        const undisturbed: LoopDevice[] = []
        const calls = await countCalls(async () => undisturbed.push(await attach(file, options)), inSequences)
        for (const device of undisturbed) await device.detach()
        await removeMade()
        expect(calls).toBeGreaterThan(10)

        const before = { descriptors: countDescriptors(), nodes: nodes() }
        const reason = new Error('enough')
        let rejected = 0
        for (let k = 1; k <= calls; k++) {
          const controller = new AbortController()
          let seen = 0
          observe(
            () => {
              if (++seen !== k) return
              if (how !== 'out of time') controller.abort(reason)
              else {
                const late = performance.now() + 1e6
                vi.spyOn(performance, 'now').mockReturnValue(late)
              }
            },
            { inSequences },
          )
          let error: unknown
          try {
            const device = await attach(file, { ...options, signal: controller.signal, timeout: 60_000 })
            observe(undefined)
            vi.restoreAllMocks()
            expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
            expect(Object.keys(knownPartitions(device.number))).toHaveLength(options.partscan === 'user' ? 2 : 0)
            expect(await device.detach()).toBe('detached')
            await removeMade()
          } catch (caught) {
            error = caught
            rejected++
            observe(undefined)
            vi.restoreAllMocks()
            if (how !== 'out of time') expect(error, `call ${k}`).toBe(reason)
            else expect(error, `call ${k}`).toSatisfy((e) => LoopError.is(e, 'timeout'))
          }
          expect(losetupOf(file), `call ${k}`).toBe('')
          expect(countDescriptors(), `descriptors after call ${k}`).toBe(before.descriptors)
          expect(nodes(), `nodes after call ${k}`).toEqual(before.nodes)
        }
        // before the switch to success there were many chances to give up; most of the work on partitions is after that
        if (!isOne) expect(rejected).toBeGreaterThan(options.partscan === 'user' ? 10 : calls / 4)
      })
    }
  }
})

test('a failed attach does not remove a free device that was there, though another is made meanwhile', async ({
  image,
}) => {
  await using control = await LoopControl.open()
  const free = await control.getFree()
  // it may have been made this moment
  await vi.waitUntil(() => Date.now() - statSync(`/dev/loop${free}`).birthtimeMs > 100, limit(1_000))
  const other = unusedNumber()
  const fd = openSync('/dev/loop-control', 'r+')
  try {
    observe((call) => {
      if (call !== 'sysfsLoop') return
      observe(undefined)
      loopCtlAddSync(fd, other)
    })
    const file = image('disk')
    await failure('direct-io-unavailable', () => attach(file, { directIO: true, offset: 100, readOnly: true }))
    expect(sysfs(other, 'size')).toBe('0')
    expect(sysfs(free, 'size')).toBe('0')
  } finally {
    closeSync(fd)
    await control.remove(other)
  }
})

function losetupOf(file: string): string {
  return execFileSync('losetup', ['--associated', file], { encoding: 'utf8' })
}
