/** Loop devices that are backed by other loop devices: told by numbers, since a path can be that of another namespace. */

import { type Answers, askDevices } from '../handle/ask.ts'
import { inBatches } from '../kernel/batches.ts'
import { GivenUp } from '../kernel/bounded.ts'
import { numberOfMinor } from '../kernel/features.ts'
import { FileStat } from '../kernel/files.ts'
import { Sequence } from '../kernel/sequence.ts'
import { readPlaceOnDisk } from '../kernel/sysfs.ts'
import { decodeStat, encodePath, formatDevice, LOOP_MAJOR, majorOf, minorOf, newStat } from '../kernel/uapi.ts'

interface Looked {
  number: number
  backingFile: string | null
  backingDeleted: boolean
  lower?: number
}

/** Milliseconds for looking at the paths: that of a device can be on a server that does not answer. */
const LOOK_MS = 250

/**
 * Adds `lower` where it is missing. Only devices whose backing file looks like a block device are opened, for
 * LOOP_GET_STATUS64; of those that may not be opened the node at the path tells.
 */
export async function addLower<Info extends Looked>(infos: readonly Info[]): Promise<Info[]> {
  const paths = infos.flatMap(({ number, backingFile, backingDeleted }) =>
    backingFile === null || backingDeleted ? [] : [[number, backingFile] as const],
  )
  const nodes = new Map((await inBatches(paths, findNodes)).flat())
  const suspects = paths.flatMap(([number, path]) => (path.startsWith('/dev/') || nodes.has(number) ? number : []))
  if (suspects.length === 0) return [...infos]
  const { answers, silent } = await askDevices(suspects, { left: LOOK_MS })
  const lower = new Map([
    ...silent.map(({ number }) => [number, loopOf(nodes.get(number))] as const),
    ...answers.map((answer) => [answer.number, lowerOf(answer)] as const),
  ])
  return infos.map((info) => {
    const below = lower.get(info.number)
    return below === undefined || below === info.number ? info : { ...info, lower: below }
  })
}

function lowerOf({ info }: Answers): number | undefined {
  return info.rdevice === 0n ? undefined : loopOf(info.rdevice)
}

/** The number of the loop device, itself or by a partition of it. */
function loopOf(rdevice: bigint | undefined): number | undefined {
  if (rdevice === undefined) return undefined
  if (majorOf(rdevice) === LOOP_MAJOR) return numberOfMinor(minorOf(rdevice))
  const [major, minor] = (readPlaceOnDisk(formatDevice(rdevice))?.disk ?? '').split(':').map(Number)
  return major === LOOP_MAJOR && minor !== undefined ? numberOfMinor(minor) : undefined
}

/** Which of the paths are block devices here, and of which number. */
async function findNodes(paths: readonly (readonly [number: number, path: string])[]): Promise<[number, bigint][]> {
  const sequence = new Sequence()
  const looks = paths.map(([number, path]) => {
    const bytes = newStat()
    return { number, bytes, step: sequence.try('statxPath', encodePath(path), bytes) }
  })
  try {
    await sequence.run({ left: LOOK_MS })
  } catch (error) {
    if (error instanceof GivenUp) return []
    throw error
  }
  return looks.flatMap(({ number, bytes, step }) => {
    const stat = step.succeeded ? new FileStat(decodeStat(bytes)) : undefined
    return stat?.isBlockDevice() ? [[number, stat.rdev] as [number, bigint]] : []
  })
}
