/** A folder that is in no mount table, for nodes that only this process needs. */

import type { Bound } from './bounded.ts'
import { close } from './files.ts'
import { Sequence } from './sequence.ts'
import { encodePath } from './uapi.ts'

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
