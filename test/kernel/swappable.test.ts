import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  openSync,
  closeSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach, find, list, open } from '../../lib/index.ts'
import { blkPgAddPartitionSync, blkPgDelPartitionSync } from '../../lib/ioctl.ts'
import { needs, needsKernel } from '../needs.ts'
import { countDescriptors, failure, losetup, sysfs, test } from './support.ts'

const MiB = 1 << 20

function dropCaches(): void {
  writeFileSync('/proc/sys/vm/drop_caches', '3')
}

/** An image of that filesystem with a file in it, and a copy of the image; where it cannot be made, the test is skipped. */
function makeImages(folder: string, type: 'ext4' | 'xfs' | 'squashfs' | 'erofs'): { first: string; second: string } {
  if (type !== 'ext4') needsKernel(type)
  needs(type === 'squashfs' ? 'mksquashfs' : `mkfs.${type}`)
  const source = join(folder, `source-${type}`)
  mkdirSync(source)
  writeFileSync(join(source, 'file'), 'x'.repeat(MiB))
  const first = join(folder, `${type}.img`)
  const second = join(folder, `${type}-copy.img`)
  switch (type) {
    case 'ext4':
      execFileSync('mkfs.ext4', ['-q', '-d', source, first, '16M'])
      break
    case 'squashfs':
      execFileSync('mksquashfs', [source, first, '-quiet', '-no-progress'])
      break
    case 'erofs':
      execFileSync('mkfs.erofs', [first, source], { stdio: 'ignore' })
      break
    case 'xfs':
      execFileSync('truncate', ['-s', '300M', first])
      execFileSync('mkfs.xfs', ['-q', first])
  }
  copyFileSync(first, second)
  return { first, second }
}

/** Mounts read-only for as long as `use` runs. */
async function mounted(device: string, folder: string, use: (mountPoint: string) => unknown): Promise<void> {
  const mountPoint = join(folder, 'mnt')
  mkdirSync(mountPoint, { recursive: true })
  execFileSync('mount', ['-o', 'ro', device, mountPoint])
  try {
    await use(mountPoint)
  } finally {
    execFileSync('umount', [mountPoint])
  }
}

describe('swappable', () => {
  test('is a stack of two: the upper one is the device, the lower one has the file', async ({ image }) => {
    const file = image('disk', MiB, 7)
    const device = await attach(file, { readOnly: true, swappable: true, reference: 'mine', blockSize: 4096 })
    const status = await device.status()
    expect(status).toMatchObject({ swappable: true, readOnly: true, reference: 'mine', size: MiB, blockSize: 4096 })
    const { lower = -1 } = status
    expect(status.backingFile).toBe(`/dev/loop${lower}`)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(`/dev/loop${lower}`)
    expect(sysfs(lower, 'loop/backing_file')).toBe(file)
    expect(sysfs(lower, 'loop/autoclear')).toBe('1')
    expect((await find(file)).map(({ number }) => number)).toEqual([lower])
    expect((await find({ reference: 'loopctl:lower' })).map(({ number }) => number)).toContain(lower)
    expect((await list()).find(({ number }) => number === device.number)).toMatchObject({ lower })

    const opened = await open(lower)
    expect(await opened.holders()).toContainEqual({
      device: opened.path,
      kind: 'loop',
      number: device.number,
      path: device.path,
    })
    expect((await opened.status()).swappable).toBe(false)
    await opened.close()
    expect(await device.detach()).toBe('detached')
    expect(existsSync(`/sys/block/loop${device.number}/loop`)).toBe(false)
    expect(existsSync(`/sys/block/loop${lower}/loop`)).toBe(false)
  })

  test('needs readOnly, and is its own: not reused', async ({ image }) => {
    const file = image('disk')
    const wrong = { name: 'TypeError', code: 'ERR_INVALID_ARG_VALUE' }
    await expect(attach(file, { swappable: true })).rejects.toMatchObject(wrong)
    await expect(attach(file, { swappable: true, readOnly: false })).rejects.toMatchObject(wrong)
    await expect(attach(file, { swappable: true, readOnly: true, overlap: 'reuse' })).rejects.toMatchObject(wrong)
    await expect(attach(file, { swappable: 1 as never })).rejects.toMatchObject({ code: 'ERR_INVALID_ARG_TYPE' })
  })

  test('what fails leaves neither', async ({ image }) => {
    const file = image('disk')
    await using other = await attach(image('other'))
    const descriptors = countDescriptors()
    await failure('already-attached', () => attach(file, { readOnly: true, swappable: true, number: other.number }))
    expect(await find(file)).toEqual([])
    expect(countDescriptors()).toBe(descriptors)
  })

  test('changeBackingFile changes the lower one, from any process; the identity of the upper one stays', async ({
    image,
  }) => {
    const first = image('first', MiB, 1)
    const second = image('second', MiB, 2)
    const device = await attach(first, { readOnly: true, swappable: true })
    const { lower = -1 } = await device.status()
    const { ref } = device
    await device.changeBackingFile(second)
    expect(sysfs(lower, 'loop/backing_file')).toBe(second)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(`/dev/loop${lower}`)
    expect(device.ref).toEqual(ref)

    execFileSync(process.execPath, ['dist/cli/main.js', 'change', device.path, first])
    expect(sysfs(lower, 'loop/backing_file')).toBe(first)
    await failure('size-mismatch', () => device.changeBackingFile(image('larger', 2 * MiB)))
    await failure('content-differs', () => device.changeBackingFile(second, { verify: true }))
    expect(sysfs(lower, 'loop/backing_file')).toBe(first)
    expect(await device.detach()).toBe('detached')
  })

  test('released, it stays, and goes as one', async ({ image }) => {
    const file = image('disk')
    const device = await attach(file, { readOnly: true, swappable: true })
    const { lower = -1 } = await device.status()
    await device.release()
    expect(sysfs(device.number, 'loop/autoclear')).toBe('0')
    expect(sysfs(lower, 'loop/autoclear')).toBe('1')
    const opened = await open(device.number)
    expect(await opened.detach()).toBe('detached')
    expect(existsSync(`/sys/block/loop${lower}/loop`)).toBe(false)
  })

  test('is known in another root, and where the lower node is gone: never is the upper one changed', async ({
    folder,
    image,
  }) => {
    const file = image('disk', MiB, 1)
    const second = image('second', MiB, 2)
    const root = join(folder, 'root')
    mkdirSync(root)
    execFileSync('mount', ['--rbind', '/', root])
    execFileSync('mount', ['--make-rslave', root])
    try {
      const script = `
        const { attach } = await import(${JSON.stringify(`${process.cwd()}/dist/index.js`)})
        const device = await attach(${JSON.stringify(file)}, { readOnly: true, swappable: true })
        console.log((await device.release()).slice('/dev/loop'.length))`
      const words = [root, process.execPath, '--input-type=module', '-e', script]
      const number = Number(execFileSync('chroot', words, { encoding: 'utf8' }))
      const device = await open(number)
      const { lower = -1, swappable } = await device.status()
      expect(swappable).toBe(true)
      expect(sysfs(number, 'loop/backing_file')).toMatch(/loop\d+$/)
      await device.changeBackingFile(second)
      expect(sysfs(lower, 'loop/backing_file')).toBe(second)
      expect((await device.status()).lower).toBe(lower)
      expect(await device.detach()).toBe('detached')
    } finally {
      execFileSync('umount', ['--recursive', '--lazy', root])
    }
  })

  test('kill -9 leaves neither', async ({ image }) => {
    const file = image('disk')
    const script = `
      import { attach } from 'loopctl'
      const device = await attach(${JSON.stringify(file)}, { readOnly: true, swappable: true })
      process.stdout.write(device.path, () => process.kill(process.pid, 'SIGKILL'))`
    const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const exited = once(child, 'exit')
    const [output] = (await once(child.stdout, 'data')) as [Buffer]
    await exited
    expect(losetup(output.toString())?.['back-file'] ?? null).toBe(null)
    // The kernel lets go of the lower one a moment after the upper one.
    await expect.poll(() => find(file)).toEqual([])
  })

  for (const type of ['ext4', 'xfs'] as const) {
    test(`${type} on the upper one goes on reading through 10 changes with dropped caches`, async ({ folder }) => {
      const { first, second } = makeImages(folder, type)
      await using device = await attach(first, { readOnly: true, swappable: true })
      await mounted(device.path, folder, async (mountPoint) => {
        for (let round = 0; round < 10; round++) {
          await device.changeBackingFile(round % 2 === 0 ? second : first)
          dropCaches()
          const names = readdirSync(mountPoint)
          if (type === 'ext4') {
            expect(names).toContain('file')
            expect(execFileSync('tail', ['-c', '1', join(mountPoint, 'file')]).toString()).toBe('x')
          } else expect(names).toEqual([])
        }
      })
    })
  }
})

describe('the guard', () => {
  for (const type of ['squashfs', 'erofs'] as const) {
    test(`${type} mounted directly is known to survive, and does`, async ({ folder }) => {
      const { first, second } = makeImages(folder, type)
      await using device = await attach(first, { readOnly: true })
      await mounted(device.path, folder, async (mountPoint) => {
        for (const file of [second, first]) {
          await device.changeBackingFile(file, { verify: true })
          dropCaches()
          expect(execFileSync('tail', ['-c', '1', join(mountPoint, 'file')]).toString()).toBe('x')
          expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
        }
      })
    })
  }

  for (const type of ['ext4', 'xfs'] as const) {
    test(`${type} mounted directly is refused, named, and goes on reading; force does it`, async ({ folder }) => {
      const { first, second } = makeImages(folder, type)
      await using device = await attach(first, { readOnly: true })
      await mounted(device.path, folder, async (mountPoint) => {
        const error = await failure('would-shut-down-filesystem', () => device.changeBackingFile(second))
        expect(error.holders).toEqual([{ device: device.path, kind: 'mount', mountPoint, fsType: type }])
        dropCaches()
        expect(readdirSync(mountPoint).includes('file')).toBe(type === 'ext4')
        expect(sysfs(device.number, 'loop/backing_file')).toBe(first)
        await device.changeBackingFile(second, { force: true })
        expect(sysfs(device.number, 'loop/backing_file')).toBe(second)
      })
    })
  }

  test('a mount in another namespace is found, and judged the same', async ({ folder }) => {
    for (const [type, refused] of [
      ['ext4', true],
      ['squashfs', false],
    ] as const) {
      const { first, second } = makeImages(folder, type)
      await using device = await attach(first, { readOnly: true })
      const mountPoint = join(folder, `mnt-${type}`)
      mkdirSync(mountPoint)
      const script = 'mount -o ro "$0" "$1" && echo mounted && read line'
      const child = spawn('unshare', ['--mount', 'sh', '-c', script, device.path, mountPoint], {
        stdio: ['pipe', 'pipe', 'inherit'],
      })
      try {
        await once(child.stdout, 'data')
        if (refused) {
          const error = await failure('would-shut-down-filesystem', () => device.changeBackingFile(second))
          const { pid } = child
          const holder = { device: device.path, kind: 'mount', mountPoint, fsType: type, pid, command: 'sh' }
          expect(error.holders).toEqual([holder])
          expect(error.hint).toContain(`nsenter -t ${pid} -m`)
        } else await device.changeBackingFile(second)
        expect(sysfs(device.number, 'loop/backing_file')).toBe(refused ? first : second)
      } finally {
        child.stdin.end('\n')
        await once(child, 'exit')
      }
    }
  })

  test('a lazily unmounted filesystem that is still in use is refused, and by whom it is used is told', async ({
    folder,
  }) => {
    const { first, second } = makeImages(folder, 'ext4')
    await using device = await attach(first, { readOnly: true })
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    execFileSync('mount', ['-o', 'ro', device.path, mountPoint])
    const fd = openSync(join(mountPoint, 'file'), 'r')
    execFileSync('umount', ['--lazy', mountPoint])
    try {
      const error = await failure('would-shut-down-filesystem', () => device.changeBackingFile(second))
      const command = readFileSync('/proc/self/comm', 'utf8').trim()
      const holder = { device: device.path, kind: 'process', pid: process.pid, command, unmounted: true }
      expect(error.holders).toEqual([holder])
      expect(sysfs(device.number, 'loop/backing_file')).toBe(first)
    } finally {
      closeSync(fd)
    }
  })

  test('a mount of a partition alone is not refused, and survives', async ({ folder, image }) => {
    const { first: filesystem } = makeImages(folder, 'ext4')
    const first = image('first', 20 * MiB)
    execFileSync('dd', [`if=${filesystem}`, `of=${first}`, 'bs=1M', 'seek=1', 'conv=notrunc'], { stdio: 'ignore' })
    const second = join(folder, 'second')
    copyFileSync(first, second)
    await using device = await attach(first, { readOnly: true })
    blkPgAddPartitionSync(device.fd, { number: 1, start: BigInt(MiB), length: BigInt(16 * MiB) })
    try {
      await mounted(`${device.path}p1`, folder, async (mountPoint) => {
        await device.changeBackingFile(second)
        expect(sysfs(device.number, 'loop/backing_file')).toBe(second)
        dropCaches()
        expect(execFileSync('tail', ['-c', '1', join(mountPoint, 'file')]).toString()).toBe('x')
      })
    } finally {
      blkPgDelPartitionSync(device.fd, 1)
    }
  })
})
