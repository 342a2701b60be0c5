/** Whether a device is truly gone after LOOP_CLR_FD, which only asks for that. */

import { backoff, type Deadline } from '../common/deadline.ts'
import type { Handle } from '../handle/handle.ts'
import { findSwappableLower } from '../handle/lower.ts'
import { diskSeqCountsAttachments } from '../kernel/features.ts'
import * as sysfs from '../kernel/sysfs.ts'

/** An attachment, by what tells it from the next one of the same device. */
export interface Attachment {
  number: number
  diskSeq: number | undefined
  /** The path that sysfs shows, where the kernel does not count attachments (before 5.15, and K14). */
  backingFile: string | undefined
}

export function attachmentOf(number: number, diskSeq: number | undefined): Attachment {
  const backingFile = diskSeqCountsAttachments() ? undefined : sysfs.readBackingFileSync(number)
  return { number, diskSeq, backingFile }
}

/**
 * The last close has detached it, unless a child process that is just being started still has the descriptor.
 *
 * @returns false where it has not gone in time, or the signal came: it is asked for and cannot be taken back
 */
export async function confirmGone(attachments: readonly Attachment[], deadline: Deadline): Promise<boolean> {
  try {
    // LOOP_CLR_FD has said so, and there is no other witness.
    if (!sysfs.isMounted()) return true
    for (let attempt = 1; attachments.some(isStillAttached); attempt++) {
      if (!(await deadline.pause(backoff(attempt)))) return false
    }
    return true
  } catch {
    return false
  }
}

/** The lower device of a stack goes with the upper one. */
export async function lowerOf(handle: Handle): Promise<Attachment[]> {
  const number = await findSwappableLower(handle)
  if (number === undefined) return []
  return [attachmentOf(number, sysfs.readDiskSeqSync(number))]
}

/** The same attachment, that is: another's of the same device is none of ours. Without sysfs: it may be. */
export function isStillAttached({ number, diskSeq, backingFile }: Attachment): boolean {
  if (!sysfs.isBound(number)) return !sysfs.isMounted()
  if (backingFile === undefined) return sysfs.readDiskSeqSync(number) === diskSeq
  // LOOP_CLR_FD has set autoclear, which the next attachment need not have.
  return sysfs.readAutoclearSync(number) !== false && sysfs.readBackingFileSync(number) === backingFile
}
