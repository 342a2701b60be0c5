import { spawn } from 'node:child_process'
import { existsSync, rmdirSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, test as plain } from 'vitest'
import { attach } from '../../lib/index.ts'
import { makeProgram } from '../../lib/cli/commands.ts'
import { makeImage, SECOND, type Server } from './server.ts'
import { limit } from '../scale.ts'
import { expectNoCallLeft, test } from './support.ts'

afterAll(expectNoCallLeft)

const MAIN = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url))

interface Place {
  /** Attached to a file of the server. */
  device: string
  served: string
  /** Of another filesystem. */
  healthy: string
  free: string
  servedFree: string
}

/** The words of each command, and how it exits when it is given a second: 130 is for Ctrl-C after that time. */
const COMMANDS: [name: string, words: (place: Place) => string[], status: number][] = [
  ['attach', ({ served }) => [served, '--timeout', `${SECOND}`], 1],
  ['run', ({ served }) => ['--timeout', `${SECOND}`, served, '--', 'true'], 1],
  ['detach', ({ device }) => [device, '--timeout', `${SECOND}`], 1],
  ['detach', ({ device }) => [device, '--lazy', '--timeout', `${SECOND}`], 1],
  ['detach', ({ served }) => ['--file', served, '--timeout', `${SECOND}`], 1],
  ['mount', ({ served, free }) => [served, free, '--make-dir', '--timeout', `${SECOND}`], 1],
  ['umount', ({ servedFree }) => [servedFree, '--timeout', `${SECOND}`], 1],
  ['create', ({ servedFree }) => [servedFree, '1M', '--timeout', `${SECOND}`], 1],
  ['list', () => ['--timeout', `${SECOND}`], 0],
  ['list', ({ served }) => [served, '--timeout', `${SECOND}`], 1],
  ['list', ({ healthy }) => [healthy, '--timeout', `${SECOND}`], 0],
  ['status', ({ device }) => [device, '--timeout', `${SECOND}`], 0],
  ['change', ({ device, healthy }) => [device, healthy, '--timeout', `${SECOND}`], 1],
  ['migrate', ({ device, free }) => [device, free, '--timeout', `${SECOND}`], 1],
  ['resize', ({ device }) => [device, '--timeout', `${SECOND}`], 1],
  ['set', ({ device }) => [device, '--reference', 'x', '--timeout', `${SECOND}`], 1],
  ['partitions', ({ device }) => [device, '--timeout', `${SECOND}`], 1],
  ['partitions', ({ served }) => [served, '--timeout', `${SECOND}`], 1],
  ['add', () => ['--timeout', `${SECOND}`, '0'], 1],
  ['remove', ({ device }) => [device, '--timeout', `${SECOND}`], 1],
  ['free', () => ['--timeout', `${SECOND}`], 0],
  ['watch', () => [], 130],
  ['doctor', () => [], 0],
]

plain('every command is tried', () => {
  const names = makeProgram().commands.map((command) => command.name())
  expect([...new Set(COMMANDS.map(([name]) => name)), 'completion'].toSorted()).toEqual(names.toSorted())
})

/** The exit status; undefined where it has not ended in some seconds, of which it takes some to begin on a busy machine. */
async function statusOf(words: string[], interrupts: boolean): Promise<{ status: number | undefined; said: string }> {
  const child = spawn(process.execPath, [MAIN, ...words], { stdio: ['ignore', 'pipe', 'pipe'] })
  let said = ''
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk: Buffer) => (said += chunk.toString()))
  const interrupt = interrupts ? setTimeout(() => child.kill('SIGINT'), SECOND) : undefined
  try {
    return await new Promise((resolve) => {
      const late = setTimeout(() => resolve({ status: undefined, said }), limit(8 * SECOND))
      // Where Ctrl-C came before it was listened to, a shell says the same.
      child.once('close', (status, signal) => {
        clearTimeout(late)
        resolve({ status: signal === 'SIGINT' ? 130 : (status ?? undefined), said })
      })
    })
  } finally {
    clearTimeout(interrupt)
    child.kill('SIGKILL')
  }
}

async function makePlace(folder: string, server: Server): Promise<{ place: Place; close: () => Promise<void> }> {
  const device = await attach(server.image('a'), { readOnly: true })
  const place = {
    device: device.path,
    served: server.image('b'),
    healthy: makeImage(`${folder}/healthy`),
    free: `${folder}/new`,
    servedFree: `${server.folder}/new`,
  }
  const close = async (): Promise<void> => {
    await device[Symbol.asyncDispose]()
    if (existsSync(place.free)) rmdirSync(place.free)
  }
  return { place, close }
}

describe.concurrent('while the server is stopped', () => {
  const titled = COMMANDS.map(([name, words, status], i) => ({ title: `${i + 1}. ${name}`, name, words, status }))
  test.for(titled)('loopctl $title ends', async ({ name, words, status }, { folder, server }) => {
    const { place, close } = await makePlace(folder, server)
    await server.stop()
    const ended = await statusOf([name, ...words(place)], status === 130)
    expect(ended.status, ended.said).toBe(status)
    server.go()
    await close()
  })
})
