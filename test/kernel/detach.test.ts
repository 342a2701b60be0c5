import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, constants, existsSync, mkdirSync, openSync, readFileSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { describe, expect, vi } from 'vitest'
import { attach, type LoopDevice, LoopError, open } from '../../lib/index.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import { expectGone, failure, losetup, settleUdev, sysfs, test } from './support.ts'
import { limit } from '../scale.ts'

/** Another process that has the device open until it is told to end. */
async function opener(path: string): Promise<{ pid: number; end: () => Promise<void> }> {
  const child = spawn('sh', ['-c', 'exec 3<"$0"; echo open; read line', path], { stdio: ['pipe', 'pipe', 'inherit'] })
  await once(child.stdout, 'data')
  return {
    pid: child.pid ?? -1,
    end: async () => {
      child.stdin.end('\n')
      await once(child, 'exit')
    },
  }
}

async function mounted(device: LoopDevice, folder: string, use: (mountPoint: string) => Promise<void>): Promise<void> {
  const mountPoint = join(folder, 'a mount point')
  mkdirSync(mountPoint)
  execFileSync('mkfs.ext4', ['-q', device.path])
  execFileSync('mount', [device.path, mountPoint])
  try {
    await use(mountPoint)
  } finally {
    execFileSync('umount', [mountPoint])
  }
}

describe('detach', () => {
  test('resolves when the device has let go, with everything written in the file', async ({ image }) => {
    const file = image('disk')
    const device = await attach(file)
    const fd = openSync(device.path, 'r+')
    writeSync(fd, 'kept', 8192)
    closeSync(fd)
    expect(await device.detach()).toBe('detached')
    expect(existsSync(`/sys/block/loop${device.number}/loop`)).toBe(false)
    expect(losetup(device.path)?.['back-file']).toBe(null)
    expect(readFileSync(file).subarray(8192, 8196).toString()).toBe('kept')
    expect(device.fd).toBe(-1)
  })

  test('while mounted is in-use at once, names the mount, and leaves everything as it was', async ({
    folder,
    image,
  }) => {
    await using device = await attach(image('disk', 8 << 20))
    await mounted(device, folder, async (mountPoint) => {
      writeFileSync(join(mountPoint, 'file'), 'still here')
      // longer than the test may take: it is not waited for
      const error = await failure('in-use', () => device.detach({ timeout: 600_000 }))
      expect(error).toMatchObject({ code: 'EBUSY', errno: -16, ioctl: 'LOOP_CLR_FD', path: device.path })
      expect(error.holders).toContainEqual({ device: device.path, kind: 'mount', mountPoint, fsType: 'ext4' })
      expect(error.message).toContain(mountPoint)
      expect(readFileSync(join(mountPoint, 'file'), 'utf8')).toBe('still here')
      expect((await device.status()).autoclear).toBe(true)
      expect(device.fd).toBeGreaterThan(0)
    })
    expect(await device.detach()).toBe('detached')
  })

  test('while another process has it open is in-use, names it, and can be tried again', async ({ image }) => {
    for (const autoclear of [true, false]) {
      await using device = await attach(image('disk'), { autoclear })
      const other = await opener(device.path)
      try {
        const error = await failure('in-use', () => device.detach({ timeout: 30 }))
        expect(error.holders).toEqual([{ device: device.path, kind: 'process', pid: other.pid, command: 'sh' }])
        // as it was: above all, no deferred detach is left behind
        expect(sysfs(device.number, 'loop/autoclear')).toBe(autoclear ? '1' : '0')
        await failure('in-use', () => device.detach({ timeout: 0 }))
        expect(sysfs(device.number, 'loop/autoclear')).toBe(autoclear ? '1' : '0')
      } finally {
        await other.end()
      }
      expect(await device.detach()).toBe('detached')
    }
  })

  test('waits for an opener that goes away in time', async ({ image }) => {
    const device = await attach(image('disk'))
    const other = await opener(device.path)
    const [result] = await Promise.all([device.detach({ timeout: limit(15_000) }), other.end()])
    expect(result).toBe('detached')
    expect(existsSync(`/sys/block/loop${device.number}/loop`)).toBe(false)
  })

  // Of two LOOP_CLR_FD in a row each answers 0 where the other user goes in between: deferred, and begun.
  test.for([1, 2, 3, 4, 5, 6])('the other user goes right before LOOP_CLR_FD %i', async (k, { image }) => {
    const device = await attach(image('disk'))
    const other = openSync(device.path, 'r')
    let seen = 0
    observe((call) => {
      if (call === 'loopClrFd' && ++seen === k) closeSync(other)
    })
    try {
      expect(await device.detach({ timeout: limit(15_000) })).toBe('detached')
    } finally {
      observe(undefined)
    }
    expect(seen).toBeGreaterThanOrEqual(k)
    expect(existsSync(`/sys/block/loop${device.number}/loop`)).toBe(false)
  })

  test('lazy hands a device in use to the kernel, which detaches it afterwards', async ({ image }) => {
    const device = await attach(image('disk'))
    const other = await opener(device.path)
    expect(await device.detach({ lazy: true })).toBe('deferred')
    expect(device.fd).toBe(-1)
    expect(sysfs(device.number, 'loop/autoclear')).toBe('1')
    await other.end()
    expectGone(device.number)
  })

  test('lazy of a device that nobody else uses is detached', async ({ image }) => {
    const device = await attach(image('disk'), { autoclear: false })
    settleUdev()
    expect(await device.detach({ lazy: true })).toBe('detached')
    expect(existsSync(`/sys/block/loop${device.number}/loop`)).toBe(false)
  })

  test('a loop device on top is found, and named, at once', async ({ image }) => {
    const lower = await attach(image('disk'))
    const upper = await attach(lower.path, { readOnly: true })
    const error = await failure('in-use', () => lower.detach({ timeout: 600_000 }))
    expect(error.holders).toContainEqual({
      device: lower.path,
      kind: 'loop',
      number: upper.number,
      path: upper.path,
    })
    expect(await upper.detach()).toBe('detached')
    expect(await lower.detach()).toBe('detached')
  })

  test('an opened device can be detached too, once', async ({ image }) => {
    const device = await attach(image('disk'), { autoclear: false })
    await device.close()
    const opened = await open(device.ref)
    expect(opened.owned).toBe(false)
    expect(await opened.detach()).toBe('detached')
    const free = await open(device.number)
    await failure('not-attached', () => free.detach())
    await free.close()
  })

  test('of a device that was given to another file meanwhile is replaced, and touches nothing', async ({ image }) => {
    const first = await attach(image('first'))
    const { ref } = first
    await using free = await (async () => {
      await first.detach()
      return open(first.number)
    })()
    const second = image('second')
    await using other = await attach(second, { number: first.number })
    await failure('replaced', () => open(ref))
    await failure('replaced', () => free.detach())
    await failure('replaced', () => free.setStatus({ offset: 512 }))
    await failure('replaced', () => free.release())
    await failure('replaced', async () => free.detachSync())
    expect(sysfs(other.number, 'loop/backing_file')).toBe(second)
    expect(sysfs(other.number, 'loop/offset')).toBe('0')
  })

  test('losetup -d under a live handle is deferred by it, and told by the flags', async ({ image }) => {
    const device = await attach(image('disk'), { autoclear: false })
    execFileSync('losetup', ['-d', device.path])
    expect(await device.status()).toMatchObject({ attached: true, autoclear: true })
    expect(await device.detach()).toBe('detached')
  })

  test('an aborted detach leaves it attached', async ({ image }) => {
    await using device = await attach(image('disk'))
    const reason = new Error('enough')
    await expect(device.detach({ signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    const other = await opener(device.path)
    const controller = new AbortController()
    const detaching = device.detach({ signal: controller.signal, timeout: 600_000 })
    setImmediate(() => controller.abort(reason))
    await expect(detaching).rejects.toBe(reason)
    expect((await device.status()).attached).toBe(true)
    await other.end()
  })
})

describe('detachSync', () => {
  test('detaches at once', async ({ image }) => {
    const device = await attach(image('disk'))
    settleUdev()
    expect(device.detachSync()).toBe('detached')
    expect(existsSync(`/sys/block/loop${device.number}/loop`)).toBe(false)
    expect(() => device.detachSync()).toThrow(LoopError)
  })

  test('with an operation in flight leaves it the descriptor, and the device goes after that', async ({ image }) => {
    const device = await attach(image('disk'), { autoclear: false })
    const inFlight = device.status()
    await Promise.resolve()
    expect(device.detachSync()).toBe('deferred')
    expect(device.fd).toBe(-1)
    await inFlight.catch(() => {})
    await device.close()
    expectGone(device.number)
  })

  test('at any call of another operation: the device goes', async ({ image }) => {
    const first = image('first', 65_536, 1)
    const second = image('second', 65_536, 2)
    const operations: ((device: LoopDevice) => Promise<unknown>)[] = [
      (device) => device.setStatus({ reference: 'other' }),
      (device) => device.setStatus({ autoclear: false }),
      (device) => device.changeBackingFile(second),
      (device) => device.status(),
      (device) => device.refreshCapacity(),
      (device) => device.release(),
    ]
    for (const [i, operation] of operations.entries()) {
      let calls = 1
      for (let k = 1; k <= calls; k++) {
        const device = await attach(first, { readOnly: true, autoclear: false })
        let seen = 0
        let said: string | undefined
        observe(() => {
          if (++seen !== k) return
          observe(undefined)
          // closed by then, the operation has the last word
          said = device.fd < 0 ? undefined : device.detachSync()
        })
        await operation(device).catch(() => {})
        observe(undefined)
        calls = k === 1 ? 40 : calls
        await device.close()
        if (seen < k) calls = k
        if (said === undefined) {
          if (sysfs(device.number, 'loop/backing_file') !== undefined) await (await open(device.number)).detach()
        }
        const isThere = () => existsSync(`/sys/block/loop${device.number}/loop`)
        // Another program that looks at all devices can have it open for a moment.
        await vi.waitFor(() => expect(isThere(), `operation ${i}, call ${k}: ${said}`).toBe(false), {
          timeout: limit(5_000),
        })
      }
    }
  })

  test('in the middle of a detach that waits', async ({ image }) => {
    const device = await attach(image('disk'), { autoclear: false })
    const other = await opener(device.path)
    const waiting = device.detach({ timeout: limit(10_000) })
    for (let i = 0; i < 20; i++) await new Promise(setImmediate)
    expect(device.detachSync()).toBe('deferred')
    await failure('closed', () => waiting)
    expect(sysfs(device.number, 'loop/autoclear')).toBe('1')
    await other.end()
    expectGone(device.number)
  })
})

describe('disposal', () => {
  test('await using detaches what it owns, and only closes what it opened', async ({ image }) => {
    const device = await attach(image('disk'))
    {
      await using opened = await open(device.number)
      expect(opened.ref).toEqual(device.ref)
    }
    expect(sysfs(device.number, 'loop/backing_file')).toBeDefined()
    await device[Symbol.asyncDispose]()
    expectGone(device.number)
    await device[Symbol.asyncDispose]()
  })

  test('using does so at once', async ({ image }) => {
    let number: number
    {
      using device = await attach(image('disk'))
      number = device.number
    }
    expectGone(number)
  })

  test('a held device is deferred without waiting', async ({ image }) => {
    const device = await attach(image('disk'))
    const other = await opener(device.path)
    await device[Symbol.asyncDispose]()
    expect(device.fd).toBe(-1)
    expect(sysfs(device.number, 'loop/backing_file')).toBeDefined()
    await other.end()
    expectGone(device.number)
  })
})

describe('release and close', () => {
  test('release keeps it attached without us, also under a mount', async ({ folder, image }) => {
    const device = await attach(image('disk', 8 << 20))
    await mounted(device, folder, async () => {
      expect(await device.release()).toBe(device.path)
      expect(device.fd).toBe(-1)
      expect(sysfs(device.number, 'loop/autoclear')).toBe('0')
    })
    expect(sysfs(device.number, 'loop/backing_file')).toBeDefined()
    const opened = await open(device.ref)
    expect(await opened.detach()).toBe('detached')
  })

  test('close with autoclear lets the device go; it is idempotent', async ({ image }) => {
    const device = await attach(image('disk'))
    await Promise.all([device.close(), device.close()])
    await device.close()
    expectGone(device.number)
    expect(device.fd).toBe(-1)
    expect(device.path).toBe(`/dev/loop${device.number}`)
  })

  test('everything after close is closed; what was asked before is done', async ({ image }) => {
    const file = image('disk')
    const device = await attach(file)
    const before = device.status()
    const closing = device.close()
    for (const operation of [
      () => device.status(),
      () => device.setStatus({ offset: 512 }),
      () => device.changeBackingFile(file),
      () => device.refreshCapacity(),
      () => device.setDirectIO(true),
      () => device.setBlockSize(512),
      () => device.flush(),
      () => device.detach(),
      () => device.release(),
      async () => device.detachSync(),
    ]) {
      expect(await failure('closed', operation)).toMatchObject({ code: 'EBADF', path: device.path })
    }
    expect((await before).backingFile).toBe(file)
    await closing
  })

  test('operations of one device run one after another', async ({ image }) => {
    await using device = await attach(image('disk'))
    const offsets = [512, 1024, 1536, 2048]
    const seen = await Promise.all(
      offsets.flatMap((offset) => [device.setStatus({ offset }).then(() => -1), device.status().then((s) => s.offset)]),
    )
    expect(seen.filter((offset) => offset >= 0)).toEqual(offsets)
  })
})

test('aborted at whatever moment, it leaves autoclear off, and a device that others can hold exclusively', async ({
  image,
}) => {
  const device = await attach(image('disk'), { autoclear: false })
  const held = openSync(device.path, 'r')
  for (let i = 0; i < 60; i++) {
    const controller = new AbortController()
    const reason = new Error(`${i}`)
    const detaching = device.detach({ signal: controller.signal, timeout: 10_000 })
    // A turn of the event loop each, so that the abort meets every step of it.
    for (let turn = 0; turn < i; turn++) await nextTurn()
    controller.abort(reason)
    await expect(detaching).rejects.toBe(reason)
    expect(sysfs(device.number, 'loop/autoclear'), `aborted after ${i} turns`).toBe('0')
    // Whoever looks at all devices may have it so for a moment.
    await vi.waitFor(() => closeSync(openSync(device.path, constants.O_RDONLY | constants.O_EXCL)), limit(2_000))
  }
  closeSync(held)
  expect(await device.detach()).toBe('detached')
})
