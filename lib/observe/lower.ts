/** Loop devices that are backed by other loop devices: told by numbers, since a path can be that of another namespace. */

import { type Answers, askDevices } from '../handle/ask.ts'
import { numberOfMinor } from '../kernel/features.ts'
import { lookForNodes } from '../kernel/nodes-at.ts'
import { readPlaceOnDisk } from '../kernel/sysfs.ts'
import { formatDevice, LOOP_MAJOR, majorOf, minorOf } from '../kernel/uapi.ts'

interface Looked {
  number: number
  backingFile: string | null
  backingDeleted: boolean
  lower?: number
}

/** Milliseconds for asking devices: one can have a file on a server that does not answer. */
const LOOK_MS = 1_000

/**
 * Adds `lower` where it is missing. Devices whose backing file is a regular one here are not opened. The others are, for
 * LOOP_GET_STATUS64; of those that may not be opened the node at the path tells.
 */
export async function addLower<Info extends Looked>(infos: readonly Info[]): Promise<Info[]> {
  const paths = infos.flatMap(({ number, backingFile, backingDeleted }) =>
    backingFile === null ? [] : [[number, backingDeleted ? `${backingFile} (deleted)` : backingFile] as const],
  )
  const { nodes, undecided } = await lookForNodes(paths)
  if (undecided.length === 0) return [...infos]
  const { answers, silent } = await askDevices(undecided, { left: LOOK_MS })
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
