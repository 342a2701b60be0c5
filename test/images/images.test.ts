/** Each image as the kernel shows it, as we do, and as its table reads; and the warnings. */

import { truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import {
  attach,
  type LoopDevice,
  type Partition,
  readPartitionTable,
  type TablePartition,
  type Warning,
  type WarningCode,
} from '../../lib/index.ts'
import { expectNoPartitions, knownPartitions, sfdisk } from '../kernel/partitioned.ts'
import { test } from '../kernel/support.ts'
import { needs } from '../needs.ts'
import { IMAGES } from './images.ts'

/** `number start+size`, in sectors. */
function shown(partitions: readonly Pick<Partition | TablePartition, 'number' | 'start' | 'size'>[]): string[] {
  return partitions.map(({ number, start, size }) => `${number} ${start / 512}+${size / 512}`)
}

/** The same, of the kernel. */
function known({ number }: LoopDevice): string[] {
  return Object.entries(knownPartitions(number))
    .map(([name, { start, size }]) => ({ number: Number(/\d+$/.exec(name)?.[0]), start, size }))
    .toSorted((a, b) => a.number - b.number)
    .map((partition) => shown([partition])[0] ?? '')
}

function expectWarnings(warnings: readonly Warning[], expected: readonly [WarningCode, RegExp][]): void {
  expect(warnings.map(({ code }) => code)).toEqual(expected.map(([code]) => code))
  for (const [index, [, message]] of expected.entries()) expect(warnings[index]?.message).toMatch(message)
}

/** Whether the kernel that the tests run on has parsers for both types of table. */
async function hasParsers(folder: string): Promise<boolean> {
  const found: boolean[] = []
  for (const label of ['gpt', 'dos']) {
    const file = join(folder, label)
    writeFileSync(file, '')
    truncateSync(file, 8 << 20)
    sfdisk(file, `label: ${label}\nstart=2048, size=2048\n`)
    await using device = await attach(file, { partscan: 'kernel' })
    found.push(known(device).length === 1)
    await device.detach()
  }
  return found.every(Boolean)
}

describe('images', () => {
  for (const image of IMAGES) {
    const { name, programs: needed, make, options, user, table, warnings, userWarnings = [] } = image
    test(name, async ({ folder }) => {
      needs('sfdisk', ...needed)
      const file = join(folder, 'image')
      await make(file, folder)
      const kernel = typeof image.kernel === 'function' ? image.kernel(file) : image.kernel
      const ofTable = warnings.filter(([code]) => code !== 'tail-cut')
      const hasTable = (table ?? kernel).length > 0
      if (hasTable) {
        const read = await readPartitionTable(file)
        expect(shown(read.partitions)).toEqual(table ?? kernel)
        expectWarnings(read.warnings, ofTable)
      } else await expect(readPartitionTable(file)).rejects.toMatchObject({ reason: 'bad-partition-table' })

      const parsers = await hasParsers(folder)
      const ours = user ?? kernel
      for (const partscan of ['user', true, 'kernel'] as const) {
        await using device = await attach(file, { ...options, partscan })
        const byKernel = partscan !== 'user' && parsers && kernel.length > 0
        const nothing = partscan === 'kernel' && !byKernel
        const expected = nothing ? [] : byKernel ? kernel : ours
        expect(known(device), `partscan: ${partscan}`).toEqual(expected)
        expect(shown(await device.partitions()), `partscan: ${partscan}`).toEqual(expected)
        // Said of a kernel without parsers, see below
        const said = device.warnings.filter(({ code }) => code !== 'no-parser')
        const ofUser = userWarnings.filter(([code]) => code === 'table-block-size' || (!byKernel && !nothing))
        expectWarnings(said, [...warnings, ...ofUser])
        const isPlain = kernel.length > 0 && !parsers && partscan !== 'user'
        expect(
          device.warnings.some(({ code }) => code === 'no-parser'),
          `partscan: ${partscan}`,
        ).toBe(isPlain)
        await device.detach()
        expectNoPartitions(device.number)
      }
    })
  }
})
