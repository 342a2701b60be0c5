/** Loop devices that are attached to another block device. */

import { type Bound, GivenUp } from '../kernel/bounded.ts'
import { O_RDONLY } from '../kernel/files.ts'
import { lookForNodes } from '../kernel/nodes-at.ts'
import { Sequence } from '../kernel/sequence.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { readBackingFiles } from '../kernel/sysfs-batch.ts'
import { decodeInfo, formatDevice, newInfo } from '../kernel/uapi.ts'

/** A loop device and the block device that it is attached to, as `major:minor`. */
export interface Stacked {
  number: number
  device: string
}

/** Milliseconds: a device can have a file on a server that does not answer. */
const LOOK_MS = 1_000

/**
 * The loop devices that are attached to one of these, which are given as `major:minor` and path. holders/ in sysfs does not
 * show them, and O_EXCL does not see them: only the numbers of their backing file tell, which LOOP_GET_STATUS64 has. Of a
 * device that cannot be asked the node at its path tells, or where that is missing here, its name.
 *
 * @throws GivenUp
 */
export async function findStacked(
  devices: ReadonlyMap<string, string>,
  but: number,
  bound: Bound | undefined,
): Promise<Stacked[]> {
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') return []
  const others = numbers.filter((number) => number !== but)
  const paths = new Map([...(await readBackingFiles(others, bound))].map(([number, path]) => [number, path ?? '']))
  const { nodes, undecided } = await lookForNodes([...paths], bound)
  const asked = await readBackingNumbers(undecided, bound)
  const byName = new Map([...devices].map(([device, path]) => [path, device]))
  return undecided.flatMap((number) => {
    const rdevice = asked.get(number) ?? nodes.get(number)
    const device = rdevice === undefined ? byName.get(paths.get(number) ?? '') : formatDevice(rdevice)
    return device !== undefined && devices.has(device) ? [{ number, device }] : []
  })
}

/** The numbers of the block devices that these are attached to, 0 for a file; devices that do not answer are left out. */
async function readBackingNumbers(numbers: readonly number[], bound: Bound | undefined): Promise<Map<number, bigint>> {
  const sequence = new Sequence()
  const asked = numbers.map((number) => {
    sequence.part()
    const info = newInfo()
    const fd = sequence.call('openLoop', number, O_RDONLY)
    const step = sequence.try('loopGetStatus64', fd, info)
    sequence.call('close', fd)
    return { number, info, step }
  })
  try {
    await sequence.run({ left: Math.min(LOOK_MS, bound?.left ?? LOOK_MS), signal: bound?.signal })
  } catch (error) {
    if (!(error instanceof GivenUp) || error.isAborted) throw error
  }
  const answered = asked.filter(({ step }) => step.answer === 0)
  return new Map(answered.map(({ number, info }) => [number, decodeInfo(info).rdevice]))
}
