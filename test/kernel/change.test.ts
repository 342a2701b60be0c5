import { execFileSync } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readFileSync, rmSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach, type Progress } from '../../lib/index.ts'
import { countDescriptors, failure, losetup, sysfs, test } from './support.ts'

const MiB = 1 << 20

describe('changeBackingFile', () => {
  test('the device shows the new file, and keeps its settings', async ({ image }) => {
    const first = image('first', MiB, 1)
    const second = image('second', MiB, 2)
    await using device = await attach(first, { readOnly: true, reference: 'tag', directIO: true })
    const before = await device.status()
    await device.changeBackingFile(second)
    expect(await device.status()).toEqual({
      ...before,
      backingFile: second,
      backingInode: (await device.status()).backingInode,
      ...(before.diskSeq !== undefined && { diskSeq: device.ref.diskSeq }),
    })
    // None up to 5.14
    const diskSeq = sysfs(device.number, 'diskseq')
    expect(device.ref.diskSeq).toBe(diskSeq === undefined ? undefined : Number(diskSeq))
    expect(losetup(device.path)).toMatchObject({ 'back-file': second })
    expect(readFileSync(device.path).equals(readFileSync(second))).toBe(true)
    rmSync(first)
    expect(await device.detach()).toBe('detached')
  })

  test('a direct I/O setting is kept, whatever the new descriptor has', async ({ image }) => {
    const O_DIRECT = 0o40000
    const second = openSync(image('second'), O_DIRECT)
    try {
      await using device = await attach(image('first'), { readOnly: true, blockSize: 4096 })
      await device.changeBackingFile(second)
      expect(sysfs(device.number, 'loop/dio')).toBe('0')
    } finally {
      closeSync(second)
    }
  })

  test('verify compares first, and says where they differ', async ({ image }) => {
    const first = image('first', 3 * MiB, 7)
    const second = image('second', 3 * MiB, 7)
    await using device = await attach(first, { readOnly: true, offset: 4096 })
    const seen: Progress[] = []
    await device.changeBackingFile(second, { verify: true, onProgress: (progress) => seen.push(progress) })
    expect(seen.slice(-2).map(({ phase, copied }) => [phase, copied])).toEqual([
      ['verify', 3 * MiB - 4096],
      ['switch', 3 * MiB - 4096],
    ])
    expect(seen.slice(0, -1).every(({ phase }) => phase === 'verify')).toBe(true)
    expect(seen.every(({ total, bytesPerSecond }) => total === 3 * MiB - 4096 && bytesPerSecond > 0)).toBe(true)

    const fd = openSync(first, 'r+')
    writeSync(fd, '!', 2 * MiB + 5)
    closeSync(fd)
    const error = await failure('content-differs', () => device.changeBackingFile(first, { verify: true }))
    expect(error).toMatchObject({ code: 'EILSEQ', path: first })
    expect(error.message).toContain(`byte ${2 * MiB + 5 - 4096}`)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(second)
  })

  test('each broken rule is its own reason, and changes nothing', async ({ folder, image }) => {
    const file = image('file')
    const same = image('same')
    await using writable = await attach(file)
    expect(await failure('not-read-only', () => writable.changeBackingFile(same))).toMatchObject({ code: 'EINVAL' })

    await using device = await attach(image('read only'), { readOnly: true })
    const descriptors = countDescriptors()
    const before = await device.status()
    const larger = await failure('size-mismatch', () => device.changeBackingFile(image('larger', MiB + 4096)))
    expect(larger.message).toBe(
      `EINVAL: LOOP_CHANGE_FD ${device.path}: new backing file is 4096 bytes larger (${MiB + 4096}, must be ${MiB})`,
    )
    const smaller = await failure('size-mismatch', () => device.changeBackingFile(image('smaller', 512)))
    expect(smaller.message).toContain(`${MiB - 512} bytes smaller (512, must be ${MiB})`)
    await failure('no-such-file', () => device.changeBackingFile(join(folder, 'missing')))
    await failure('not-a-file-or-block-device', () => device.changeBackingFile(folder))
    await failure('backed-by-itself', () => device.changeBackingFile(device.path))
    expect(await device.status()).toEqual(before)
    expect(countDescriptors()).toBe(descriptors)
  })

  test('a present file that grew since is told, with what to do', async ({ image }) => {
    const first = image('first')
    await using device = await attach(first, { readOnly: true })
    truncateSync(first, 2 * MiB)
    const error = await failure('size-mismatch', () => device.changeBackingFile(image('second')))
    expect(error.hint).toContain('refreshCapacity')
    await failure('size-mismatch', () => device.migrate(`${first}.copy`))
    await device.refreshCapacity()
    await device.changeBackingFile(image('third', 2 * MiB))
  })

  test('a size limit can hide a difference in size', async ({ image }) => {
    await using device = await attach(image('first'), { readOnly: true, sizeLimit: 4096 })
    const larger = image('larger', 2 * MiB)
    await device.changeBackingFile(larger)
    expect((await device.status()).backingFile).toBe(larger)
  })

  test('K2: is refused under a mounted ext4, which goes on reading', async ({ folder, image }) => {
    const file = image('disk', 8 * MiB)
    const copy = join(folder, 'copy')
    const tree = join(folder, 'tree')
    mkdirSync(tree)
    writeFileSync(join(tree, 'witness'), 'still here')
    execFileSync('mkfs.ext4', ['-q', '-d', tree, file])
    execFileSync('cp', ['--sparse=auto', file, copy])
    const mountPoint = join(folder, 'mnt')
    mkdirSync(mountPoint)
    await using device = await attach(file, { readOnly: true })
    execFileSync('mount', ['-o', 'ro', device.path, mountPoint])
    try {
      const error = await failure('would-shut-down-filesystem', () => device.changeBackingFile(copy))
      expect(error).toMatchObject({ code: 'EBUSY', ioctl: 'LOOP_CHANGE_FD', path: device.path })
      expect(error.holders).toContainEqual({ device: device.path, kind: 'mount', mountPoint, fsType: 'ext4' })
      writeFileSync('/proc/sys/vm/drop_caches', '3')
      expect(execFileSync('cat', [join(mountPoint, 'witness')], { encoding: 'utf8' })).toBe('still here')
      expect(sysfs(device.number, 'loop/backing_file')).toBe(file)
    } finally {
      execFileSync('umount', [mountPoint])
    }
  })

  test('an abort, or an exception in onProgress, comes before the switch', async ({ image }) => {
    const first = image('first', 2 * MiB)
    const second = image('second', 2 * MiB)
    await using device = await attach(first, { readOnly: true })
    const reason = new Error('enough')
    const controller = new AbortController()
    const stop = () => controller.abort(reason)
    await expect(
      device.changeBackingFile(second, { verify: true, onProgress: stop, signal: controller.signal }),
    ).rejects.toBe(reason)
    await expect(
      device.changeBackingFile(second, {
        onProgress: () => {
          throw reason
        },
      }),
    ).rejects.toBe(reason)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(first)
  })
})
