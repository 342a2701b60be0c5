/** LOOP_GET_STATUS64 of devices that no handle holds. */

import { constants } from 'node:os'
import type { LoopErrorReason } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { inBatches } from '../kernel/batches.ts'
import { type Bound, GivenUp } from '../kernel/bounded.ts'
import { devicePath } from '../kernel/devnode.ts'
import { openHiddenFolder } from '../kernel/hidden-folder.ts'
import { minorOfDevice } from '../kernel/features.ts'
import { close, O_RDONLY } from '../kernel/files.ts'
import { Sequence, type Step } from '../kernel/sequence.ts'
import { decodeInfo, encodePath, LOOP_MAJOR, type LoopInfo64, newInfo } from '../kernel/uapi.ts'

const { ENXIO } = constants.errno

/** What an attached device answers. */
export interface Answers {
  number: number
  info: LoopInfo64
  diskSeq: number | undefined
  blockSize: number
}

/** Why an attached device could not be asked. */
export type Silence = 'permission' | 'timeout' | 'no-node'

export interface Silent {
  number: number
  why: Silence
  /** What LOOP_GET_STATUS64 answered, where it did. */
  errno?: number
}

export interface Asked {
  answers: Answers[]
  silent: Silent[]
}

/** Errors that only concern this one device, which is going or is not a loop device: the others are asked all the same. */
const SKIPPED = new Set<LoopErrorReason>(['no-such-device', 'detaching', 'not-a-loop-device'])

/** Milliseconds that many devices are given together, and then each by itself, side by side. */
const TOGETHER = 250
const APART = 1_000

/**
 * Looks at devices without holding them. Those that are not attached are left out; those that cannot be asked are told.
 * Where one does not answer, the others do all the same.
 *
 * @throws `resources`
 */
export async function askDevices(numbers: readonly number[], bound?: Bound): Promise<Asked> {
  const asked = join(await inBatches(numbers, (batch) => askBatch(batch, bound)))
  const nodeless = asked.silent.filter(({ why }) => why === 'no-node').map(({ number }) => number)
  if (nodeless.length === 0) return asked
  const others = asked.silent.filter(({ why }) => why !== 'no-node')
  return join([{ answers: asked.answers, silent: others }, await askByOwnNodes(nodeless, bound)])
}

function join(asked: readonly Asked[]): Asked {
  return { answers: asked.flatMap(({ answers }) => answers), silent: asked.flatMap(({ silent }) => silent) }
}

/**
 * Devices that have no node in this /dev, by nodes in a tmpfs that is never put into the tree: nobody sees it, and it goes
 * when its descriptor is closed. Wants kernel 5.2, CAP_SYS_ADMIN and CAP_MKNOD; without them the devices stay silent.
 */
async function askByOwnNodes(numbers: readonly number[], bound: Bound | undefined): Promise<Asked> {
  const folder = await openHiddenFolder(within(bound, APART))
  if (folder < 0) return { answers: [], silent: numbers.map((number) => ({ number, why: 'no-node' as const })) }
  try {
    return join(
      await Promise.all(
        numbers.map((number) =>
          askOne(number, bound, (sequence) => {
            const name = encodePath(`loop${number}`)
            sequence.call('mknodBlockAt', folder, name, LOOP_MAJOR, minorOfDevice(number))
            return sequence.call('openat', folder, name, O_RDONLY)
          }),
        ),
      ),
    )
  } finally {
    await close(folder)
  }
}

async function askBatch(numbers: readonly number[], bound: Bound | undefined): Promise<Asked> {
  try {
    return await ask(numbers, within(bound, TOGETHER))
  } catch (error) {
    if (!(error instanceof GivenUp) || error.isAborted) throw error
  }
  return join(await Promise.all(numbers.map((number) => askOne(number, bound))))
}

/** Plans how the device is opened. */
type Opening = (sequence: Sequence, number: number) => Step

const byNode: Opening = (sequence, number) => sequence.call('openLoop', number, O_RDONLY)

async function askOne(number: number, bound: Bound | undefined, opening?: Opening): Promise<Asked> {
  try {
    return await ask([number], within(bound, APART), number, opening)
  } catch (error) {
    if (!(error instanceof GivenUp) || error.isAborted) throw error
    return { answers: [], silent: [{ number, why: 'timeout' }] }
  }
}

function within(bound: Bound | undefined, ms: number): Bound {
  return { left: Math.min(ms, bound?.left ?? ms), signal: bound?.signal }
}

async function ask(numbers: readonly number[], bound: Bound, gate?: number, opening: Opening = byNode): Promise<Asked> {
  const sequence = new Sequence()
  const asked = numbers.map((number) => {
    sequence.part()
    const bytes = newInfo()
    const fd = opening(sequence, number)
    const status = sequence.try('loopGetStatus64', fd, bytes)
    const diskSeq = sequence.try('blkGetDiskSeq', fd)
    const blockSize = sequence.try('blkSszGet', fd)
    sequence.call('close', fd)
    return { number, bytes, fd, status, diskSeq, blockSize }
  })
  await sequence.run(bound, gate)
  const found: Asked = { answers: [], silent: [] }
  for (const { number, bytes, fd, status, diskSeq, blockSize } of asked) {
    if (fd.answer === undefined) found.silent.push({ number, why: 'no-node' })
    else if (fd.answer < 0) {
      const why = silenceOf(number, fd.answer)
      if (why !== undefined) found.silent.push({ number, why })
    } else if (status.answer === 0) {
      const known = diskSeq.succeeded ? diskSeq.answer : undefined
      found.answers.push({ number, info: decodeInfo(bytes), diskSeq: known, blockSize: blockSize.answer ?? 0 })
    } else if (status.answer !== -ENXIO) found.silent.push({ number, why: 'timeout', errno: status.answer ?? -ENXIO })
  }
  return found
}

/** @throws what is no matter of this one device */
function silenceOf(number: number, errno: number): Silence | undefined {
  const error = explain({ call: 'open', errno, path: devicePath(number), number }, 'open device')
  if (SKIPPED.has(error.reason)) return undefined
  if (error.reason === 'node-missing') return 'no-node'
  if (error.reason === 'permission') return 'permission'
  throw error
}
