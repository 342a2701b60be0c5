import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach } from '../../lib/index.ts'
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
      expect(holders).toContainEqual({ device: partition, kind: 'process', pid: process.pid, command })
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

  test('a mount in another namespace is in the way, and unknown', async ({ folder, image }) => {
    await using device = await attach(image('disk', 8 * MiB))
    execFileSync('mkfs.ext4', ['-q', device.path])
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    const child = spawn(
      'env',
      [...MOUNT_NAMESPACE, 'sh', '-c', 'mount "$0" "$1" && echo mounted && read line', device.path, mountPoint],
      {
        stdio: ['pipe', 'pipe', 'inherit'],
      },
    )
    try {
      await once(child.stdout, 'data')
      const error = await failure('in-use', () => device.detach())
      expect(error.holders).toEqual([{ device: device.path, kind: 'unknown' }])
      expect(sysfs(device.number, 'loop/backing_file')).toBeDefined()
    } finally {
      child.stdin.end('\n')
      await once(child, 'exit')
    }
  })
})
