/**
 * A stack of two loop devices: the filesystem is mounted from the upper one, and the backing file of the lower one is
 * changed. So ext4 and xfs survive a change (K2): what is marked dead is the lower device, which carries no filesystem.
 */

import { type BackingFile, checkBoolean, checkOptions, wrongValue } from './arguments.ts'
import { attachFile, type AttachOptions, checkWanted, OPTION_NAMES } from './attach.ts'
import { checkDeadline } from './deadline.ts'
import { askDevices, type Handle } from './handle.ts'
import { openHandle } from './open.ts'

/** `lo_file_name` of a lower device: how every process knows a stack. */
export const LOWER_TAG = 'loopctl:lower'

/** The lower device of a stack made by this library; undefined: the device is not the upper one of such. */
export async function findSwappableLower({ lowerNumber }: Handle): Promise<number | undefined> {
  if (lowerNumber === undefined) return undefined
  const [lower] = await askDevices([lowerNumber])
  return lower?.info.fileName === LOWER_TAG ? lowerNumber : undefined
}

/**
 * Runs the operation on the device whose backing file is the real one: the lower one of a stack, else the device
 * itself. A change of the upper one would succeed, and break the stack.
 */
export async function onBackingDevice<T>(handle: Handle, operation: (target: Handle) => Promise<T>): Promise<T> {
  if (handle.lowerNumber === undefined) return operation(handle)
  // Opened, so that it cannot go, before it is asked what it is; where it cannot be opened there is no guessing.
  const lower = await openHandle(handle.lowerNumber)
  try {
    const { info } = await lower.readInfo()
    if (info.fileName !== LOWER_TAG) return await operation(handle)
    await handle.readInfo()
    return await lower.run(() => operation(lower))
  } finally {
    await lower.close()
  }
}

/** {@link attachFile}, or a stack where that is asked for. */
export async function attachPlainOrStack(file: BackingFile, options?: AttachOptions): Promise<Handle> {
  const { swappable, ...given } = checkOptions(options, OPTION_NAMES)
  if (swappable === undefined || !checkBoolean('swappable', swappable)) return attachFile(file, given)
  if (given.readOnly !== true) throw wrongValue('swappable', 'needs readOnly: true')
  if (given.overlap === 'reuse') throw wrongValue('overlap', "cannot be 'reuse' with swappable")
  // Those that are for the upper device must be refused before the lower one is made.
  checkWanted(given)
  const deadline = checkDeadline(given, 10_000)

  const { number, partscan, reference, autoclear, ...forLower } = given
  const lower = await attachFile(file, { ...forLower, reference: LOWER_TAG })
  try {
    const { blockSize, createNode, signal } = given
    const timeout = Math.ceil(deadline.left)
    const forUpper = {
      number,
      partscan,
      createNode,
      reference,
      autoclear,
      blockSize,
      signal,
      timeout,
    }
    return await attachFile(lower.path, { ...forUpper, readOnly: true, overlap: 'allow' })
  } finally {
    // The upper one holds it; where there is none, autoclear takes it down.
    await lower.close()
  }
}
