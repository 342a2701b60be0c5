import { execFileSync } from 'node:child_process'
import { closeSync, linkSync, mkdirSync, openSync, rmSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach, type AttachOptions, LoopControl } from '../../lib/index.ts'
import { failure, sysfs, test, unusedNumber } from './support.ts'

const MiB = 1 << 20

/** losetup's attachment of the file: somebody who knows nothing of our locks. */
function losetupAttach(file: string, ...options: string[]): string {
  return execFileSync('losetup', ['--find', '--show', ...options, file], { encoding: 'utf8' }).trim()
}

describe('overlap', () => {
  test('two attachments of one file are refused where either can write', async ({ image }) => {
    const file = image('disk')
    await using first = await attach(file)
    for (const options of [{}, { readOnly: true }, { offset: 512 }] satisfies AttachOptions[]) {
      const error = await failure('overlap', () => attach(file, options))
      expect(error).toMatchObject({ code: 'EBUSY', backingFile: file })
      expect(error.message).toContain(first.path)
    }
    await first.detach()
    await using reader = await attach(file, { readOnly: true })
    await using second = await attach(file, { readOnly: true })
    expect(second.number).not.toBe(reader.number)
    await failure('overlap', () => attach(file))
  })

  test('ranges that only touch do not intersect', async ({ image }) => {
    const file = image('disk')
    await using first = await attach(file, { offset: 4096, sizeLimit: 4096 })
    await using below = await attach(file, { sizeLimit: 4096 })
    await using above = await attach(file, { offset: 8192 })
    expect(new Set([first.number, below.number, above.number]).size).toBe(3)
    await failure('overlap', () => attach(file, { offset: 4095, sizeLimit: 512 }))
    await failure('overlap', () => attach(file, { offset: 8191, sizeLimit: 512 }))
    // without a limit it goes on to wherever the file may grow
    await failure('overlap', () => attach(file, { offset: 2 * MiB, sizeLimit: 512 }))
  })

  test('hard links, symbolic links and bind mounts are the same file', async ({ folder, image }) => {
    const file = image('disk')
    const hard = join(folder, 'hard')
    linkSync(file, hard)
    const symbolic = join(folder, 'symbolic')
    symlinkSync(file, symbolic)
    const bound = join(folder, 'bound')
    mkdirSync(bound)
    execFileSync('mount', ['--bind', folder, bound])
    try {
      await using device = await attach(file)
      for (const other of [hard, symbolic, join(bound, 'disk'), join(bound, 'hard')]) {
        expect((await failure('overlap', () => attach(other))).message).toContain(device.path)
      }
    } finally {
      execFileSync('umount', [bound])
    }
  })

  test('it sees what losetup attached, and what is given as a descriptor', async ({ image }) => {
    const file = image('disk')
    const path = losetupAttach(file)
    const fd = openSync(file, 'r+')
    try {
      expect((await failure('overlap', () => attach(file))).message).toContain(path)
      expect((await failure('overlap', () => attach(fd))).message).toContain(path)
    } finally {
      closeSync(fd)
      execFileSync('losetup', ['--detach', path])
    }
    await using device = await attach(file)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
  })

  test('a file that others have open, attached to nothing, is attached', async ({ image }) => {
    const file = image('disk')
    const fd = openSync(file, 'r+')
    try {
      await using device = await attach(file)
      expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
      await failure('overlap', () => attach(fd))
    } finally {
      closeSync(fd)
    }
  })

  test('a block device is the same through every path of it', async ({ folder, image }) => {
    await using lower = await attach(image('disk'))
    const node = join(folder, 'node')
    execFileSync('mknod', [node, 'b', ...String(sysfs(lower.number, 'dev')).split(':')])
    const upper = await attach(lower.path)
    expect((await failure('overlap', () => attach(node))).message).toContain(upper.path)
    expect(await upper.detach()).toBe('detached')
  })

  test('a device that has no node here keeps nobody from attaching', async ({ image }) => {
    const number = unusedNumber()
    const other = await attach(image('other'), { number })
    const node = other.path
    const [major = '', minor = ''] = String(sysfs(number, 'dev')).split(':')
    rmSync(node)
    try {
      const fd = openSync(image('disk'), 'r+')
      try {
        // given as a descriptor, all devices are looked at
        await using device = await attach(fd)
        expect(device.number).not.toBe(number)
      } finally {
        closeSync(fd)
      }
    } finally {
      execFileSync('mknod', [node, 'b', major, minor])
      await other.detach()
      await using control = await LoopControl.open()
      await control.remove(number)
    }
  })

  test('allow checks nothing', async ({ image }) => {
    const file = image('disk')
    await using first = await attach(file)
    await using second = await attach(file, { overlap: 'allow' })
    expect(second.number).not.toBe(first.number)
  })

  test('reuse returns the same attachment, not owned; dropping it leaves the first alone', async ({ image }) => {
    const file = image('disk')
    await using first = await attach(file, { overlap: 'reuse', offset: 512, sizeLimit: 4096 })
    expect(first.owned).toBe(true)
    {
      await using second = await attach(file, { overlap: 'reuse', offset: 512n, sizeLimit: 4096 })
      expect(second.owned).toBe(false)
      expect(second.ref).toEqual(first.ref)
    }
    expect(sysfs(first.number, 'loop/backing_file')).toBe(file)
    // not the same, and so an overlap like any other
    await failure('overlap', () => attach(file, { overlap: 'reuse', offset: 512 }))
    await failure('overlap', () => attach(file, { overlap: 'reuse', offset: 512, sizeLimit: 4096, readOnly: true }))
    await failure('overlap', () => attach(file, { overlap: 'reuse', offset: 512, sizeLimit: 4096, blockSize: 4096 }))
    await using elsewhere = await attach(file, { overlap: 'reuse', offset: 8192, sizeLimit: 4096 })
    expect(elsewhere.owned).toBe(true)
  })

  test('of many that attach one file at once, one does', async ({ image }) => {
    const file = image('disk')
    const results = await Promise.allSettled(Array.from({ length: 16 }, () => attach(file)))
    const devices = results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []))
    expect(devices.length).toBe(1)
    for (const result of results)
      if (result.status === 'rejected') expect(result.reason).toMatchObject({ reason: 'overlap' })
    await devices[0]?.detach()
  })

  test('of many that reuse one file at once, one owns it', async ({ image }) => {
    const file = image('disk')
    const devices = await Promise.all(Array.from({ length: 16 }, () => attach(file, { overlap: 'reuse' })))
    expect(new Set(devices.map(({ number }) => number)).size).toBe(1)
    const owners = devices.filter(({ owned }) => owned)
    expect(owners.length).toBe(1)
    await Promise.all(devices.filter(({ owned }) => !owned).map((device) => device.close()))
    expect(await owners[0]?.detach()).toBe('detached')
  })

  test('changeBackingFile refuses a file that can be written through another device', async ({ image }) => {
    const second = image('second')
    await using device = await attach(image('first'), { readOnly: true })
    {
      await using writer = await attach(second)
      const error = await failure('overlap', () => device.changeBackingFile(second))
      expect(error).toMatchObject({ ioctl: 'LOOP_CHANGE_FD', backingFile: second })
      expect(error.message).toContain(writer.path)
    }
    await using reader = await attach(second, { readOnly: true })
    await device.changeBackingFile(second)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(second)
    expect(sysfs(reader.number, 'loop/backing_file')).toBe(second)
    // to the file it has already: its own attachment is no obstacle
    await device.changeBackingFile(second)
  })

  test('the probe leaves the caller its lease', async ({ image }) => {
    const script = `
import fcntl, os, subprocess, sys, signal
fd = os.open(sys.argv[1], os.O_RDONLY)
signal.signal(signal.SIGIO, lambda *_: os.write(1, b'broken '))
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
subprocess.run([sys.argv[2], sys.argv[3], 'attach', '--read-only', '/proc/self/fd/0'], stdin=fd, check=True)
print('lease', fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK)`
    const file = image('disk')
    const output = execFileSync('python3', ['-c', script, file, process.execPath, 'dist/cli/main.js'], {
      encoding: 'utf8',
    })
    const path = /^\/dev\/loop\d+/m.exec(output)?.[0] ?? ''
    execFileSync('losetup', ['--detach', path])
    expect(output).toContain('lease True')
    expect(output).not.toContain('broken')
  })
})
