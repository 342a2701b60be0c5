/** LOOP_GET_STATUS64 of devices that no handle holds. */

import { constants } from 'node:os'
import type { LoopErrorReason } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { inBatches } from '../kernel/batches.ts'
import { type Bound, GivenUp, listUnanswering } from '../kernel/bounded.ts'
import { devicePath } from '../kernel/devnode.ts'
import { openHiddenFolder, planHiddenNode } from '../kernel/hidden-folder.ts'
import { close, type FileStat, O_RDONLY, stat } from '../kernel/files.ts'
import { mountOf, readMountsSync } from '../kernel/mountinfo.ts'
import { Sequence, type Step } from '../kernel/sequence.ts'
import { isBound, readBackingFileSync } from '../kernel/sysfs.ts'
import { decodeInfo, formatDevice, type LoopInfo64, newInfo } from '../kernel/uapi.ts'

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

/** A device that has not told its file. */
export interface Silent {
  number: number
  why: Silence
  /** What LOOP_GET_STATUS64 answered, where it did: mostly its filesystem is gone. */
  errno?: number
}

export interface Asked {
  answers: Answers[]
  silent: Silent[]
}

/** Errors that only concern this one device, which is going or is not a loop device: the others are asked all the same. */
const SKIPPED = new Set<LoopErrorReason>(['no-such-device', 'detaching', 'not-a-loop-device'])

/**
 * Milliseconds that many devices are given together, and then each by itself, side by side; and which part of the time
 * that is left it may be.
 */
const TOGETHER = { ms: 250, part: 4 }
const APART = { ms: 500, part: 2 }

/**
 * Looks at devices without holding them. Those that are not attached are left out; those that cannot be asked are told.
 * Where one does not answer, the others do all the same. One that owes an answer already is not asked again, which would
 * cost a thread each time.
 *
 * @param isAwaited whether a device that has not answered is given all the time that is left
 * @throws `resources`
 */
export async function askDevices(
  numbers: readonly number[],
  bound: Bound,
  isAwaited: (number: number) => Promise<boolean> = async () => false,
): Promise<Asked> {
  const unanswering = new Set(listUnanswering())
  const owing = numbers.filter((number) => unanswering.has(number))
  const asked = await inBatches(
    numbers.filter((number) => !unanswering.has(number)),
    (batch) => askBatch(batch, bound),
  )
  const found = join([
    await askNodeless(join(asked), bound),
    { answers: [], silent: owing.map((number) => ({ number, why: 'timeout' })) },
  ])
  const awaited: Silent[] = []
  for (const one of found.silent) if (isUnanswered(one) && (await isAwaited(one.number))) awaited.push(one)
  if (awaited.length === 0) return found
  const { answers, silent } = join(await Promise.all(awaited.map(({ number }) => askOne(number, bound))))
  const others = found.silent.filter((one) => !awaited.includes(one))
  return { answers: [...found.answers, ...answers], silent: [...others, ...silent] }
}

/** Whether it may still answer. */
export function isUnanswered({ why, errno }: Silent): boolean {
  return why === 'timeout' && errno === undefined
}

/** Those without a node here are asked once more, by another. */
async function askNodeless({ answers, silent }: Asked, bound: Bound): Promise<Asked> {
  const nodeless = silent.filter(({ why }) => why === 'no-node').map(({ number }) => number)
  if (nodeless.length === 0) return { answers, silent }
  const others = silent.filter(({ why }) => why !== 'no-node')
  return join([{ answers, silent: others }, await askByOwnNodes(nodeless, bound)])
}

function join(asked: readonly Asked[]): Asked {
  return { answers: asked.flatMap(({ answers }) => answers), silent: asked.flatMap(({ silent }) => silent) }
}

/**
 * Devices that have no node in this /dev, by nodes in a tmpfs that is never put into the tree: nobody sees it, and it goes
 * when its descriptor is closed. Wants kernel 5.2, CAP_SYS_ADMIN and CAP_MKNOD; without them the devices stay silent.
 */
async function askByOwnNodes(numbers: readonly number[], bound: Bound): Promise<Asked> {
  const folder = await openHiddenFolder(partOf(bound, APART))
  if (folder < 0) return { answers: [], silent: numbers.map((number) => ({ number, why: 'no-node' as const })) }
  try {
    return join(
      await Promise.all(
        numbers.map((number) =>
          askOne(number, partOf(bound, APART), (sequence) => planHiddenNode(sequence, folder, number, O_RDONLY)),
        ),
      ),
    )
  } finally {
    await close(folder)
  }
}

async function askBatch(numbers: readonly number[], bound: Bound): Promise<Asked> {
  try {
    return await ask(numbers, partOf(bound, TOGETHER))
  } catch (error) {
    if (!(error instanceof GivenUp) || error.isAborted) throw error
  }
  return join(await Promise.all(numbers.map((number) => askOne(number, partOf(bound, APART)))))
}

/** Plans how the device is opened. */
type Opening = (sequence: Sequence, number: number) => Step

const byNode: Opening = (sequence, number) => sequence.call('openLoop', number, O_RDONLY)

async function askOne(number: number, bound: Bound, opening?: Opening): Promise<Asked> {
  try {
    return await ask([number], bound, number, opening)
  } catch (error) {
    if (!(error instanceof GivenUp) || error.isAborted) throw error
    return { answers: [], silent: [{ number, why: 'timeout' }] }
  }
}

function partOf({ left, signal }: Bound, { ms, part }: typeof TOGETHER): Bound {
  return { left: Math.min(ms, left / part), signal }
}

/**
 * Whether the file of a device is on the filesystem of that number, going by its path in sysfs. No other filesystem is
 * asked. What has been unmounted lazily is not found at its path, and is another filesystem; so is what was deleted.
 */
export async function isOn(filesystem: bigint, number: number, bound: Bound): Promise<boolean> {
  const path = readBackingFileSync(number)
  if (path === undefined || mountOf(path, readMountsSync())?.device !== formatDevice(filesystem)) return false
  try {
    const found = await stat(path, bound)
    return typeof found !== 'number' && found.dev === filesystem
  } catch (error) {
    // That filesystem is slow.
    if (error instanceof GivenUp && !error.isAborted) return true
    throw error
  }
}

/**
 * Whether a device that cannot be asked could have the file that is looked for, going by the path that sysfs shows: false
 * only where that is another file here, or its filesystem does not answer, as that of the file just did.
 */
export async function couldHave(number: number, is: (file: FileStat) => boolean, bound: Bound): Promise<boolean> {
  const path = readBackingFileSync(number)
  if (path === undefined) return isBound(number)
  try {
    const found = await stat(path, bound)
    return typeof found === 'number' || is(found)
  } catch (error) {
    if (error instanceof GivenUp && !error.isAborted) return false
    throw error
  }
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
