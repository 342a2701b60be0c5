/** Every rejected promise leads to the line that called, however its caller waits for it. */

import { closeSync, openSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, vi } from 'vitest'
import * as loopctl from '../../lib/index.ts'
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

/** Calls that fail, each on the line that begins with its name. */
const FAILING: Record<string, (place: Place) => Promise<unknown>> = {
  attach: ({ missing }) => loopctl.attach(missing),
  open: () => loopctl.open(1_048_575),
  find: ({ missing }) => loopctl.find(missing),
  readPartitionTable: ({ image }) => loopctl.readPartitionTable(image),
  createImage: ({ missing }) => loopctl.createImage(join(missing, 'x.img'), 1 << 20),
  mountImage: ({ image }) => loopctl.mountImage(image),
  withDevice: ({ missing }) => loopctl.withDevice(missing, () => {}),
  add: ({ control, device }) => control.add(device.number),
  remove: ({ control }) => control.remove(1_048_575),
  changeBackingFile: ({ device, image }) => device.changeBackingFile(image),
  migrate: ({ device, missing }) => device.migrate(missing),
  grow: ({ device }) => device.grow(512),
  mount: ({ device, missing }) => device.mount(missing),
  detach: ({ device }) => device.detach({ timeout: 0 }),
  status: ({ closed }) => closed.status(),
  setStatus: ({ closed }) => closed.setStatus({ reference: 'x' }),
  refreshCapacity: ({ closed }) => closed.refreshCapacity(),
  setDirectIO: ({ closed }) => closed.setDirectIO(true),
  setBlockSize: ({ closed }) => closed.setBlockSize(512),
  partitions: ({ closed }) => closed.partitions(),
  rescanPartitions: ({ closed }) => closed.rescanPartitions(),
  lock: ({ closed }) => closed.lock(),
  holders: ({ closed }) => closed.holders(),
  flush: ({ closed }) => closed.flush(),
  release: ({ closed }) => closed.release(),
  loopGetStatus64: ({ plain }) => ioctl.loopGetStatus64(plain),
  loopClrFd: ({ plain }) => ioctl.loopClrFd(plain),
  blkGetSize64: ({ plain }) => ioctl.blkGetSize64(plain),
}

const source = readFileSync(fileURLToPath(import.meta.url), 'utf8').split('\n')

function placeOf(name: string): string {
  return `stack.test.ts:${source.findIndex((line) => line.startsWith(`  ${name}: (`)) + 1}:`
}

/** Ways to take a promise, the error of which is returned. */
const WAYS: Record<string, (begin: () => Promise<unknown>) => Promise<unknown>> = {
  'awaited': async (begin) => {
    try {
      return await begin()
    } catch (error) {
      return error
    }
  },
  'caught': (begin) => begin().catch((error: unknown) => error),
  'one of several': async (begin) => {
    const [result] = await Promise.allSettled([begin(), Promise.resolve()])
    return result.status === 'rejected' ? result.reason : undefined
  },
  'awaited later': async (begin) => {
    let told: unknown
    const promise = begin()
    promise.catch((error: unknown) => {
      told = error
    })
    await vi.waitFor(() => expect(told).toBeDefined(), { interval: 1, timeout: 5_000 })
    return told
  },
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
    const error = await WAYS[way]?.(async () => FAILING[name]?.(place))
    expect(loopctl.LoopError.is(error), String(error)).toBe(true)
    expect((error as Error).stack).toContain(placeOf(name))
  })
})
