/** Attaches for trial: the one way to know whether it works, and what the kernel can do. Leaves nothing behind. */

import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { attachFile } from '../attach/attach.ts'
import { openControl, removeDevice } from '../attach/loop-control.ts'
import type { AttachOptions } from '../attach/options.ts'
import { Deadline } from '../common/deadline.ts'
import { randomHex } from '../common/crypto.ts'
import { detach } from '../detach/detach.ts'
import { dispose } from '../detach/dispose.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Handle } from '../handle/handle.ts'
import { binding } from '../kernel/binding.ts'
import { checkDeviceNode, CONTROL, devicePath, isDevKernels, removeNode } from '../kernel/devnode.ts'
import { findLargestBlockSize, hasDiskSeq, hasLoopConfigure, observeFeature } from '../kernel/features.ts'
import { close, O_CREAT, O_EXCL, O_RDONLY, O_RDWR, open, unlink, writeAt } from '../kernel/files.ts'
import { isPartitionListed } from '../kernel/system.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { blank, gpt, mbr } from './images.ts'

/** What each step is given, in milliseconds. */
const PATIENCE = 2_500

/** What trying has shown. */
export interface Trial {
  /** Why /dev/loop-control cannot be opened. */
  control?: LoopError
  /** Why a file cannot be attached; without it, it can. */
  attach?: LoopError
  /** Why it was not detached as it should. */
  detach?: LoopError
  /** No folder takes a file: one of this package was attached, read-only. */
  readOnly: boolean
  largestBlockSize?: number
  /** Partitions were found: null where their node could be opened, or why not. */
  partitionNode?: LoopError | null
}

/** Never rejects. What hangs is left to itself, and undoes its work when it goes on. */
export async function tryAttaching(): Promise<Trial> {
  const trial: Trial = { readOnly: false }
  let control = -1
  try {
    control = await within(`open ${CONTROL}`, () => openControl(), close)
  } catch (error) {
    trial.control = asLoopError(error)
  }
  // After that: opening it loads the module, which makes devices.
  const before = await existing()
  const made = new Set<number>()
  const used = new Set<number>()
  const withNode = new Set([...before].filter((number) => checkDeviceNode(number) === 0))
  const note = (number: number) => {
    used.add(number)
    if (!before.has(number)) made.add(number)
  }
  const attempt: Attempt = { trial, note }
  try {
    await tryAll(attempt)
  } finally {
    if (!isDevKernels()) {
      // Attached by another meanwhile, who uses the node
      for (const number of used) if (!withNode.has(number) && !sysfs.isBound(number)) unmakeNode(number)
    }
    if (control >= 0) await removeMade(control, made)
  }
  return trial
}

interface Attempt {
  trial: Trial
  /** To be told of every device that was used. */
  note: (number: number) => void
}

async function tryAll(attempt: Attempt): Promise<void> {
  const { trial } = attempt
  try {
    await attached(attempt, blank(), {}, lookAtKernel(trial))
  } catch (error) {
    trial.attach = asLoopError(error)
    return
  }
  if (trial.readOnly) return
  try {
    await attached(attempt, blank(), { directIO: true, overlap: 'allow' }, async () => observeFeature('directIO', true))
  } catch (error) {
    if (LoopError.is(error, 'direct-io-unavailable')) observeFeature('directIO', false)
    if (LoopError.is(error, 'timeout')) return
  }
  const tryPartitions = (image: Buffer, partscan: 'kernel' | 'user', look: (isFound: boolean | undefined) => void) =>
    attached(attempt, image, { partscan, overlap: 'allow' }, async ({ number }) => {
      const isFound = sysfs.isMounted() ? sysfs.partitionExists(number, 1) : isPartitionListed(number, 1)
      look(isFound)
      if (isFound) trial.partitionNode = await tryPartitionNode(number)
    })
  try {
    for (const [name, image] of [
      ['mbr', mbr()],
      ['gpt', gpt()],
    ] as const) {
      await tryPartitions(image, 'kernel', (isFound) => {
        if (isFound !== undefined) observeFeature(name, isFound)
      })
    }
    // Without a parser the nodes are those of partitions that loopctl adds.
    if (trial.partitionNode === undefined) await tryPartitions(gpt(), 'user', () => {})
  } catch {
    // Not known then
  }
}

function lookAtKernel(trial: Trial): (handle: Handle) => Promise<void> {
  return async (handle) => {
    hasLoopConfigure(handle.descriptor)
    hasDiskSeq(handle.descriptor)
    const before = binding().blkSszGetSync(handle.descriptor)
    const set = (bytes: number) => handle.write('loopSetBlockSize', bytes)
    const largest = await findLargestBlockSize(set)
    if (largest !== undefined) trial.largestBlockSize = largest
    if (before > 0) await set(before)
  }
}

async function tryPartitionNode(number: number): Promise<LoopError | null> {
  const path = `/dev/loop${number}p1`
  const deadline = new Deadline(300)
  let fd = await open(path, O_RDONLY)
  // Where udev makes the nodes they come later
  while (fd < 0 && (await deadline.pause(10))) fd = await open(path, O_RDONLY)
  if (fd < 0) return explain({ call: 'open', errno: fd, path }, 'open device')
  await close(fd)
  return null
}

/** Attaches a file of that content for as long as `look` looks. */
async function attached(
  { trial, note }: Attempt,
  content: Buffer,
  options: AttachOptions,
  look: (handle: Handle) => Promise<void>,
): Promise<void> {
  const file = trial.readOnly ? undefined : await temporaryFile(content)
  trial.readOnly = file === undefined
  const work = async (signal: AbortSignal) => {
    try {
      const given: AttachOptions = { ...options, signal, timeout: PATIENCE }
      const handle = await attachNamed(file, given)
      note(handle.number)
      try {
        await look(handle)
      } finally {
        await letGo(handle, trial)
      }
    } catch (error) {
      // A device made by LOOP_CTL_GET_FREE that has no node in this /dev
      const number = LoopError.is(error) && /^\/dev\/loop(\d+)$/.exec(error.path ?? '')?.[1]
      if (number) note(Number(number))
      throw error
    }
  }
  // Attached, looked at, and detached
  await within('attach', work, undefined, 3 * PATIENCE)
}

/** By its path, as most files are attached; the name is gone as soon as the device has the file. */
async function attachNamed(file: string | undefined, options: AttachOptions): Promise<Handle> {
  if (file === undefined) return attachFile(fileURLToPath(import.meta.url), { ...options, readOnly: true })
  try {
    return await attachFile(file, options)
  } finally {
    await unlink(file)
  }
}

async function letGo(handle: Handle, trial: Trial): Promise<void> {
  try {
    await detach(handle, { timeout: 1_000 })
  } catch (error) {
    trial.detach = asLoopError(error)
    // Goes when whoever looks at it is done
    await dispose(handle)
  }
}

/** A file of that content; undefined: no folder takes one. */
async function temporaryFile(content: Buffer): Promise<string | undefined> {
  for (const folder of new Set([tmpdir(), '/tmp', '/var/tmp', '/dev/shm', '/run'])) {
    try {
      const file = await within(`open a file in ${folder}`, () => makeFile(folder, content), discard)
      if (file !== undefined) return file
    } catch {
      // the folder does not answer: the next one
    }
  }
  return undefined
}

async function makeFile(folder: string, content: Buffer): Promise<string | undefined> {
  const path = join(folder, `loopctl-doctor-${randomHex(16)}`)
  const fd = await open(path, O_RDWR | O_CREAT | O_EXCL)
  if (fd < 0) return undefined
  const written = await writeAt(fd, content, content.length, 0)
  await close(fd)
  if (written === content.length) return path
  await unlink(path)
  return undefined
}

async function discard(file: string | undefined): Promise<void> {
  if (file !== undefined) await unlink(file)
}

/** The devices that there are. */
async function existing(): Promise<Set<number>> {
  const numbers = await sysfs.readNumbers()
  if (typeof numbers !== 'number') return new Set(numbers)
  // Without sysfs the node tells: a device that can be attached has one.
  const known = new Set<number>()
  for (let number = 0; number < 4_096; number++) if (checkDeviceNode(number) === 0) known.add(number)
  return known
}

/** The node that attaching made in a /dev which the kernel does not look after. */
function unmakeNode(number: number): void {
  const device = sysfs.readDeviceNumbers(number)
  if (device !== undefined) removeNode(devicePath(number), device)
}

async function removeMade(control: number, made: ReadonlySet<number>): Promise<void> {
  for (const number of made) {
    try {
      await removeDevice(control, number, new Deadline(1_000))
    } catch {
      // taken by another meanwhile, who keeps it
    }
  }
  await close(control)
}

/**
 * The operation's result, or a `timeout` error when its time is up. Its signal is aborted then; what it still resolves
 * to is given to `undo`.
 */
export async function within<T>(
  what: string,
  operation: (signal: AbortSignal) => Promise<T>,
  undo?: (result: T) => Promise<unknown>,
  patience: number = PATIENCE,
): Promise<T> {
  const controller = new AbortController()
  const running = operation(controller.signal)
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => {
      const error = refusal('timeout', what, `no answer within ${patience} ms`)
      controller.abort(error)
      reject(error)
    }, patience)
  })
  try {
    return await Promise.race([running, late])
  } catch (error) {
    if (controller.signal.aborted) void running.then(undo, () => {})
    throw error
  } finally {
    clearTimeout(timer)
  }
}

function asLoopError(error: unknown): LoopError {
  if (LoopError.is(error)) return error
  return refusal('unknown', 'attach', error instanceof Error ? error.message : String(error), { cause: error })
}
