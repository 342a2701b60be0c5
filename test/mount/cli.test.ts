/** loopctl mount, umount, create, run --mount, detach --unmount. */

import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdirSync, openSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, onTestFinished, vi } from 'vitest'
import { attach } from '../../lib/index.ts'
import { sfdisk, TWO } from '../kernel/partitioned.ts'
import { attachedNumbers, sysfs } from '../kernel/support.ts'
import { needs } from '../needs.ts'
import { limit } from '../scale.ts'
import { expectDetached, makeFilesystem, mountsUnder, test } from './support.ts'

const COMMAND = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url))

function loopctl(...words: string[]): { status: number | null; stdout: string; stderr: string } {
  const { status, stdout, stderr } = spawnSync(process.execPath, [COMMAND, ...words], { encoding: 'utf8' })
  return { status, stdout, stderr }
}

const LONG = { timeout: limit(60_000) }

const done = { status: 0, stdout: '', stderr: '' }
const unmounted = { ...done, stdout: 'unmounted\n' }

function devicesOf(image: string): number[] {
  return attachedNumbers().filter((number) => sysfs(number, 'loop/backing_file') === image)
}

describe('mount and umount', () => {
  test('it stays after the command, and goes with umount, ours or another', LONG, async ({ folder, place }) => {
    const image = join(folder, 'image')
    makeFilesystem('ext4', image)
    for (const unmount of [() => loopctl('umount', place), () => void execFileSync('umount', [place])]) {
      expect(loopctl('mount', image, place)).toEqual(done)
      const [number = -1] = devicesOf(image)
      expect(mountsUnder(place)).toMatchObject([{ source: `/dev/loop${number}`, fstype: 'ext4' }])
      expect(sysfs(number, 'loop/autoclear')).toBe('1')
      unmount()
      expect(mountsUnder(place)).toEqual([])
      expectDetached(image)
    }
  })

  test('options, JSON, and what is wrong', LONG, async ({ folder, place }) => {
    const image = join(folder, 'image')
    makeFilesystem('ext4', image)
    const { stdout } = loopctl('mount', '--json', '-r', '-o', 'noatime,suid', image, place)
    const [listed] = mountsUnder(place)
    expect(JSON.parse(stdout)).toEqual({ path: place, source: listed?.source, fsType: 'ext4' })
    expect(listed?.options).toBe('ro,nodev,noatime')
    const fd = openSync(join(place, 'lost+found'), 'r')
    const busy = loopctl('umount', '--timeout', '10', place)
    expect(busy).toMatchObject({ status: 1, stdout: '' })
    expect(busy.stderr).toMatch(new RegExp(`process ${process.pid} .* uses it`))
    expect(JSON.parse(loopctl('umount', '--json', '--lazy', place).stdout)).toEqual([
      { path: place, result: 'deferred' },
    ])
    closeSync(fd)
    await vi.waitFor(() => expect(devicesOf(image)).toEqual([]))

    const made = join(place, 'made')
    expect(loopctl('mount', image, made)).toMatchObject({ status: 1, stdout: '' })
    expect(loopctl('mount', '--make-dir', image, made)).toEqual(done)
    expect(loopctl('umount', made)).toEqual(unmounted)
    const again = loopctl('umount', made, place)
    expect(again.status).toBe(1)
    expect(again.stderr.match(/nothing is mounted there/g)).toHaveLength(2)
    expect(loopctl('umount', '/proc').stderr).toContain('proc is no loop device')
    expect(loopctl('mount', image).status).toBe(2)
    expect(loopctl('mount', '-o', 'source=/dev/sda', image, place).status).toBe(2)
    expect(loopctl('mount', '-t', 'xfs', image, place).stderr).toContain(
      'there is no superblock of xfs, but that of ext4',
    )
    expect(devicesOf(image)).toEqual([])
    expect(mountsUnder(folder)).toEqual([])
  })

  test('an image that is attached already', LONG, async ({ folder, place }) => {
    const image = join(folder, 'image')
    makeFilesystem('ext4', image)
    await using device = await attach(image)
    const refused = loopctl('mount', image, place)
    expect(refused.status).toBe(1)
    expect(refused.stderr).toMatch(/^hint: .*--overlap reuse.*--overlap allow$/m)
    expect(loopctl('mount', '--overlap', 'reuse', image, place)).toEqual(done)
    expect(mountsUnder(place)).toMatchObject([{ source: device.path }])
    expect(loopctl('umount', place)).toEqual(unmounted)
    expect(devicesOf(image)).toEqual([device.number])
  })

  test('a partition, by number and by label', LONG, async ({ folder, place, image }) => {
    needs('sfdisk')
    const file = image('disk', 16 << 20)
    sfdisk(file, TWO)
    execFileSync('mkfs.ext4', ['-q', '-F', '-E', 'offset=2097152', file, '2M'], { stdio: 'ignore' })
    for (const ref of ['2', 'second', 'label=second']) {
      expect(loopctl('mount', '--partition', ref, file, place), ref).toEqual(done)
      expect(sysfs(devicesOf(file)[0] ?? -1, 'loop/offset')).toBe('2097152')
      expect(loopctl('umount', place)).toEqual(unmounted)
    }
    expect(loopctl('mount', '--partition', 'third', file, place).stderr).toContain('1 ("first"), 2 ("second")')
    expect(mountsUnder(folder)).toEqual([])
  })
})

test('create: sparse, reserved, and not over another file', LONG, async ({ folder }) => {
  const file = join(folder, 'disk.img')
  expect(loopctl('create', file, '4M')).toEqual(done)
  expect(statSync(file)).toMatchObject({ size: 4 << 20, blocks: 0 })
  expect(loopctl('create', file, '8M')).toMatchObject({ status: 1 })
  expect(JSON.parse(loopctl('create', '--json', '--allocate', '--overwrite', file, '8M').stdout)).toEqual({
    path: file,
    size: 8 << 20,
  })
  expect(statSync(file).blocks * 512).toBeGreaterThanOrEqual(8 << 20)
  expect(loopctl('create', file, 'much').status).toBe(2)
  expect(readdirSync(folder)).toEqual(['disk.img'])
})

describe('run --mount', () => {
  test('private: for the command alone; its exit status; nothing is left', LONG, async ({ folder, place }) => {
    const image = join(folder, 'image')
    makeFilesystem('ext4', image)
    const script = 'echo "$LOOP_DEVICE $LOOP_MOUNT"; echo hello > "$LOOP_MOUNT/hello"; cat /proc/mounts; exit 7'
    const result = loopctl('run', '--mount', image, '--', 'sh', '-c', script)
    expect(result).toMatchObject({ status: 7, stderr: '' })
    const [, device = '', path = ''] = /^(\S+) (\S+)\n/.exec(result.stdout) ?? []
    expect(path).toMatch(/^\/proc\/\d+\/fd\/\d+$/)
    expect(result.stdout.slice(device.length + path.length + 2)).not.toContain(device)
    expect(devicesOf(image)).toEqual([])
    // The option takes no word after it for its value.
    expect(loopctl('run', '--mount', '-r', image, '--', 'sh', '-c', 'cat $LOOP_MOUNT/hello')).toEqual({
      ...done,
      stdout: 'hello\n',
    })
    const there = loopctl('run', `--mount=${place}`, image, '--', 'sh', '-c', 'cat $LOOP_MOUNT/hello; echo $LOOP_MOUNT')
    expect(there).toEqual({ ...done, stdout: `hello\n${place}\n` })
    expect(mountsUnder(folder)).toEqual([])
    expect(devicesOf(image)).toEqual([])
    // The image has no table.
    expect(loopctl('run', '--partition', '1', image, '--', 'true').status).toBe(1)
    expect(loopctl('run', '--mount=', image, '--', 'true').status).toBe(2)
  })

  test('killed at any moment: nothing is left', LONG, async ({ folder }) => {
    const image = join(folder, 'image')
    makeFilesystem('ext4', image)
    for (const signal of ['SIGKILL', 'SIGTERM', 'SIGINT', 'SIGHUP'] as const) {
      const child = spawn(
        process.execPath,
        [COMMAND, 'run', '--mount', image, '--', 'sh', '-c', 'echo ready; exec sleep 60'],
        {
          stdio: ['ignore', 'pipe', 'ignore'],
          detached: true,
        },
      )
      onTestFinished(() => {
        try {
          process.kill(-(child.pid ?? 0), 'SIGKILL')
        } catch {
          // All of its group are gone.
        }
      })
      const exit = once(child, 'exit')
      await once(child.stdout, 'data')
      expect(devicesOf(image)).toHaveLength(1)
      child.kill(signal)
      await exit
      await vi.waitFor(() => expect(devicesOf(image), signal).toEqual([]), { timeout: limit(5_000) })
    }
  })

  test('what the command leaves running keeps it until that ends', LONG, async ({ folder, place }) => {
    const image = join(folder, 'image')
    makeFilesystem('ext4', image)
    const script = 'cd "$LOOP_MOUNT" && { setsid sleep 60 >/dev/null 2>&1 </dev/null & echo $!; }'
    const result = loopctl('run', `--mount=${place}`, image, '--', 'sh', '-c', script)
    expect(result).toMatchObject({ status: 0 })
    expect(result.stderr).toContain('is still in use and is unmounted when that ends')
    expect(mountsUnder(place)).toEqual([])
    expect(devicesOf(image)).toHaveLength(1)
    process.kill(Number(result.stdout), 'SIGKILL')
    await vi.waitFor(() => expect(devicesOf(image)).toEqual([]), { timeout: limit(5_000) })
  })
})

test('detach --unmount: it says what it unmounted', LONG, async ({ folder, place }) => {
  const image = join(folder, 'image')
  makeFilesystem('ext4', image)
  await using device = await attach(image)
  mkdirSync(join(folder, 'other'))
  for (const target of [place, join(folder, 'other')]) execFileSync('mount', [device.path, target])
  await device.close()
  writeFileSync(join(place, 'x'), 'x')
  expect(loopctl('detach', device.path)).toMatchObject({ status: 1 })
  const result = loopctl('detach', '--unmount', device.path)
  expect(result).toMatchObject({ status: 0, stdout: 'detached\n' })
  expect(result.stderr.split('\n').toSorted()).toEqual(
    ['', `loopctl: unmounted ${place}`, `loopctl: unmounted ${join(folder, 'other')}`].toSorted(),
  )
  expect(mountsUnder(folder)).toEqual([])
  expectDetached(image)
  expect(readFileSync(image).includes('x')).toBe(true)
})
