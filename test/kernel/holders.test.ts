import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach, open } from '../../lib/index.ts'
import { blkPgAddPartitionSync, blkPgDelPartitionSync } from '../../lib/ioctl.ts'
import { MOUNT_NAMESPACE } from './environments.ts'
import { failure, sysfs, test } from './support.ts'

const MiB = 1 << 20

describe('holders', () => {
  test('nobody', async ({ image }) => {
    await using device = await attach(image('disk'))
    expect(await device.holders()).toEqual([])
  })

  test('mounts, each with its mount point unescaped', async ({ folder, image }) => {
    await using device = await attach(image('disk', 8 * MiB))
    execFileSync('mkfs.ext4', ['-q', device.path])
    const mountPoints = ['with space', 'with\ttab', 'with\\backslash', 'with ünïcode'].map((name) => join(folder, name))
    for (const mountPoint of mountPoints) {
      mkdirSync(mountPoint)
      execFileSync('mount', [device.path, mountPoint])
    }
    try {
      const holders = await device.holders()
      expect(holders).toEqual(
        mountPoints.map((mountPoint) => ({ device: device.path, kind: 'mount', mountPoint, fsType: 'ext4' })),
      )
    } finally {
      for (const mountPoint of mountPoints) execFileSync('umount', [mountPoint])
    }
  })

  test('swap', async ({ image }) => {
    await using device = await attach(image('disk', MiB, 1))
    execFileSync('mkswap', [device.path], { stdio: 'ignore' })
    execFileSync('swapon', [device.path])
    try {
      expect(await device.holders()).toContainEqual({ device: device.path, kind: 'swap' })
      const error = await failure('in-use', () => device.detach({ timeout: 600_000 }))
      expect(error.message).toContain('swap')
    } finally {
      execFileSync('swapoff', [device.path])
    }
  })

  test('of this process itself, which descriptors', async ({ image }) => {
    await using device = await attach(image('disk'))
    await using other = await open(device.ref)
    const error = await failure('in-use', () => device.detach({ timeout: 0 }))
    expect(error.holders).toMatchObject([{ kind: 'process', pid: process.pid, descriptors: [other.fd] }])
    expect(error.message).toContain(`which is this one, has ${device.path} open as descriptor ${other.fd}`)
    expect(error.hint).toContain(`close descriptor ${other.fd} of process ${process.pid}, which is this one;`)

    const third = openSync(device.path, 'r')
    const both = await device.holders()
    closeSync(third)
    const descriptors = [other.fd, third].toSorted((a, b) => a - b)
    expect(both).toMatchObject([{ pid: process.pid, descriptors: expect.arrayContaining(descriptors) }])
  })

  test('processes, once each, this one too; a partition counts', async ({ image }) => {
    await using device = await attach(image('disk'))
    blkPgAddPartitionSync(device.fd, { number: 1, start: 4096n, length: 8192n })
    const partition = `${device.path}p1`
    const given = openSync(device.path, 'r')
    const child = spawn('sleep', ['1000'], { stdio: [given, 'ignore', 'ignore'] })
    await once(child, 'spawn')
    closeSync(given)
    const own = openSync(partition, 'r')
    try {
      const command = readFileSync('/proc/self/comm', 'utf8').trim()
      const holders = await device.holders()
      expect(holders.length).toBe(2)
      expect(holders).toContainEqual({ device: device.path, kind: 'process', pid: child.pid, command: 'sleep' })
      expect(holders).toContainEqual({
        device: partition,
        kind: 'process',
        pid: process.pid,
        command,
        descriptors: [own],
      })
    } finally {
      closeSync(own)
      child.kill('SIGKILL')
      await once(child, 'exit')
      blkPgDelPartitionSync(device.fd, 1)
    }
  })

  test('a mounted partition is named, and keeps the device', async ({ folder, image }) => {
    await using device = await attach(image('disk', 8 * MiB))
    blkPgAddPartitionSync(device.fd, { number: 1, start: BigInt(MiB), length: BigInt(6 * MiB) })
    const partition = `${device.path}p1`
    execFileSync('mkfs.ext4', ['-q', partition])
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    execFileSync('mount', [partition, mountPoint])
    try {
      writeFileSync(join(mountPoint, 'file'), 'there')
      const holder = { device: partition, kind: 'mount', mountPoint, fsType: 'ext4' }
      expect(await device.holders()).toEqual([holder])
      const error = await failure('in-use', () => device.detach({ timeout: 600_000 }))
      expect(error.holders).toEqual([holder])
      expect(readFileSync(join(mountPoint, 'file'), 'utf8')).toBe('there')
    } finally {
      execFileSync('umount', [mountPoint])
      blkPgDelPartitionSync(device.fd, 1)
    }
  })

  test('a mount in another namespace, by the first process there, and how to get in', async ({ folder, image }) => {
    await using device = await attach(image('disk', 8 * MiB))
    execFileSync('mkfs.ext4', ['-q', device.path])
    const mountPoint = join(folder, 'its mnt')
    mkdirSync(mountPoint)
    const child = spawn(
      'env',
      [...MOUNT_NAMESPACE, 'sh', '-c', 'mount "$0" "$1" && echo mounted && read line', device.path, mountPoint],
      {
        stdio: ['pipe', 'pipe', 'inherit'],
      },
    )
    const { pid } = child
    try {
      await once(child.stdout, 'data')
      const holder = { device: device.path, kind: 'mount', mountPoint, fsType: 'ext4', pid, command: 'sh' }
      expect(await device.holders()).toEqual([holder])
      const error = await failure('in-use', () => device.detach())
      expect(error.holders).toEqual([holder])
      expect(error.hint).toContain(`nsenter -t ${pid} -m umount '${mountPoint}'`)
      expect(sysfs(device.number, 'loop/backing_file')).toBeDefined()
      // What the hint says is what to do.
      execFileSync('nsenter', ['-t', String(pid), '-m', 'umount', mountPoint])
      expect(await device.holders()).toEqual([])
    } finally {
      child.stdin.end('\n')
      await once(child, 'exit')
    }
  })

  test('processes in a filesystem that was unmounted lazily', async ({ folder, image }) => {
    await using device = await attach(image('disk', 8 * MiB))
    execFileSync('mkfs.ext4', ['-q', device.path])
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    execFileSync('mount', [device.path, mountPoint])
    writeFileSync(join(mountPoint, 'file'), 'there')
    const inside = spawn('sh', ['-c', 'echo in; read line'], { cwd: mountPoint, stdio: ['pipe', 'pipe', 'inherit'] })
    const reading = spawn('sh', ['-c', 'exec 3<"$0"; echo in; read line', join(mountPoint, 'file')], {
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    try {
      await Promise.all([once(inside.stdout, 'data'), once(reading.stdout, 'data')])
      execFileSync('umount', ['--lazy', mountPoint])
      const held = [inside, reading].map(({ pid }) => {
        return { device: device.path, kind: 'process', pid, command: 'sh', unmounted: true }
      })
      const holders = await device.holders()
      expect(holders).toHaveLength(2)
      expect(holders).toEqual(expect.arrayContaining(held))
      const error = await failure('in-use', () => device.detach({ timeout: 0 }))
      expect(error.holders).toEqual(holders)
      expect(error.message).toContain('unmounted lazily')
    } finally {
      for (const child of [inside, reading]) {
        child.stdin.end('\n')
        await once(child, 'exit')
      }
    }
    expect(await device.holders()).toEqual([])
  })

  test('a lazily unmounted ext4 would be shut down by a change too', async ({ folder, image }) => {
    const file = image('disk', 8 * MiB)
    execFileSync('mkfs.ext4', ['-q', file])
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    await using device = await attach(file, { readOnly: true })
    execFileSync('mount', ['-o', 'ro', device.path, mountPoint])
    const inside = spawn('sh', ['-c', 'echo in; read line; ls lost+found'], {
      cwd: mountPoint,
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    try {
      await once(inside.stdout, 'data')
      execFileSync('umount', ['--lazy', mountPoint])
      const error = await failure('would-shut-down-filesystem', () => device.migrate(join(folder, 'copy')))
      expect(error.hint).toContain(`end process ${inside.pid}`)
      expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
    } finally {
      inside.stdin.end('\n')
      expect(await once(inside, 'exit')).toEqual([0, null])
    }
  })

  test('a mounted btrfs, which has a device number of its own', async ({ folder, image, skip }) => {
    if (!/\bbtrfs$/m.test(readFileSync('/proc/filesystems', 'utf8'))) skip('the kernel knows no btrfs')
    if (spawnSync('mkfs.btrfs', ['--version']).error) skip('mkfs.btrfs is not installed')
    await using device = await attach(image('disk', 128 * MiB))
    await using second = await attach(image('second', 128 * MiB))
    execFileSync('mkfs.btrfs', ['-q', '-f', '-d', 'single', device.path, second.path])
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    execFileSync('mount', ['-o', `device=${second.path}`, device.path, mountPoint])
    try {
      for (const { path, holders } of [device, second].map((each) => ({ path: each.path, holders: each.holders() }))) {
        expect(await holders).toEqual([{ device: path, kind: 'mount', mountPoint, fsType: 'btrfs' }])
      }
      expect((await failure('in-use', () => second.detach({ timeout: 0 }))).message).toContain(mountPoint)
    } finally {
      execFileSync('umount', [mountPoint])
    }
  })
})
