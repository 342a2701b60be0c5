/** Handles that were forgotten: their descriptors are closed when they are garbage collected, with a warning. */

import { close } from '../kernel/files.ts'

/** What is left of a handle that nobody has any more. */
export interface Remains {
  fd: number
  readonly path: string
}

/** Only opened handles get here: those that own a device are kept. */
export const forgotten: FinalizationRegistry<Remains> = new FinalizationRegistry<Remains>((remains) => {
  if (remains.fd < 0) return
  process.emitWarning(`a handle of ${remains.path} was garbage collected without close()`, {
    type: 'LoopctlWarning',
    code: 'LOOPCTL_HANDLE_NOT_CLOSED',
    detail: 'use `await using`, or close it: until then its descriptor keeps the device busy',
  })
  void close(remains.fd)
})
