/** A folder that is in no mount table, for nodes that only this process needs. */

import { constants } from 'node:os'
import type { Bound } from './bounded.ts'
import { minorOfDevice } from './features.ts'
import { close } from './files.ts'
import { Sequence, type Step } from './sequence.ts'
import { encodePath, LOOP_MAJOR } from './uapi.ts'

const { EPERM } = constants.errno

/**
 * A descriptor of a tmpfs that is not put into the tree (fsopen(2), fsmount(2), kernel 5.2, CAP_SYS_ADMIN), or the negative
 * errno. Closing it unmounts it.
 */
export async function openHiddenFolder(bound: Bound): Promise<number> {
  const sequence = new Sequence()
  const context = sequence.call('fsopen', encodePath('tmpfs'))
  const created = sequence.call('fsconfigCreate', context)
  const folder = sequence.call('fsmount', context, 0)
  await sequence.run(bound)
  if (context.succeeded) await close(context.fd)
  return folder.answer ?? created.answer ?? context.answer ?? -1
}

/** Plans that the node of a loop device is made in the folder, and opened. */
export function planHiddenNode(sequence: Sequence, folder: number, number: number, flags: number): Step {
  const name = encodePath(`loop${number}`)
  sequence.call('mknodBlockAt', folder, name, LOOP_MAJOR, minorOfDevice(number))
  return sequence.call('openat', folder, name, flags)
}

/**
 * Opens a loop device by a node that nobody else sees, and that is gone with this process however it ends. A descriptor,
 * or the negative errno: it wants kernel 5.2, CAP_SYS_ADMIN and CAP_MKNOD.
 */
export async function openByHiddenNode(number: number, flags: number, bound: Bound): Promise<number> {
  const folder = await openHiddenFolder(bound)
  if (folder < 0) return folder
  try {
    const sequence = new Sequence()
    const device = planHiddenNode(sequence, folder, number, flags)
    await sequence.run(bound, number)
    // Without an answer the node could not be made.
    return device.answer ?? -EPERM
  } finally {
    await close(folder)
  }
}
