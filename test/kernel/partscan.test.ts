/** partscan: true, by the kernel's parsers or, where it has none, by BLKPG; and with udev, which can make it scan again (K4). */

import { execFileSync } from 'node:child_process'
import { closeSync, existsSync, openSync, readdirSync, readSync, writeSync } from 'node:fs'
import { beforeEach, describe, expect } from 'vitest'
import { attach } from '../../lib/index.ts'
import { needs } from '../needs.ts'
import { times } from '../scale.ts'
import { hasUdev, settleUdev, sysfs, test } from './support.ts'

const MiB = 1 << 20
const ROUNDS = Math.max(3, times(20))
beforeEach(() => needs('sfdisk'))

/** In MiB. */
const PLACES = [
  { number: 1, start: 1, size: 2 },
  { number: 2, start: 4, size: 1 },
  { number: 3, start: 6, size: 1 },
]

function writeTable(path: string, kind: string, places = PLACES): void {
  const lines = places.map(({ number, start, size }) => `${number}: start=${start}MiB, size=${size}MiB`)
  const input = [`label: ${kind === 'gpt' ? 'gpt' : 'dos'}`, ...lines, ''].join('\n')
  execFileSync('sfdisk', ['--quiet', '--no-reread', '--no-tell-kernel', path], { input })
}

/** With a table, and at the beginning of each partition its number. */
function partitioned(file: string, kind: string): string {
  writeTable(file, kind)
  const fd = openSync(file, 'r+')
  for (const { number, start } of PLACES) writeSync(fd, `partition ${number}`, start * MiB)
  closeSync(fd)
  return file
}

/** What the node of each partition shows at its beginning, opened here and now. */
function readAll(path: string): string[] {
  return PLACES.map(({ number }) => {
    const bytes = Buffer.alloc(11)
    const fd = openSync(`${path}p${number}`, 'r')
    readSync(fd, bytes)
    closeSync(fd)
    return bytes.toString()
  })
}

/** The partitions in sysfs: number, beginning and length in MiB. */
function partitionsOf(device: number): typeof PLACES {
  const numbers = readdirSync(`/sys/block/loop${device}`).flatMap((name) =>
    name.startsWith(`loop${device}p`) ? Number(name.split('p').at(-1)) : [],
  )
  return numbers
    .toSorted((a, b) => a - b)
    .map((number) => {
      const inMiB = (what: string) => (Number(sysfs(device, `loop${device}p${number}/${what}`)) * 512) / MiB
      return { number, start: inMiB('start'), size: inMiB('size') }
    })
}

for (const kind of ['gpt', 'mbr']) {
  describe(`partscan: true, ${kind.toUpperCase()}, ${hasUdev ? 'with' : 'without'} udev`, () => {
    test(`${ROUNDS} rounds: the nodes can be used when attach resolves, and stay`, async ({ image }) => {
      const file = partitioned(image('disk', 8 * MiB), kind)
      const contents = PLACES.map(({ number }) => `partition ${number}`)
      for (let round = 1; round <= ROUNDS; round++) {
        const device = await attach(file, { partscan: true })
        const { number, path } = device
        expect(readAll(path), `round ${round}`).toEqual(contents)
        expect(partitionsOf(number), `round ${round}`).toEqual(PLACES)
        expect(
          (await device.partitions()).map((one) => [one.number, one.table, one.start / MiB, one.size / MiB]),
          `round ${round}`,
        ).toEqual(PLACES.map((place) => [place.number, kind, place.start, place.size]))
        settleUdev()
        expect(readAll(path), `round ${round}, later`).toEqual(contents)
        expect(await device.detach(), `round ${round}`).toBe('detached')
        expect(partitionsOf(number), `round ${round}, detached`).toEqual([])
        expect(existsSync(`${path}p1`), `round ${round}, detached`).toBe(false)
      }
      expect(readdirSync('/dev').filter((name) => name.startsWith('.loopctl'))).toEqual([])
    })

    test('rescanPartitions: what was written through the device is found', async ({ image }) => {
      await using device = await attach(partitioned(image('disk', 8 * MiB), kind), { partscan: true })
      const other = [
        { number: 1, start: 1, size: 1 },
        { number: 2, start: 3, size: 2 },
      ]
      writeTable(device.path, kind, other)
      expect((await device.rescanPartitions()).map(({ number }) => number)).toEqual([1, 2])
      expect(partitionsOf(device.number)).toEqual(other)
      closeSync(openSync(`${device.path}p2`, 'r'))
    })
  })
}
