/** Every rejected promise leads to the line that called. */

import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { closeSync, openSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, describe, expect, vi } from 'vitest'
import * as loopctl from '../../lib/index.ts'
import { LoopError } from '../../lib/index.ts'
import * as ioctl from '../../lib/ioctl.ts'
import { test } from './support.ts'

interface Place {
  missing: string
  image: string
  device: loopctl.LoopDevice
  control: loopctl.LoopControl
  closed: loopctl.LoopDevice
  /** A descriptor of a plain file. */
  plain: number
}

/** Takes a promise in some way. */
type How = (promise: Promise<unknown>) => Promise<unknown>

/** Calls that fail, each on the line that begins with its name. */
const FAILING: Record<string, (place: Place, how: How) => Promise<unknown>> = {
  attach: async ({ missing }, how) => await how(loopctl.attach(missing)),
  open: async (_, how) => await how(loopctl.open(1_048_575)),
  find: async ({ missing }, how) => await how(loopctl.find(missing)),
  readPartitionTable: async ({ image }, how) => await how(loopctl.readPartitionTable(image)),
  createImage: async ({ missing }, how) => await how(loopctl.createImage(join(missing, 'x.img'), 1 << 20)),
  mountImage: async ({ image }, how) => await how(loopctl.mountImage(image)),
  withDevice: async ({ missing }, how) => await how(loopctl.withDevice(missing, () => {})),
  add: async ({ control, device }, how) => await how(control.add(device.number)),
  remove: async ({ control }, how) => await how(control.remove(1_048_575)),
  changeBackingFile: async ({ device, image }, how) => await how(device.changeBackingFile(image)),
  migrate: async ({ device, missing }, how) => await how(device.migrate(missing)),
  grow: async ({ device }, how) => await how(device.grow(512)),
  mount: async ({ device, missing }, how) => await how(device.mount(missing)),
  detach: async ({ device }, how) => await how(device.detach({ timeout: 0 })),
  status: async ({ closed }, how) => await how(closed.status()),
  setStatus: async ({ closed }, how) => await how(closed.setStatus({ reference: 'x' })),
  refreshCapacity: async ({ closed }, how) => await how(closed.refreshCapacity()),
  setDirectIO: async ({ closed }, how) => await how(closed.setDirectIO(true)),
  setBlockSize: async ({ closed }, how) => await how(closed.setBlockSize(512)),
  partitions: async ({ closed }, how) => await how(closed.partitions()),
  rescanPartitions: async ({ closed }, how) => await how(closed.rescanPartitions()),
  lock: async ({ closed }, how) => await how(closed.lock()),
  holders: async ({ closed }, how) => await how(closed.holders()),
  flush: async ({ closed }, how) => await how(closed.flush()),
  release: async ({ closed }, how) => await how(closed.release()),
  loopGetStatus64: async ({ plain }, how) => await how(ioctl.loopGetStatus64(plain)),
  loopClrFd: async ({ plain }, how) => await how(ioctl.loopClrFd(plain)),
  blkGetSize64: async ({ plain }, how) => await how(ioctl.blkGetSize64(plain)),
}

const source = readFileSync(fileURLToPath(import.meta.url), 'utf8').split('\n')

function placeOf(name: string): string {
  return `stack.test.ts:${source.findIndex((line) => line.startsWith(`  ${name}: async (`)) + 1}:`
}

const WAYS: Record<string, How> = {
  'awaited': (promise) => promise,
  'caught': (promise) =>
    promise.catch((error: unknown) => {
      throw error
    }),
  'awaited with others': (promise) => Promise.all([Promise.resolve(), promise]),
}

/** When it has been rejected already. */
const later: How = async (promise) => {
  let isRejected = false
  promise.catch(() => {
    isRejected = true
  })
  await vi.waitFor(() => expect(isRejected).toBe(true), { interval: 1, timeout: 5_000 })
  return promise
}

async function errorOf(name: string, place: Place, how: How): Promise<LoopError> {
  try {
    await FAILING[name]?.(place, how)
  } catch (error) {
    if (error instanceof LoopError) return error
    throw error
  }
  throw new Error(`${name} did not fail`)
}

const it = test.extend<{ place: Place }>({
  place: async ({ folder, image }, use) => {
    const path = image('disk.img', 1 << 20)
    await using device = await loopctl.attach(path)
    await using control = await loopctl.LoopControl.open()
    const other = openSync(device.path, 'r')
    const closed = await loopctl.open(device.number)
    await closed.close()
    const plain = openSync(path, 'r')
    await use({ missing: join(folder, 'missing'), image: path, device, control, closed, plain })
    for (const fd of [other, plain]) closeSync(fd)
  },
})

describe.for(Object.keys(WAYS))('a promise that is %s', (way) => {
  it.for(Object.keys(FAILING))('leads to the line that called %s', async (name, { place }) => {
    const { stack } = await errorOf(name, place, WAYS[way] ?? later)
    expect(stack).toContain(placeOf(name))
  })
})

const nobody = () => {}

describe('a promise that is awaited later, while somebody listens', () => {
  beforeEach(() => subscribe('loopctl:call', nobody))
  afterEach(() => void unsubscribe('loopctl:call', nobody))

  it.for(Object.keys(FAILING))('leads to the line that called %s', async (name, { place }) => {
    const { stack } = await errorOf(name, place, later)
    expect(stack).toContain(placeOf(name))
  })
})
