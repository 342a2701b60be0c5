/** The private mount: nobody else sees it, and it goes with the process, whatever happens. */

import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, existsSync, openSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, onTestFinished, vi } from 'vitest'
import { attach, mountImage } from '../../lib/index.ts'
import { needsKernel } from '../needs.ts'
import { limit, times } from '../scale.ts'
import { attachedNumbers, countDescriptors, failure, sysfs } from '../kernel/support.ts'
import { expectDetached, makeFilesystem, mountsUnder, test } from './support.ts'

const INDEX = new URL('../../dist/index.js', import.meta.url).pathname

/** The devices of an image; sysfs is the witness. */
function devicesOf(image: string): number[] {
  return attachedNumbers().filter((number) => sysfs(number, 'loop/backing_file') === image)
}

test.for(['ext4', 'xfs', 'btrfs', 'squashfs', 'erofs'] as const)(
  '%s: its files are there for this process and its children, and in no mount table',
  async (name, { folder }) => {
    if (name !== 'ext4') needsKernel(name)
    const image = join(folder, 'image')
    makeFilesystem(name, image)
    const descriptors = countDescriptors()
    const mount = await mountImage(image)
    expect(mount).toMatchObject({ target: null, fsType: name })
    expect(mount.path).toMatch(new RegExp(`^/proc/${process.pid}/fd/\\d+$`))
    const [number = -1] = devicesOf(image)
    expect(mount.source).toBe(`/dev/loop${number}`)
    if (sysfs(number, 'ro') === '0') writeFileSync(join(mount.path, 'hello'), 'hello\n')
    expect(readFileSync(join(mount.path, 'hello'), 'utf8')).toBe('hello\n')
    // A child has it by the number of this process, and no descriptor of its own.
    expect(execFileSync('cat', [`${mount.path}/hello`], { encoding: 'utf8' })).toBe('hello\n')
    for (const table of ['/proc/self/mountinfo', '/proc/mounts', '/proc/1/mountinfo']) {
      expect(readFileSync(table, 'utf8')).not.toContain(mount.source)
    }
    expect(await mount.unmount()).toBe('unmounted')
    expectDetached(image)
    expect(existsSync(mount.path)).toBe(false)
    expect(countDescriptors()).toBe(descriptors)
  },
)

test('busy: by a file of this process, or of one that it started', async ({ folder }) => {
  makeFilesystem('ext4', join(folder, 'image'))
  await using device = await attach(join(folder, 'image'))
  const mount = await device.mount(null)
  writeFileSync(join(mount.path, 'file'), 'x')
  const fd = openSync(join(mount.path, 'file'), 'r')
  const own = await failure('in-use', () => mount.unmount())
  expect(own.holders).toMatchObject([{ kind: 'process', pid: process.pid }])
  closeSync(fd)

  const child = spawn('sh', ['-c', 'cd "$0" && echo ready && exec sleep 60', mount.path], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  onTestFinished(() => void child.kill('SIGKILL'))
  const exit = once(child, 'exit')
  await once(child.stdout, 'data')
  const theirs = await failure('in-use', () => mount.unmount())
  expect(theirs.holders).toMatchObject([{ kind: 'process', pid: child.pid }])
  // It is still there.
  expect(readFileSync(join(mount.path, 'file'), 'utf8')).toBe('x')
  expect(await mount.unmount({ lazy: true })).toBe('deferred')
  child.kill('SIGKILL')
  await exit
  expect(await device.detach()).toBe('detached')
})

test('used by a process that is none of ours: it is let go, and said to be deferred', async ({ folder }) => {
  makeFilesystem('ext4', join(folder, 'image'))
  const mount = await mountImage(join(folder, 'image'))
  const number = Number(mount.source.slice('/dev/loop'.length))
  // Its parent has ended, so that it is a child of another process.
  const output = execFileSync(
    'sh',
    ['-c', 'cd "$0" && { setsid sleep 60 >/dev/null 2>&1 </dev/null & echo $!; }', mount.path],
    { encoding: 'utf8' },
  )
  const pid = Number(output)
  expect(await mount.unmount()).toBe('deferred')
  expect(existsSync(`/sys/block/loop${number}/loop`)).toBe(true)
  process.kill(pid, 'SIGKILL')
  await vi.waitFor(() => expectDetached(join(folder, 'image')))
})

/** A program that mounts the image privately, says where, and goes on as it is told. */
function script(image: string, then: string): string {
  return `
    import { mountImage } from '${INDEX}'
    const mount = await mountImage('${image}')
    process.stdout.write(mount.path + '\\n')
    ${then}`
}

describe('it goes with the process', () => {
  test('however that ends', { timeout: limit(60_000) }, async ({ folder }) => {
    const image = join(folder, 'image')
    makeFilesystem('ext4', image)
    for (const then of [
      '',
      'process.exit(3)',
      'throw new Error("expected")',
      'process.kill(process.pid, "SIGTERM"); setInterval(() => {}, 1000)',
      'process.abort()',
    ]) {
      const { stdout } = spawnSync(process.execPath, ['--input-type=module', '--eval', script(image, then)], {
        encoding: 'utf8',
        stdio: ['ignore', 'pipe', 'ignore'],
        cwd: folder,
      })
      expect(stdout, then).toMatch(/^\/proc\/\d+\/fd\/\d+\n$/)
      await vi.waitFor(() => expect(devicesOf(image), then).toEqual([]), { timeout: limit(5_000) })
    }
  })

  test('killed, again and again: nothing is left', { timeout: limit(120_000) }, async ({ folder }) => {
    const image = join(folder, 'image')
    makeFilesystem('ext4', image)
    const rounds = times(100)
    const count = 4
    // Several mounts a process: starting one takes longer than all of this.
    const body = `
      import { attach } from '${INDEX}'
      import { copyFileSync } from 'node:fs'
      const device = await attach('${image}')
      for (let i = 0; i < ${count}; i++) await device.mount(null)
      process.stdout.write(String(device.number) + '\\n')
      setInterval(() => {}, 1000)`
    for (let round = 0; round < rounds; round += count) {
      const child = spawn(process.execPath, ['--input-type=module', '--eval', body], {
        stdio: ['ignore', 'pipe', 'inherit'],
      })
      const exit = once(child, 'exit')
      const [said] = (await once(child.stdout, 'data')) as [Buffer]
      expect(devicesOf(image)).toEqual([Number(String(said))])
      child.kill('SIGKILL')
      await exit
      // What a killed process had mounted the kernel unmounts soon after it.
      await vi.waitFor(() => expect(devicesOf(image)).toEqual([]), { timeout: limit(5_000) })
      expect(mountsUnder(folder)).toEqual([])
    }
    // What was written back is whole.
    execFileSync('fsck.ext4', ['-f', '-n', image], { stdio: 'ignore' })
  })
})

test('a hundred in one process leave nothing', async ({ folder }) => {
  makeFilesystem('ext4', join(folder, 'image'))
  await using device = await attach(join(folder, 'image'))
  const descriptors = countDescriptors()
  for (let i = 0; i < times(100); i++) {
    await using mount = await device.mount(null)
    expect(readdirSync(mount.path)).toEqual(['lost+found'])
  }
  expect(countDescriptors()).toBe(descriptors)
  expect(await device.detach()).toBe('detached')
})
