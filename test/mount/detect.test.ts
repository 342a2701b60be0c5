/** Filesystems are known by their superblocks, as blkid knows them. */

import { execFileSync } from 'node:child_process'
import { closeSync, openSync, readFileSync, readSync, writeFileSync, writeSync } from 'node:fs'
import { describe, expect } from 'vitest'
import { detect, faultOf } from '../../lib/mount/detect.ts'
import { PROBE_BYTES, SIGNATURES } from '../../lib/mount/superblocks.ts'
import { env, needs } from '../needs.ts'
import { MAKERS, type Made, makeFilesystem, test } from './support.ts'

function beginningOf(image: string): Buffer {
  const bytes = Buffer.alloc(PROBE_BYTES)
  const fd = openSync(image, 'r')
  const count = readSync(fd, bytes, 0, bytes.length, 0)
  closeSync(fd)
  return bytes.subarray(0, count)
}

function found(image: string): string[] {
  return detect(beginningOf(image)).found.map(({ title }) => title)
}

/** What blkid says: it reads the same superblocks. */
function blkid(image: string): string {
  return execFileSync('blkid', ['--probe', '--output', 'value', '--match-tag', 'TYPE', image], {
    env,
    encoding: 'utf8',
  }).trim()
}

const TITLES: Partial<Record<string, string>> = { swap: 'swap space', crypto_LUKS: 'a LUKS container' }

describe('what a tool has made is known', () => {
  test.for(Object.keys(MAKERS) as Made[])('%s', (name, { folder }) => {
    needs('blkid')
    const image = `${folder}/${name}.img`
    makeFilesystem(name, image)
    const theirs = blkid(image)
    expect(theirs).not.toBe('')
    expect(found(image)).toEqual([TITLES[theirs] ?? theirs])
  })

  test('a physical volume of LVM, which wants a block device to be made', ({ image }) => {
    // lib/label/label.h of LVM2: the label is in the second sector, "LABELONE", its number, checksum, offset, type
    const file = image('lvm')
    const label = Buffer.alloc(512)
    label.write('LABELONE', 0, 'latin1')
    label.writeBigUInt64LE(1n, 8)
    label.write('LVM2 001', 24, 'latin1')
    const fd = openSync(file, 'r+')
    writeSync(fd, label, 0, 512, 512)
    closeSync(fd)
    expect(found(file)).toEqual(['a physical volume of LVM'])
  })
})

describe('what is nothing', () => {
  test('zeros, an empty file, a short one, and text', ({ image, folder }) => {
    expect(found(image('zeros'))).toEqual([])
    for (const text of ['', 'x', 'XFS', 'LUKS', 'x'.repeat(1500)]) {
      writeFileSync(`${folder}/short`, text)
      expect(found(`${folder}/short`), text.slice(0, 8)).toEqual([])
    }
  })

  const cut = ['ext4', 'vfat', 'btrfs', 'iso9660'] as const
  test.for(cut)('the beginning of %s, cut at any place, throws nothing', (name, { folder }) => {
    makeFilesystem(name, `${folder}/${name}`)
    const beginning = beginningOf(`${folder}/${name}`)
    for (let length = 0; length < beginning.length; length += 61) {
      const part = beginning.subarray(0, length)
      expect(() => [detect(part), faultOf('ext4', part), faultOf('xfs', part), faultOf('btrfs', part)]).not.toThrow()
    }
  })
})

describe('several', () => {
  test('two that are sure are both told', ({ folder }) => {
    makeFilesystem('btrfs', `${folder}/b`)
    const fd = openSync(`${folder}/b`, 'r+')
    writeSync(fd, Buffer.from('XFSB'), 0, 4, 0)
    closeSync(fd)
    expect(found(`${folder}/b`)).toEqual(['xfs', 'btrfs'])
  })

  test('one that is sure hides those that are not', ({ folder }) => {
    makeFilesystem('ext4', `${folder}/e`)
    const fd = openSync(`${folder}/e`, 'r+')
    writeSync(fd, Buffer.from('CD001'), 0, 5, 0x8001)
    closeSync(fd)
    expect(found(`${folder}/e`)).toEqual(['ext4'])
  })
})

describe('what is wrong with a superblock', () => {
  for (const [name, at] of [
    ['ext4', 1024 + 0x78],
    ['xfs', 108],
    ['btrfs', 0x1_0000 + 0x12b],
  ] as const) {
    test(`${name}: nothing, as mkfs makes it; and its checksum, where its label was changed`, ({ folder }) => {
      const image = `${folder}/${name}`
      makeFilesystem(name, image)
      const beginning = beginningOf(image)
      expect(faultOf(name, beginning)).toBe(undefined)
      beginning.write('other', at)
      expect(faultOf(name, beginning)).toMatch(/^the checksum of its superblock is 0x[0-9a-f]{8}, should be 0x/)
    })
  }

  test('it is not there, or that of another', ({ folder, image }) => {
    expect(faultOf('ext4', beginningOf(image('zeros')))).toBe('there is no superblock of ext4')
    makeFilesystem('ext2', `${folder}/e`)
    expect(faultOf('xfs', beginningOf(`${folder}/e`))).toBe('there is no superblock of xfs, but that of ext2')
    // What is not in the table cannot be judged.
    expect(faultOf('minix', beginningOf(`${folder}/e`))).toBe(undefined)
  })
})

test('every row has a place and a magic, and what is not mounted says what to do', () => {
  for (const { fsType, places, magic, hint, title } of SIGNATURES) {
    expect(places.length, title).toBeGreaterThan(0)
    expect(magic.length, title).toBeGreaterThan(1)
    expect(Math.max(...places) + magic.length, title).toBeLessThanOrEqual(PROBE_BYTES)
    expect(fsType === null, title).toBe(hint !== undefined)
  }
  expect(readFileSync(new URL('../../lib/mount/superblocks.ts', import.meta.url), 'utf8')).toContain('include/uapi')
})
