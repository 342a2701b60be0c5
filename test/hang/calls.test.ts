import { afterAll, describe, expect, test as plain } from 'vitest'
import * as api from '../../lib/index.ts'
import { attach, LoopControl, LoopDevice, LoopError, open } from '../../lib/index.ts'
import { sysfs } from '../kernel/support.ts'
import { limit } from '../scale.ts'
import { type Call, CALLS, FUNCTIONS, type Scene } from './calls.ts'
import { type Ending, endingOf, ERRORS, makeImage, SECOND, type Server, SLOW } from './server.ts'
import { expectNoCallLeft, test } from './support.ts'

/** They wait for nothing and nobody, or have tests of their own. */
const ELSEWHERE = new Set([
  'LoopError',
  'LoopDevice',
  'LoopControl',
  'LoopDevice.constructor',
  'LoopControl.constructor',
])
/** On the main thread, with a test of its own. */
const WITHOUT_WAIT = new Set(['LoopDevice.detachSync'])

function methodsOf(name: string, prototype: object): string[] {
  return Object.entries(Object.getOwnPropertyDescriptors(prototype)).flatMap(([key, { value }]) =>
    typeof value === 'function' ? [`${name}.${key}`] : [],
  )
}

plain('every function of the API is among the calls', () => {
  const all = [
    ...Object.keys(api),
    ...methodsOf('LoopDevice', LoopDevice.prototype),
    ...methodsOf('LoopControl', LoopControl.prototype),
    'LoopControl.open',
  ]
  const wanted = all.filter((name) => !ELSEWHERE.has(name) && !WITHOUT_WAIT.has(name))
  expect([...FUNCTIONS].toSorted()).toEqual(wanted.toSorted())
})

const STATES: Record<string, (server: Server) => Promise<void>> = {
  stopped: (server) => server.stop(),
  killed: (server) => server.kill(),
  slow: (server) => server.behave(SLOW),
  errors: (server) => server.behave(ERRORS),
}

/** The error is told by its reason, and names what has not answered. */
function expectGivenUp(ending: Ending<unknown>, { device, served, servedFree, healthy }: Scene): void {
  if (ending === 'hangs' || !('error' in ending)) expect.fail(`it ended with ${JSON.stringify(ending)}`)
  const { error } = ending
  if (!LoopError.is(error, 'timeout')) expect.fail(String(error))
  expect([device.path, served, servedFree, healthy]).toContain(error.path)
}

function expectEnding(ending: Ending<unknown>, wanted: string): void {
  if (wanted === 'done') expect(ending).toHaveProperty('value')
  else expect(ending).toMatchObject({ error: { name: 'LoopError', reason: wanted } })
}

function wantedOf({ stopped, killed }: Call, state: string): string {
  if (state === 'slow') return 'ends'
  return state === 'stopped' ? stopped : killed
}

/**
 * Its endings with a timeout, and with a signal, of a second, side by side, while the server is in that state. What is not
 * to be given up has more time: on a busy machine a second can be too short for it.
 */
async function callTwice(
  each: Call,
  folder: string,
  server: Server,
  state: string,
): Promise<{ scene: Scene; ending: Ending<unknown>; signal: AbortSignal | undefined }[]> {
  const { call, options, signalOnly, takesLong } = each
  const isToEnd = !['waits', 'half', 'ends'].includes(wantedOf(each, state))
  const time = isToEnd ? limit(5 * SECOND) : SECOND
  const scenes: Scene[] = []
  for (const name of signalOnly ? ['signal'] : ['timeout', 'signal']) {
    scenes.push({
      device: await attach(server.image(`${name}.img`), options),
      served: server.image(`${name}.other`),
      healthy: makeImage(`${folder}/${name}.img`),
      free: `${folder}/${name}.new`,
      servedFree: `${server.folder}/${name}.new`,
    })
  }
  await STATES[state]?.(server)
  const endings = await Promise.all(
    scenes.map(async (scene) => {
      const isTimed = scene.served.endsWith('/timeout.other')
      const signal = isTimed ? undefined : AbortSignal.timeout(time)
      const ending = await endingOf(
        call(scene, signal ? { signal } : { timeout: time }),
        isToEnd || takesLong ? limit(10 * SECOND) : undefined,
      )
      return { scene, ending, signal }
    }),
  )
  await server.recover()
  await Promise.all(scenes.map(async ({ device }) => letGo(device, server)))
  return endings
}

/** What was given up on can have been done all the same: a device that was released is to be detached here. */
async function letGo(device: LoopDevice, server: Server): Promise<void> {
  await device.close()
  const { number } = device
  if (!sysfs(number, 'loop/backing_file')?.startsWith(`${server.folder}/`)) return
  try {
    // Closed also where the detach is refused: a device that is going has to be let go.
    await using left = await open(number)
    await left.detach({ lazy: true })
  } catch (error) {
    // It was just going.
    if (!LoopError.is(error, 'not-attached') && !LoopError.is(error, 'detaching')) throw error
  }
}

describe.concurrent.each(['stopped', 'killed', 'errors', 'slow'] as const)('under a server that is %s', (state) => {
  afterAll(expectNoCallLeft)

  test.for(CALLS)('$name', async (each, { folder, server }) => {
    for (const { scene, ending, signal } of await callTwice(each, folder, server, state)) {
      expect(ending, 'it has not ended').not.toBe('hangs')
      const wanted = wantedOf(each, state)
      if (wanted === 'ends') continue
      const isGivenUp = wanted === 'waits' || (wanted === 'half' && signal !== undefined)
      if (!isGivenUp) expectEnding(ending, wanted === 'half' ? 'done' : wanted)
      else if (signal) expect(ending).toEqual({ error: signal.reason as unknown })
      else expectGivenUp(ending, scene)
    }
  })
})
