import { execFileSync } from 'node:child_process'
import { closeSync, openSync, readdirSync, statSync } from 'node:fs'
import { afterEach, describe, expect, vi } from 'vitest'
import { attach, type AttachOptions, LoopControl, type LoopDevice, LoopError } from '../../lib/index.ts'
import { loopCtlAddSync } from '../../lib/ioctl.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import { knownPartitions, OWN_LENGTH, partitionsOfLength, sfdisk } from './partitioned.ts'
import { needs } from '../needs.ts'
import { countDescriptors, failure, removeDevice, sysfs, test, unusedNumber } from './support.ts'
import { eachCall, limit, STEP } from '../scale.ts'

function reasonOf(error: unknown): string | undefined {
  return LoopError.is(error) ? error.reason : undefined
}

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

const TABLE = `label: gpt\nstart=2048, size=2048\nstart=4096, size=${OWN_LENGTH}\n`

/** Nodes of that device and of its partitions, and partitions of the test wherever they are. */
function remains(number: number): string[] {
  const nodes = readdirSync('/dev').filter((name) => name === `loop${number}` || name.startsWith(`loop${number}p`))
  return [...nodes, ...partitionsOfLength(OWN_LENGTH)]
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
        if (given.partscan === 'user') sfdisk(file, TABLE)
        const number = unusedNumber()
        const options = given.number === undefined ? given : { ...given, number }
        const removeMade = async () => {
          if (options.number === undefined) return
          await removeDevice(number)
        }
        // The fewest of some attaches are those of one that no other program got in the way of.
        let calls = Infinity
        for (let i = 0; i < 5; i++) {
          const attached: LoopDevice[] = []
          calls = Math.min(calls, await countCalls(async () => attached.push(await attach(file, options)), inSequences))
          for (const device of attached) await device.detach()
          await removeMade()
        }
        expect(calls).toBeGreaterThan(10)

        expect(remains(number)).toEqual([])
        const descriptors = countDescriptors()
        const reason = new Error('enough')
        let rejected = 0
        for (const k of eachCall(calls)) {
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
            // Contention is what kept it until then, where another program had just taken the device.
            else expect(['timeout', 'contention'], `call ${k}: ${String(error)}`).toContain(reasonOf(error))
          }
          // Another program that was offered the same device can have it open for a moment.
          await vi.waitFor(() => expect(losetupOf(file), `call ${k}`).toBe(''), { timeout: limit(5_000), interval: 5 })
          expect(countDescriptors(), `descriptors after call ${k}`).toBe(descriptors)
          expect(remains(number), `nodes and partitions after call ${k}`).toEqual([])
        }
        // before the switch to success there were many chances to give up; most of the work on partitions is after that
        if (!isOne) expect(rejected * STEP).toBeGreaterThan(options.partscan === 'user' ? 10 : calls / 4)
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
    // There; another program may have attached it meanwhile
    expect(sysfs(free, 'size')).toMatch(/^\d+$/)
  } finally {
    closeSync(fd)
    await control.remove(other)
  }
})

function losetupOf(file: string): string {
  return execFileSync('losetup', ['--associated', file], { encoding: 'utf8' })
}
