/** Unmounting: busy, lazily, with the device; what others do meanwhile. */

import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, existsSync, mkdirSync, openSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, onTestFinished } from 'vitest'
import { attach, find, open } from '../../lib/index.ts'
import { env, needs, needsKernel } from '../needs.ts'
import { sfdisk, TWO } from '../kernel/partitioned.ts'
import { countDescriptors, failure } from '../kernel/support.ts'
import { expectDetached, makeFilesystem, mountsUnder, test } from './support.ts'

describe('busy', () => {
  test('by an open file, a working folder, a program, each of another process: who it is', async ({
    folder,
    place,
  }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const mount = await device.mount(place, { options: 'exec' })
    writeFileSync(join(place, 'file'), 'x')
    execFileSync('cp', [
      execFileSync('sh', ['-c', 'command -v sleep'], { encoding: 'utf8' }).trim(),
      join(place, 'sleep'),
    ])
    const users: [string, string[], string?][] = [
      ['an open file', ['sh', '-c', 'echo ready; exec sleep 60 < "$0"', join(place, 'file')]],
      ['a working folder', ['sh', '-c', 'echo ready; exec sleep 60'], place],
      ['a program', ['sh', '-c', 'echo ready; exec "$0" 60', join(place, 'sleep')]],
    ]
    for (const [what, [program = '', ...words], cwd] of users) {
      const child = spawn(program, words, { cwd, stdio: ['ignore', 'pipe', 'inherit'] })
      onTestFinished(() => void child.kill('SIGKILL'))
      const exit = once(child, 'exit')
      await once(child.stdout, 'data')
      // exec(2) follows what was said
      await expect.poll(() => readFileSync(`/proc/${child.pid}/comm`, 'utf8')).toBe('sleep\n')
      const error = await failure('in-use', () => mount.unmount({ timeout: 20 }))
      expect(error.holders, what).toEqual([{ device: device.path, kind: 'process', pid: child.pid, command: 'sleep' }])
      expect(error).toMatchObject({ code: 'EBUSY', syscall: 'umount2', path: place })
      expect(error.message).toContain(`process ${child.pid} (sleep) uses it`)
      expect(error.hint).toContain('lazy: true')
      expect(mountsUnder(place)).toHaveLength(1)
      expect(
        (() => {
          try {
            return mount.unmountSync()
          } catch (caught) {
            return caught
          }
        })(),
      ).toMatchObject({ reason: 'in-use' })
      child.kill('SIGKILL')
      await exit
    }
    expect(await mount.unmount()).toBe('unmounted')
  })

  test('what passes by itself is waited for, and the wait can be ended', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const mount = await device.mount(place)
    writeFileSync(join(place, 'file'), 'x')
    const fd = openSync(join(place, 'file'), 'r')
    const reason = new Error('enough')
    const controller = new AbortController()
    const aborted = mount.unmount({ signal: controller.signal })
    setTimeout(() => controller.abort(reason), 50)
    await expect(aborted).rejects.toBe(reason)
    expect(mountsUnder(place)).toHaveLength(1)
    setTimeout(() => closeSync(fd), 50)
    expect(await mount.unmount()).toBe('unmounted')
  })

  test('by a mount in it, a loop device on a file of it: told at once, without waiting', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    makeFilesystem('ext2', join(folder, 'other'))
    await using device = await attach(join(folder, 'image'))
    const mount = await device.mount(place)
    mkdirSync(join(place, 'inner'))
    writeFileSync(join(place, 'file'), '')
    truncateSync(join(place, 'file'), 1 << 20)
    {
      await using inner = await attach(join(folder, 'other'))
      const within = await inner.mount(join(place, 'inner'))
      const error = await failure('in-use', () => mount.unmount())
      expect(error.message).toContain(`${place}/inner is mounted in it (ext2)`)
      expect(error.holders).toEqual([
        { device: device.path, kind: 'mount', mountPoint: `${place}/inner`, fsType: 'ext2' },
      ])
      await within.unmount()
    }
    await using stacked = await attach(join(place, 'file'))
    const error = await failure('in-use', () => mount.unmount())
    expect(error.holders).toEqual([{ device: device.path, kind: 'loop', number: stacked.number, path: stacked.path }])
    await stacked.detach()
    expect(await mount.unmount()).toBe('unmounted')
  })

  test('lazily: out of the tree now, and gone when the last file is closed', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    const device = await attach(join(folder, 'image'))
    const mount = await device.mount(place)
    writeFileSync(join(place, 'file'), 'x')
    const fd = openSync(join(place, 'file'), 'r')
    expect(await mount.unmount({ lazy: true })).toBe('deferred')
    expect(mountsUnder(place)).toEqual([])
    expect(readFileSync(fd, 'utf8')).toBe('x')
    await failure('in-use', () => device.detach({ timeout: 0 }))
    closeSync(fd)
    expect(await device.detach()).toBe('detached')

    const again = await attach(join(folder, 'image'))
    const idle = await again.mount(place)
    expect(await idle.unmount({ lazy: true })).toBe('unmounted')
    const sync = await again.mount(place)
    expect(sync.unmountSync()).toBe('unmounted')
    await failure('not-mounted', () => sync.unmountSync())
    await failure('not-mounted', () => sync.unmount())
    await again.detach()
  })
})

describe('detach with unmount', () => {
  test('all mounts of the device, the deepest first; and what stands in the way of the last', async ({
    folder,
    place,
  }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    const device = await attach(join(folder, 'image'))
    const mount = await device.mount(place)
    mkdirSync(join(place, 'a'))
    mkdirSync(join(folder, 'other'))
    // Of the same device, in itself and elsewhere, made by another program
    execFileSync('mount', ['--bind', place, join(place, 'a')])
    execFileSync('mount', ['--bind', place, join(folder, 'other')])
    const unseen = await device.mount(null)
    expect(mountsUnder(folder)).toHaveLength(3)
    const before = await failure('in-use', () => device.detach())
    expect(before.hint).toContain('unmount')

    // Where one is held, those above it have gone, which the error says.
    const fd = openSync(join(place, 'held'), 'w')
    const done: string[] = []
    const error = await failure('in-use', () =>
      device.detach({ unmount: true, timeout: 20, onUnmount: (path) => done.push(path) }),
    )
    closeSync(fd)
    expect(error.message).toMatch(new RegExp(`process ${process.pid} .*, which is this one, .* as descriptor ${fd}\\b`))
    expect(error.message).toContain(`(unmounted before: ${done.join(', ')})`)
    expect(done).toContain(join(place, 'a'))
    expect(mountsUnder(place)).toHaveLength(1)

    expect(await device.detach({ unmount: true, onUnmount: (path) => done.push(path) })).toBe('detached')
    expect(done.toSorted()).toEqual([place, join(place, 'a'), join(folder, 'other'), unseen.path].toSorted())
    expect(done.indexOf(join(place, 'a'))).toBeLessThan(done.indexOf(place))
    expect(mountsUnder(folder)).toEqual([])
    await failure('not-mounted', () => mount.unmount())
    expectDetached(join(folder, 'image'))
  })

  test('a mount in another namespace is not touched: in use', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    const device = await attach(join(folder, 'image'))
    const child = spawn(
      'unshare',
      ['--mount', 'sh', '-c', 'mount "$0" "$1" && echo ready && exec sleep 60', device.path, place],
      {
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    )
    onTestFinished(() => void child.kill('SIGKILL'))
    const exit = once(child, 'exit')
    await once(child.stdout, 'data')
    expect(mountsUnder(place)).toEqual([])
    await failure('in-use', () => device.detach({ unmount: true, timeout: 20 }))
    child.kill('SIGKILL')
    await exit
    expect(await device.detach({ unmount: true })).toBe('detached')
  })

  test('lazily, and another filesystem that is mounted in it', async ({ folder, place }) => {
    for (const name of ['ext4', 'ext2'] as const) makeFilesystem(name, join(folder, name))
    const device = await attach(join(folder, 'ext4'))
    await using other = await attach(join(folder, 'ext2'))
    await device.mount(place)
    mkdirSync(join(place, 'inner'))
    const inner = await other.mount(join(place, 'inner'))
    const error = await failure('in-use', () => device.detach({ unmount: true, timeout: 20 }))
    expect(error.message).toContain(`${place}/inner is mounted in it (ext2)`)
    await inner.unmount()
    const fd = openSync(join(place, 'held'), 'w')
    expect(await device.detach({ unmount: true, lazy: true })).toBe('deferred')
    expect(mountsUnder(folder)).toEqual([])
    closeSync(fd)
    expectDetached(join(folder, 'ext4'))
  })

  test('btrfs, which shows a device of its own', async ({ folder, place }) => {
    needsKernel('btrfs')
    makeFilesystem('btrfs', join(folder, 'image'))
    const device = await attach(join(folder, 'image'))
    await device.mount(place)
    expect((await find({ mountPoint: place })).map(({ number }) => number)).toEqual([device.number])
    expect(await device.detach({ unmount: true })).toBe('detached')
  })
})

test('dispose of the device: its mounts first; of a handle that was opened too', async ({ folder, place }) => {
  makeFilesystem('ext4', join(folder, 'image'))
  const descriptors = countDescriptors()
  {
    await using device = await attach(join(folder, 'image'))
    await device.mount(place)
    await device.mount(null)
  }
  expect(mountsUnder(folder)).toEqual([])
  expectDetached(join(folder, 'image'))
  {
    using device = await attach(join(folder, 'image'))
    await device.mount(place)
    await device.mount(null)
  }
  expect(mountsUnder(folder)).toEqual([])
  expectDetached(join(folder, 'image'))
  const device = await attach(join(folder, 'image'))
  {
    await using other = await open(device.ref)
    await other.mount(place)
  }
  expect(mountsUnder(folder)).toEqual([])
  await device.detach()
  expect(countDescriptors()).toBe(descriptors)
})

describe('find({ mountPoint })', () => {
  test('the device; nothing where nothing is mounted, or another kind of filesystem', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    expect(await find({ mountPoint: place })).toEqual([])
    await using mount = await device.mount(place)
    for (const path of [place, `${place}/`, `${place}/.`]) {
      const [info, ...others] = await find({ mountPoint: path })
      expect(info).toMatchObject({ number: device.number, backingFile: join(folder, 'image'), attached: true })
      expect(others).toEqual([])
    }
    expect(await find({ mountPoint: '/proc' })).toEqual([])
    expect(await find({ mountPoint: join(place, 'lost+found') })).toEqual([])
    await mount.unmount()
    await failure('target', () => find({ mountPoint: join(place, 'nothing') }))
    for (const wrong of ['', 'a\0b', 7]) {
      await expect(find({ mountPoint: wrong as string })).rejects.toBeInstanceOf(TypeError)
    }
  })

  test('by a partition', async ({ place, image }) => {
    needs('sfdisk')
    const file = image('disk', 16 << 20)
    sfdisk(file, TWO)
    await using partitioned = await attach(file, { partscan: 'user' })
    execFileSync('mkfs.ext4', ['-q', `${partitioned.path}p2`], { env })
    await using part = await partitioned.mount(place, { partition: 2 })
    expect(part.source).toBe(`${partitioned.path}p2`)
    expect((await find({ mountPoint: place })).map(({ number }) => number)).toEqual([partitioned.number])
  })
})

test('partitions: detach with unmount, and what BLKPG had added goes too', async ({ folder, place, image }) => {
  needs('sfdisk')
  const file = image('disk', 16 << 20)
  sfdisk(file, TWO)
  const device = await attach(file, { partscan: 'user' })
  execFileSync('mkfs.ext4', ['-q', `${device.path}p2`], { env })
  await device.mount(place, { partition: { label: 'second' } })
  await failure('in-use', () => device.detach({ timeout: 0 }))
  expect(await device.detach({ unmount: true })).toBe('detached')
  expect(existsSync(`/sys/block/loop${device.number}/loop${device.number}p2`)).toBe(false)
  expect(mountsUnder(folder)).toEqual([])
})
