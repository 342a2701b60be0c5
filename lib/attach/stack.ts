/**
 * A stack of two loop devices: the filesystem is mounted from the upper one, and the backing file of the lower one is
 * changed. So ext4 and xfs survive a change (K2): what is marked dead is the lower device, which carries no filesystem.
 */

import { type BackingFile, checkBoolean, checkOptions, wrongValue } from '../common/arguments.ts'
import { checkDeadline } from '../common/deadline.ts'
import type { Handle } from '../handle/handle.ts'
import { LOWER_TAG } from '../handle/lower.ts'
import { attachFile } from './attach.ts'
import { type AttachOptions, checkWanted, OPTION_NAMES } from './options.ts'

/** {@link attachFile}, or a stack where that is asked for. */
export async function attachPlainOrStack(file: BackingFile, options?: AttachOptions): Promise<Handle> {
  const given = checkOptions(options, OPTION_NAMES)
  if (given.swappable === undefined || !checkBoolean('swappable', given.swappable)) return attachFile(file, given)
  if (given.readOnly !== true) throw wrongValue('swappable', 'needs readOnly: true')
  if (given.overlap === 'reuse') throw wrongValue('overlap', "cannot be 'reuse' with swappable")
  // Those that are for the upper device must be refused before the lower one is made.
  checkWanted(given)
  const deadline = checkDeadline(given, 10_000)

  const { swappable: _, number, partscan, reference, autoclear, lock, ...forLower } = given
  const lower = await attachFile(file, { ...forLower, reference: LOWER_TAG }, number)
  try {
    const { blockSize, createNode, signal } = given
    const timeout = Math.ceil(deadline.left)
    const forUpper = {
      number,
      partscan,
      createNode,
      reference,
      autoclear,
      lock,
      blockSize,
      signal,
      timeout,
    }
    const upper = await attachFile(lower.path, { ...forUpper, readOnly: true, overlap: 'allow' })
    for (const { code, message, hint } of lower.warnings.list) upper.warnings.add(code, message, hint)
    return upper
  } finally {
    // The upper one holds it; where there is none, autoclear takes it down.
    await lower.close()
  }
}
