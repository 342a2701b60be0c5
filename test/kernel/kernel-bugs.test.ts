/** Kernel bugs of docs/kernel-bugs.md whose workaround no other test would miss. */

import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { expect, onTestFinished } from 'vitest'
import { attach, LoopControl } from '../../lib/index.ts'
import * as ioctl from '../../lib/ioctl.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import { openFile, sysfs, test, unusedNumber } from './support.ts'

const MiB = 1 << 20

/** What came of it: the error, or undefined. */
async function errorOf(operation: () => Promise<unknown>): Promise<unknown> {
  return operation().then(
    () => undefined,
    (error: unknown) => error,
  )
}

test('K1: a block size that the kernel would refuse leaves the device as it was', async ({ image }) => {
  const file = image('disk')
  await using control = await LoopControl.open()
  const number = await control.add(unusedNumber())
  const fd = openFile(`/dev/loop${number}`, 'r')
  const backing = openFile(file, 'r')
  try {
    const state = () => ({ readOnly: sysfs(number, 'ro'), diskSeq: sysfs(number, 'diskseq') })
    const before = state()
    for (const blockSize of [1000, 131_072]) {
      const ways = [
        () => attach(file, { number, blockSize, readOnly: true }),
        () => ioctl.loopConfigure(fd, { fd: backing, blockSize }),
        async () => ioctl.loopConfigureSync(fd, { fd: backing, blockSize }),
      ]
      for (const way of ways) {
        const error = await errorOf(way)
        expect(state()).toEqual(before)
        expect(error).toBeInstanceOf(RangeError)
      }
    }
  } finally {
    closeSync(backing)
    closeSync(fd)
    await control.remove(number)
  }
})

test('K12: nobody gets the device between LOOP_CLR_FD and the end of the detach', async ({ image }) => {
  const number = unusedNumber()
  const rival = image('rival')
  try {
    await using device = await attach(image('disk'), { number })
    const attached: boolean[] = []
    let requested = false
    observe((call) => {
      if (requested) attached.push(spawnSync('losetup', [device.path, rival]).status === 0)
      // Once it is let go anybody may have it.
      requested = call === 'loopClrFd'
    })
    const result = await device.detach().finally(() => observe(undefined))
    expect(result).toBe('detached')
    // Once, or more often where udev had it open.
    expect(new Set(attached)).toEqual(new Set([false]))
  } finally {
    spawnSync('losetup', ['--detach', `/dev/loop${number}`])
    await using control = await LoopControl.open()
    await control.remove(number)
  }
})

test('K16: a file that takes long to flush keeps the ioctl, not the program', async ({ folder, image }) => {
  const mountPoint = join(folder, 'mnt')
  mkdirSync(mountPoint)
  const script = fileURLToPath(new URL('fixtures/hanging_fs.py', import.meta.url))
  const server = spawn('python3', [script, mountPoint, String(MiB), 'asks'], { stdio: ['pipe', 'pipe', 'inherit'] })
  onTestFinished(() => void server.kill('SIGKILL'))
  const said: string[] = []
  const lines = createInterface(server.stdout).on('line', (line) => {
    said.push(line)
    if (line === 'flushing') server.stdin.write('\n')
  })
  try {
    await once(lines, 'line')
    const slow = join(mountPoint, 'image')
    await (await attach(slow, { readOnly: true, overlap: 'allow' })).detach()
    await using device = await attach(image('disk'), { readOnly: true })
    await device.changeBackingFile(slow)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(slow)
  } finally {
    spawnSync('umount', [mountPoint])
  }
  await once(lines, 'close')
  expect(said).not.toContain('in vain')
})
