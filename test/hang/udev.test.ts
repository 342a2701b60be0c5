/** A udev that does not answer: it gets uevents and opens no device, makes no node and no link, and confirms nothing. */

import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { expect, onTestFinished } from 'vitest'
import { attach, find, list, LoopControl } from '../../lib/index.ts'
import { sfdisk, TWO } from '../kernel/partitioned.ts'
import { removeDevice, settleUdev, sysfs, test, unusedNumber } from '../kernel/support.ts'
import { needs, needsKernel } from '../needs.ts'

function signalUdev(signal: 'STOP' | 'CONT'): void {
  expect(spawnSync('pkill', [`-${signal}`, '-x', 'systemd-udevd|udevd|(udev-worker)']).status).toBe(0)
}

/** Between two devices udev is at none of them. */
function stopUdev(): void {
  settleUdev()
  onTestFinished(() => {
    signalUdev('CONT')
    settleUdev()
  })
  signalUdev('STOP')
}

test('while udev is stopped, every operation of a device ends', async ({ image }) => {
  needsKernel('udev')
  stopUdev()
  const file = image('disk', 8 << 20)
  const device = await attach(file)
  expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
  expect((await find(file)).map(({ number }) => number)).toEqual([device.number])
  expect((await list()).some(({ number }) => number === device.number)).toBe(true)
  expect(await device.holders()).toEqual([])
  await device.setStatus({ sizeLimit: 1 << 20 })
  expect((await device.status()).size).toBe(1 << 20)
  expect(await device.detach()).toBe('detached')
})

test('a device that has to be made', async () => {
  needsKernel('udev')
  stopUdev()
  const number = unusedNumber()
  const control = await LoopControl.open()
  await control.add(number)
  // devtmpfs makes the node, without udev
  expect(existsSync(`/dev/loop${number}`)).toBe(true)
  await control.close()
  await removeDevice(number)
})

for (const partscan of [true, 'kernel', 'user'] as const) {
  test(`partitions by partscan: ${String(partscan)}`, async ({ image }) => {
    needsKernel('udev')
    needs('sfdisk')
    const file = image('disk', 8 << 20)
    sfdisk(file, TWO)
    stopUdev()
    const device = await attach(file, { partscan })
    expect((await device.partitions()).map(({ number }) => number)).toEqual([1, 2])
    expect(await device.detach()).toBe('detached')
  })
}

test('a lock, and what lets udev look again', async ({ image }) => {
  needsKernel('udev')
  stopUdev()
  const device = await attach(image('disk'), { lock: true })
  const lock = await device.lock().catch((error: unknown) => error)
  expect(lock).toBeDefined()
  expect(await device.detach()).toBe('detached')
})
