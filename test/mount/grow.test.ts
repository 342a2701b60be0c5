/** device.grow(): the file, the window, the device, the last partition; nothing is ever made smaller. */

import { execFileSync } from 'node:child_process'
import { readFileSync, renameSync, statfsSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect } from 'vitest'
import { attach, find, open } from '../../lib/index.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import { findTable } from '../../lib/partitions/table.ts'
import { env, needs, needsKernel } from '../needs.ts'
import { sfdisk, sfdiskAt, sgdisk, told, TWO, TWO_4096 } from '../kernel/partitioned.ts'
import { failure, losetup, sysfs, test } from '../kernel/support.ts'
import { test as mounting } from './support.ts'

const MiB = 1 << 20

afterEach(() => observe(undefined))

/** What the kernel shows. */
function sizeOf(number: number): number {
  return Number(sysfs(number, 'size')) * 512
}

/** What sgdisk says of the table. */
function check(path: string): string {
  return execFileSync('sgdisk', ['--verify', path], { env, encoding: 'utf8' })
}

describe('the device', () => {
  test('its file grows with it, sparse; the old bytes stay', async ({ image }) => {
    const file = image('disk', MiB, 7)
    await using device = await attach(file)
    expect(await device.grow(8 * MiB)).toBe(8 * MiB)
    expect(sizeOf(device.number)).toBe(8 * MiB)
    expect(statSync(file)).toMatchObject({ size: 8 * MiB })
    expect(statSync(file).blocks * 512).toBeLessThan(2 * MiB)
    const bytes = readFileSync(file)
    expect(bytes.subarray(0, MiB).every((byte) => byte === 7)).toBe(true)
    expect(bytes.subarray(MiB).every((byte) => byte === 0)).toBe(true)
    expect(await device.grow(8n * BigInt(MiB))).toBe(8 * MiB)
  })

  test('with offset and limit: the window, and of the file what that needs', async ({ image }) => {
    const file = image('disk', 4 * MiB)
    await using device = await attach(file, { offset: MiB, sizeLimit: MiB })
    expect(await device.grow(2 * MiB)).toBe(2 * MiB)
    expect(statSync(file).size).toBe(4 * MiB)
    expect(losetup(device.path)).toMatchObject({ offset: MiB, sizelimit: 2 * MiB })
    expect(await device.grow(6 * MiB)).toBe(6 * MiB)
    expect(statSync(file).size).toBe(7 * MiB)
    expect((await device.status()).autoclear).toBe(true)
  })

  test('a handle that was opened, as the command does', async ({ image }) => {
    const file = image('disk', MiB)
    await using device = await attach(file)
    const other = await open(device.number)
    expect(await other.grow(2 * MiB)).toBe(2 * MiB)
    await other.close()
    const command = new URL('../../dist/cli/main.js', import.meta.url).pathname
    const run = (...words: string[]) =>
      execFileSync(process.execPath, [command, 'resize', device.path, ...words], { encoding: 'utf8', stdio: 'pipe' })
    expect(run('3M')).toBe(`${3 * MiB}\n`)
    expect(JSON.parse(run('4M', '--json'))).toEqual({ number: device.number, path: device.path, size: 4 * MiB })
    expect(run()).toBe(`${4 * MiB}\n`)
    expect(() => run('1M')).toThrow('nothing is made smaller')
    expect(statSync(file).size).toBe(4 * MiB)
  })

  test('what is refused, and left as it was', async ({ folder, image }) => {
    const file = image('disk', 4 * MiB)
    {
      await using device = await attach(file)
      const smaller = await failure('size-mismatch', () => device.grow(MiB))
      expect(smaller.message).toContain('nothing is made smaller')
      for (const size of [-512, 1.5, '1', 1000, Number.MAX_SAFE_INTEGER + 1]) {
        await expect(device.grow(size as number)).rejects.toMatchObject({ code: /^ERR_/ })
      }
      await expect(device.grow(8 * MiB, { partition: 1 as never })).rejects.toBeInstanceOf(TypeError)

      // Another file has its name now.
      renameSync(file, join(folder, 'moved'))
      expect(await device.grow(5 * MiB)).toBe(5 * MiB)
      renameSync(join(folder, 'moved'), join(folder, 'again'))
      writeFileSync(join(folder, 'again.other'), '')
      await using stacked = await attach(device.path)
      expect((await failure('size-mismatch', () => stacked.grow(8 * MiB))).message).toContain('a block device')
      await stacked.detach()
      await using shared = await attach(join(folder, 'again'), { overlap: 'reuse' })
      expect(shared.owned).toBe(false)
      await failure('in-use', () => shared.grow(8 * MiB))
      expect(sizeOf(device.number)).toBe(5 * MiB)
    }
    await using readOnly = await attach(join(folder, 'again'), { readOnly: true })
    await failure('backing-not-writable', () => readOnly.grow(8 * MiB))
    expect(statSync(join(folder, 'again')).size).toBe(5 * MiB)
    expect(await find(join(folder, 'again'))).toHaveLength(1)
  })

  test('over the bytes of another attachment: overlap', async ({ image }) => {
    const file = image('disk', 4 * MiB)
    await using first = await attach(file, { sizeLimit: MiB })
    await using second = await attach(file, { offset: 2 * MiB, sizeLimit: MiB })
    expect(await first.grow(2 * MiB)).toBe(2 * MiB)
    const error = await failure('overlap', () => first.grow(3 * MiB))
    expect(error.message).toContain(second.path)
    expect(sizeOf(first.number)).toBe(2 * MiB)
    expect(statSync(file).size).toBe(4 * MiB)
    expect(await second.grow(8 * MiB)).toBe(8 * MiB)
  })

  mounting('no room for it: told, and the device is as it was', async ({ place }) => {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', place])
    try {
      execFileSync('dd', ['if=/dev/zero', `of=${place}/disk`, 'bs=1M', 'count=4', 'status=none'])
      await using device = await attach(join(place, 'disk'))
      await failure('no-space', () => device.grow(8 * MiB))
      expect([sizeOf(device.number), statSync(join(place, 'disk')).size]).toEqual([4 * MiB, 4 * MiB])
    } finally {
      execFileSync('umount', [place])
    }
  })
})

describe('with the last partition', () => {
  beforeEach(() => needs('sfdisk', 'sgdisk'))

  mounting('of a GPT, mounted, and the filesystem after it', async ({ image, place }) => {
    needsKernel('xfs')
    needs('mkfs.xfs', 'xfs_growfs')
    const file = image('disk', 336 * MiB)
    // resize2fs would want CAP_SYS_RESOURCE, which containers do not have.
    sfdisk(file, 'label: gpt\nstart=2048, size=2048, name=first\nstart=4096, size=655360, name=second\n')
    await using device = await attach(file, { partscan: 'user' })
    execFileSync('mkfs.xfs', ['-q', `${device.path}p2`], { env })
    const before = told(file)
    await using mount = await device.mount(place, { partition: 2 })
    writeFileSync(join(place, 'x'), 'x')
    const blocks = statfsSync(place).blocks
    expect(await device.grow(768 * MiB, { partition: 'last' })).toBe(768 * MiB)

    const after = told(file)
    expect(after.partitions[0]).toEqual(before.partitions[0])
    const { size = 0, ...same } = before.partitions[1] ?? {}
    expect(after.partitions[1]).toMatchObject(same)
    const grown = after.partitions[1]?.size ?? 0
    expect(grown).toBeGreaterThan(size)
    // To the last usable block, in whole pages
    expect(4096 * 512 + grown).toBe(Math.floor((768 * MiB - 33 * 512) / 4096) * 4096)
    expect(Number(sysfs(device.number, `loop${device.number}p2/size`)) * 512).toBe(grown)
    expect(check(file)).toContain('No problems found')
    execFileSync('xfs_growfs', [place], { env, stdio: 'pipe' })
    expect(statfsSync(place).blocks).toBeGreaterThan(blocks * 2)
    expect(readFileSync(join(place, 'x'), 'utf8')).toBe('x')
    // Once more, to where it is already
    expect(await device.grow(768 * MiB, { partition: 'last' })).toBe(768 * MiB)
    expect(told(file)).toEqual(after)
    await mount.unmount()
  })

  test('of an MBR, and of a GPT for blocks of 4096 bytes', async ({ image }) => {
    const mbr = image('mbr', 16 * MiB)
    sfdisk(mbr, 'label: dos\nstart=2048, size=2048, type=83\nstart=8192, size=2048, type=83\n')
    {
      await using device = await attach(mbr)
      await device.grow(32 * MiB, { partition: 'last' })
    }
    expect(told(mbr).partitions.map(({ start, size }) => start + size)).toEqual([2 * MiB, 32 * MiB])

    const file = image('gpt', 16 * MiB)
    await sfdiskAt(4096, file, TWO_4096)
    await using device = await attach(file, { blockSize: 4096, partscan: 'user' })
    await device.grow(32 * MiB, { partition: 'last' })
    const [first, second] = await device.partitions()
    expect(first?.size).toBe(MiB)
    // Header and entries are in five blocks at the end.
    expect((second?.start ?? 0) + (second?.size ?? 0)).toBe(32 * MiB - 5 * 4096)
    expect(check(device.path)).toContain('No problems found')
  })

  test('the highest start counts, not the number; more entries than usual', async ({ image }) => {
    const file = image('disk', 16 * MiB)
    sgdisk(file, '--clear', '--resize-table=256', '--new=1:8192:10239', '--new=2:4096:6143')
    await using device = await attach(file)
    await device.grow(32 * MiB, { partition: 'last' })
    const { partitions } = told(file)
    expect(partitions.find(({ number }) => number === 2)?.size).toBe(MiB)
    expect(partitions.find(({ number }) => number === 1)?.size).toBeGreaterThan(20 * MiB)
    expect(check(file)).toContain('No problems found')
  })

  test('logical, damaged, empty or no table: refused', async ({ image }) => {
    const cases: [string, (file: string) => void, string][] = [
      ['none', () => {}, 'no partition table'],
      ['empty', (file) => sfdisk(file, 'label: gpt\n'), 'no partition'],
      [
        'logical',
        (file) => sfdisk(file, 'label: dos\nstart=2048, size=8192, type=5\nstart=4096, size=2048, type=83\n'),
        'a logical one',
      ],
      [
        'damaged',
        (file) => {
          sfdisk(file, TWO)
          execFileSync('dd', [
            'if=/dev/zero',
            `of=${file}`,
            'bs=512',
            'seek=1',
            'count=1',
            'conv=notrunc',
            'status=none',
          ])
        },
        'the primary GPT is damaged',
      ],
    ]
    for (const [name, make, text] of cases) {
      const file = image(name, 16 * MiB)
      make(file)
      const table = readFileSync(file).subarray(0, 64 * 512)
      await using device = await attach(file)
      const error = await failure('bad-partition-table', () => device.grow(16 * MiB, { partition: 'last' }))
      expect(error.message, name).toContain(text)
      expect(
        readFileSync(file)
          .subarray(0, 64 * 512)
          .equals(table),
        name,
      ).toBe(true)
    }
  })

  test('a device that is grown already: the table follows; a backup that is not at the end is mended', async ({
    image,
  }) => {
    const file = image('disk', 16 * MiB)
    sfdisk(file, TWO)
    execFileSync('truncate', ['--size', '32M', file])
    await using device = await attach(file)
    expect(await device.grow(32 * MiB, { partition: 'last' })).toBe(32 * MiB)
    expect(check(file)).toContain('No problems found')
  })

  test('killed between any two of its writes, the table is whole', async ({ folder, image }) => {
    const file = image('disk', 16 * MiB)
    sfdisk(file, TWO)
    await using device = await attach(file)
    const states: Buffer[] = []
    // What the medium would have at each of these moments
    observe((call) => {
      if (call === 'pwrite' || call === 'fsync') states.push(readFileSync(file))
    })
    await device.grow(24 * MiB, { partition: 'last' })
    observe(undefined)
    await device.flush()
    states.push(readFileSync(file))
    expect(states.length).toBeGreaterThan(5)
    const sizes = new Set<number>()
    for (const state of states) {
      const read = (position: bigint, length: number) =>
        Promise.resolve(state.subarray(Number(position), Number(position) + length))
      const table = await findTable(read, BigInt(state.length), 512)
      expect(table?.partitions.map(({ number }) => number)).toEqual([1, 2])
      expect(table?.partitions[0]).toMatchObject({ start: BigInt(MiB), size: BigInt(MiB) })
      sizes.add(Number(table?.partitions[1]?.size ?? -1))
    }
    // The old one and the new one, and no other
    expect(sizes.size).toBe(2)
    expect(folder).toBeTruthy()
  })
})
