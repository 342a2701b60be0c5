/** `loopctl partitions`: of an attached device, or of a file. */

import { readPartitionTable } from '../attach/window.ts'
import { checkDeadline, LOOKING, type Wait } from '../common/deadline.ts'
import { open } from '../device.ts'
import { explained } from '../errors/given-up.ts'
import { numberOfNode } from '../kernel/devnode.ts'
import type { TablePartition } from '../partitions/disk.ts'
import type { Partition } from '../partitions/partitions.ts'
import { closing } from './closing.ts'
import { fileArgument, UsageError } from './parse.ts'
import { boundOf, type Common, interruptible, isForPeople, print, printJson, printWarnings } from './terminal.ts'
import { humanOffset, printable, shellWord, table } from './text.ts'

export async function partitionsAction(
  named: number | string,
  { json, timeout, rescan, bytes }: Common & { rescan?: true; bytes?: true },
): Promise<void> {
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    const what = typeof named === 'number' ? named : await deviceOrFile(named, left)
    if (typeof what === 'string' && rescan) {
      throw new UsageError(
        '--rescan is for a device, not for a file',
        `loopctl list ${shellWord(what)} shows its devices`,
      )
    }
    if (typeof what === 'string') {
      const found = await readPartitionTable(fileArgument(what), left())
      printWarnings(found.warnings, json)
      if (json) return printJson(found)
      return printPartitions('NUMBER', found.partitions, bytes)
    }
    const device = await open(what, left())
    const partitions = await closing(device, json, () =>
      rescan ? device.rescanPartitions(left()) : device.partitions(left()),
    )
    if (json) return printJson(partitions)
    return printPartitions('DEVICE', partitions, bytes)
  })
}

/** A link to a device is that device; every other path is a file. */
async function deviceOrFile(path: string, left: () => Wait): Promise<number | string> {
  const { bound } = checkDeadline(left(), LOOKING)
  const found = await explained(() => numberOfNode(path, bound), path)
  return typeof found === 'number' ? found : path
}

async function printPartitions(
  title: string,
  partitions: readonly (Partition | TablePartition)[],
  bytes: true | undefined,
): Promise<void> {
  if (partitions.length === 0) return
  const show = isForPeople(bytes) ? humanOffset : String
  const rows = partitions.map((partition) => {
    const { number, start, size, type, typeName, label, bootable } = partition
    const name = 'path' in partition ? partition.path : String(number)
    return [name, show(start), show(size), typeName ?? type ?? '-', label ?? '-', bootable ? 'bootable' : '-']
  })
  const headings = [title, 'START', 'SIZE', 'TYPE', 'LABEL', 'FLAGS'].map((name) => ({
    title: name,
    right: ['NUMBER', 'START', 'SIZE'].includes(name),
  }))
  await print(
    table(
      headings,
      rows.map((cells) => cells.map(printable)),
    ),
  )
}
