/** mountImage(), createImage(), withDevice(): the whole way in one call, and all of it undone where it fails. */

import { execFileSync } from 'node:child_process'
import {
  closeSync,
  cpSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  statfsSync,
  statSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect } from 'vitest'
import { attach, createImage, type LoopDevice, mountImage, withDevice } from '../../lib/index.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import { eachCall, limit, STEP } from '../scale.ts'
import { env, kernelHas, needs, needsKernel } from '../needs.ts'
import { sfdisk, sfdiskAt, TWO_4096 } from '../kernel/partitioned.ts'
import { attachedNumbers, countDescriptors, failure, sysfs } from '../kernel/support.ts'
import { expectDetached, makeFilesystem, mountsUnder, test } from './support.ts'

const MiB = 1 << 20

afterEach(() => observe(undefined))

function numberOf(path: string): number {
  return Number(/^\/dev\/loop(\d+)$/.exec(path)?.[1])
}

/** Puts the bytes of a file into the image. */
function insert(image: string, file: string, at: number): void {
  const fd = openSync(image, 'r+')
  writeSync(fd, readFileSync(file), 0, undefined, at)
  closeSync(fd)
}

const TABLE = 'label: gpt\nstart=2048, size=16384, name=first\nstart=32768, size=16384, name=second\n'

describe('mountImage', () => {
  test('on a folder, and back: the device is gone with the mount', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    const descriptors = countDescriptors()
    const mount = await mountImage(join(folder, 'image'), place)
    expect(mountsUnder(place)).toMatchObject([{ source: mount.source, fstype: 'ext4' }])
    writeFileSync(join(place, 'x'), 'x')
    expect(await mount.unmount()).toBe('unmounted')
    expectDetached(join(folder, 'image'))
    await failure('not-mounted', () => mount.unmount())
    expect(countDescriptors()).toBe(descriptors)
    {
      await using again = await mountImage(join(folder, 'image'), place, { readOnly: true })
      expect(readFileSync(join(again.path, 'x'), 'utf8')).toBe('x')
      expect(sysfs(numberOf(again.source), 'ro')).toBe('1')
    }
    expect(mountsUnder(folder)).toEqual([])
    {
      using again = await mountImage(join(folder, 'image'), place)
      expect(existsSync(join(again.path, 'x'))).toBe(true)
    }
    expect(mountsUnder(folder)).toEqual([])
    expect(attachedNumbers().filter((n) => sysfs(n, 'loop/backing_file')?.startsWith(folder))).toEqual([])
  })

  test('unmounted by somebody else: the device goes all the same', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    const mount = await mountImage(join(folder, 'image'), place)
    execFileSync('umount', [place])
    await failure('not-mounted', () => mount.unmount())
    expectDetached(join(folder, 'image'))
  })

  test.for(['squashfs', 'erofs'] as const)(
    '%s cannot be written: attached read-only',
    async (name, { folder, place }) => {
      needsKernel(name)
      makeFilesystem(name, join(folder, name))
      await using mount = await mountImage(join(folder, name), place)
      expect(mount.fsType).toBe(name)
      expect(sysfs(numberOf(mount.source), 'ro')).toBe('1')
    },
  )

  test('a descriptor decides by its access', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    const fd = openSync(join(folder, 'image'), 'r')
    await using mount = await mountImage(fd, place)
    expect(mountsUnder(place)[0]?.options).toMatch(/^ro,/)
    await mount.unmount()
    closeSync(fd)
  })

  test('a window of a file, and a read-only mount of a writable device', async ({ folder, place, image }) => {
    const file = image('disk', 24 * MiB)
    makeFilesystem('ext4', join(folder, 'inner'))
    insert(file, join(folder, 'inner'), 4 * MiB)
    const options = { offset: 4 * MiB, sizeLimit: 16 * MiB, options: 'ro' }
    await using mount = await mountImage(file, place, options)
    expect(sysfs(numberOf(mount.source), 'loop/offset')).toBe(String(4 * MiB))
    expect(sysfs(numberOf(mount.source), 'ro')).toBe('0')
    expect(mountsUnder(place)[0]?.options).toMatch(/^ro,/)
  })

  test('arguments that are refused before any system call', async ({ folder }) => {
    const wrong: [unknown, unknown, unknown][] = [
      [join(folder, 'image'), null, { partition: 1, offset: 512 }],
      [join(folder, 'image'), null, { partition: 1, sizeLimit: 512 }],
      [join(folder, 'image'), null, { partition: 1, partscan: true }],
      [join(folder, 'image'), null, { autoclear: false }],
      [join(folder, 'image'), null, { what: 1 }],
      [join(folder, 'image'), 7, {}],
      [{}, null, {}],
    ]
    for (const [file, target, options] of wrong) {
      const call = () => mountImage(file as string, target as string, options as object)
      await expect(call(), JSON.stringify(options)).rejects.toMatchObject({ code: /^ERR_/ })
    }
    await failure('no-such-file', () => mountImage(join(folder, 'nothing')))
  })

  describe('an image with a partition table', () => {
    beforeEach(() => needs('sfdisk'))

    test('the one partition with a filesystem, or that which is named; with two it has to be', async ({
      folder,
      place,
      image,
    }) => {
      const file = image('disk', 32 * MiB)
      sfdisk(file, TABLE)
      makeFilesystem('ext2', join(folder, 'inner'))
      const none = await failure('unknown-filesystem', () => mountImage(file, place))
      expect(none.message).toContain('none in its partitions: 1 (first), 2 (second)')

      insert(file, join(folder, 'inner'), 32_768 * 512)
      {
        await using mount = await mountImage(file, place)
        const number = numberOf(mount.source)
        expect(sysfs(number, 'loop/offset')).toBe(String(32_768 * 512))
        expect(sysfs(number, 'loop/sizelimit')).toBe(String(16_384 * 512))
        writeFileSync(join(mount.path, 'which'), 'second')
      }
      insert(file, join(folder, 'inner'), 2048 * 512)
      const two = await failure('unknown-filesystem', () => mountImage(file, place))
      expect(two.message).toContain('in several partitions: 1 (ext2), 2 (ext2)')
      expect(two.hint).toBe('name the partition')
      for (const partition of [2, { label: 'second' }]) {
        await using mount = await mountImage(file, null, { partition })
        expect(readFileSync(join(mount.path, 'which'), 'utf8')).toBe('second')
      }
      const error = await failure('no-such-partition', () => mountImage(file, place, { partition: 3 }))
      expect(error).toMatchObject({ code: 'ENOENT', path: file })
      // At the very beginning one counts before those in the table.
      makeFilesystem('ext4', join(folder, 'whole'))
      const fd = openSync(file, 'r+')
      writeSync(fd, readFileSync(join(folder, 'whole')), 1024, 1024, 1024)
      closeSync(fd)
      const whole = await failure('filesystem-refused', () => mountImage(file, place))
      expect(whole.message).toContain('ext4')
    })

    test('a table for blocks of 4096 bytes', async ({ folder, image }) => {
      const file = image('disk', 16 * MiB)
      await sfdiskAt(4096, file, TWO_4096)
      execFileSync('mkfs.ext4', ['-q', '-F', '-b', '4096', join(folder, 'inner'), '1M'], { env, stdio: 'ignore' })
      insert(file, join(folder, 'inner'), 512 * 4096)
      await using mount = await mountImage(file, null, { blockSize: 'auto' })
      expect(sysfs(numberOf(mount.source), 'loop/offset')).toBe(String(512 * 4096))
      expect(sysfs(numberOf(mount.source), 'queue/logical_block_size')).toBe('4096')
    })

    test('what is left of a CD or a FAT does not count beside a table; a hybrid image is a CD', async ({
      folder,
      image,
    }) => {
      needs('xorriso')
      const file = image('disk', 32 * MiB)
      makeFilesystem('iso9660', join(folder, 'cd'))
      insert(file, join(folder, 'cd'), 0)
      sfdisk(file, TABLE, '--wipe=never')
      expect((await failure('unknown-filesystem', () => mountImage(file))).message).toContain('none in its partitions')
      // Here a partition holds the CD.
      insert(file, join(folder, 'cd'), 0)
      sfdisk(file, 'label: dos\nstart=1, size=60000, type=17\n', '--wipe=never')
      if (kernelHas('iso9660')) {
        await using mount = await mountImage(file)
        expect(mount.fsType).toBe('iso9660')
      } else {
        expect((await failure('filesystem-refused', () => mountImage(file))).message).toContain('no filesystem iso9660')
      }
    })
  })

  test(
    'given up at its k-th call, for every k, it leaves nothing',
    { timeout: limit(120_000) },
    async ({ folder, place }) => {
      makeFilesystem('ext4', join(folder, 'image'))
      const run = (signal: AbortSignal, target: string | null) =>
        mountImage(join(folder, 'image'), target, { signal, makeTarget: true })
      const reason = new Error('enough')
      for (const target of [join(place, 'made'), null]) {
        for (const inSequences of [false, true]) {
          let calls = 0
          observe(() => void calls++, { inSequences })
          await (await run(new AbortController().signal, target)).unmount()
          observe(undefined)
          if (target !== null) execFileSync('rmdir', [target])
          expect(calls).toBeGreaterThan(10)
          const descriptors = countDescriptors()
          let rejected = 0
          for (const k of eachCall(calls)) {
            const controller = new AbortController()
            let seen = 0
            observe(() => void (++seen === k && controller.abort(reason)), { inSequences })
            const mount = await run(controller.signal, target).catch((error: unknown) => {
              expect(error).toBe(reason)
              return undefined
            })
            observe(undefined)
            if (mount) {
              await mount.unmount()
              if (target !== null) execFileSync('rmdir', [target])
            } else rejected++
            await expect.poll(countDescriptors).toBe(descriptors)
            expect(readdirSync(place), `call ${k}`).toEqual([])
            expect(mountsUnder(folder), `call ${k}`).toEqual([])
            const attached = attachedNumbers().filter((n) => sysfs(n, 'loop/backing_file')?.startsWith(folder))
            expect(attached, `call ${k}`).toEqual([])
          }
          expect(rejected * STEP).toBeGreaterThan(5)
        }
      }
    },
  )

  test('another file under the name since it was looked at', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    cpSync(join(folder, 'image'), join(folder, 'other'))
    const link = join(folder, 'link')
    symlinkSync('image', link)
    observe((call) => {
      // It has been looked at, and is let go.
      if (call !== 'close') return
      observe(undefined)
      execFileSync('ln', ['-sfn', 'other', link])
    })
    const error = await failure('replaced', () => mountImage(link, place))
    expect(error.message).toContain('another file than that which was looked at')
    expect(mountsUnder(folder)).toEqual([])
  })
})

describe('createImage', () => {
  test('sparse, or with its blocks reserved; zeros; for its owner alone', async ({ folder }) => {
    const descriptors = countDescriptors()
    for (const [name, size, options] of [
      ['sparse', 64 * MiB, {}],
      ['allocated', 8 * MiB + 512, { allocate: true }],
      ['big', 1n << 40n, {}],
      ['empty', 0, { allocate: true }],
      ['odd', 12_345n, {}],
    ] as const) {
      const path = join(folder, name)
      await createImage(path, size, options)
      const stat = statSync(path)
      expect(stat.size, name).toBe(Number(size))
      expect(stat.mode & 0o777, name).toBe(0o600)
      if (name === 'allocated') expect(stat.blocks * 512).toBeGreaterThanOrEqual(size)
      else expect(stat.blocks * 512, name).toBeLessThan(64 * 1024)
    }
    expect(readFileSync(join(folder, 'allocated')).every((byte) => byte === 0)).toBe(true)
    expect(readdirSync(folder).toSorted()).toEqual(['allocated', 'big', 'empty', 'odd', 'sparse'])
    expect(countDescriptors()).toBe(descriptors)
  })

  test('nothing is replaced without being asked for; who has the old one keeps it', async ({ folder }) => {
    const path = join(folder, 'disk.img')
    writeFileSync(path, 'precious')
    const error = await failure('destination-exists', () => createImage(path, MiB))
    expect(error).toMatchObject({ code: 'EEXIST', path })
    expect(readFileSync(path, 'utf8')).toBe('precious')
    const fd = openSync(path, 'r')
    await createImage(path, MiB, { overwrite: true })
    expect(statSync(path).size).toBe(MiB)
    expect(readFileSync(fd, 'utf8')).toBe('precious')
    closeSync(fd)
    mkdirSync(join(folder, 'directory'))
    await failure('not-a-file-or-block-device', () => createImage(join(folder, 'directory'), 1, { overwrite: true }))
    symlinkSync('nowhere', join(folder, 'link'))
    await failure('destination-exists', () => createImage(join(folder, 'link'), 1))
    expect(readdirSync(folder).toSorted()).toEqual(['directory', 'disk.img', 'link'])
  })

  test('no room: told now, and nothing is left', async ({ folder, place }) => {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', place])
    try {
      await failure('no-space', () => createImage(join(place, 'disk.img'), 64 * MiB, { allocate: true }))
      expect(readdirSync(place)).toEqual([])
      expect(statfsSync(place).bfree).toBe(statfsSync(place).blocks)
      // Without that it is only found out by who writes.
      await createImage(join(place, 'disk.img'), 64 * MiB)
    } finally {
      execFileSync('umount', [place])
    }
    expect(folder).toBeTruthy()
  })

  test('folders that are missing, arguments that are wrong, and an abort', async ({ folder }) => {
    await failure('no-such-file', () => createImage(join(folder, 'nothing', 'disk.img'), 1))
    const reason = new Error('enough')
    await expect(
      createImage(join(folder, 'a'), 1 << 30, { allocate: true, signal: AbortSignal.abort(reason) }),
    ).rejects.toBe(reason)
    for (const [path, size, options] of [
      ['', 1, {}],
      ['a\0', 1, {}],
      [7, 1, {}],
      [join(folder, 'a'), -1, {}],
      [join(folder, 'a'), 1.5, {}],
      [join(folder, 'a'), '1', {}],
      [join(folder, 'a'), 1, { allocate: 1 }],
      [join(folder, 'a'), 1, { mode: 1 }],
    ] as [string, number, object][]) {
      await expect(createImage(path, size, options)).rejects.toMatchObject({ code: /^ERR_/ })
    }
    expect(readdirSync(folder)).toEqual([])
  })

  test('where files have no links', async ({ folder, place }) => {
    needsKernel('vfat')
    makeFilesystem('vfat', join(folder, 'image'))
    await using mount = await mountImage(join(folder, 'image'), place)
    await createImage(join(mount.path, 'disk.img'), MiB)
    await failure('destination-exists', () => createImage(join(mount.path, 'disk.img'), MiB))
    expect(readdirSync(mount.path)).toEqual(['disk.img'])
  })
})

describe('withDevice', () => {
  test('attached while it runs, detached after it; what it answers', async ({ image }) => {
    let device: LoopDevice | undefined
    const file = image('disk')
    const answer = await withDevice(file, async (given) => {
      device = given
      return (await given.status()).attached
    })
    expect(answer).toBe(true)
    expect(device?.fd).toBe(-1)
    expectDetached(file)
    expect(await withDevice(image('ro'), { readOnly: true }, ({ fd }) => fd >= 0)).toBe(true)
    expect(await withDevice(image('none'), undefined, () => 7)).toBe(7)
  })

  test('what it throws wins; what keeps the device is told', async ({ image }) => {
    const error = new Error('of use')
    const file = image('disk')
    const failing = withDevice(file, () => {
      throw error
    })
    await expect(failing).rejects.toBe(error)
    expectDetached(file)

    let held = -1
    const inUse = await failure('in-use', () =>
      withDevice(file, (device) => {
        held = openSync(device.path, 'r')
      }),
    )
    expect(inUse.holders).toMatchObject([{ kind: 'process', pid: process.pid, descriptors: [held] }])
    closeSync(held)
    expectDetached(file)
  })

  test('detached, released or closed by itself; borrowed', async ({ image }) => {
    const file = image('disk')
    await withDevice(file, async (device) => void (await device.detach()))
    await using owner = await attach(file)
    await withDevice(file, { overlap: 'reuse' }, (device) => {
      expect([device.owned, device.number]).toEqual([false, owner.number])
    })
    expect((await owner.status()).attached).toBe(true)
    await expect(withDevice(file, {}, 7 as never)).rejects.toBeInstanceOf(TypeError)
    await expect(withDevice(file, 7 as never)).rejects.toBeInstanceOf(TypeError)
  })
})
