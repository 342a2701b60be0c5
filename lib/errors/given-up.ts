/** Calls that did not come back in time, as the LoopError that says who did not answer. */

import { constants } from 'node:os'
import { devicePath } from '../kernel/devnode.ts'
import { NoThread } from '../kernel/binding.ts'
import { type Asked, GivenUp, listUnanswering } from '../kernel/bounded.ts'
import { LoopError, refusal } from './errors.ts'

/**
 * What is to be thrown in place of the error: `timeout` or the signal's reason where a call was given up on, `resources`
 * where no thread was to be had for one.
 */
export function explainGivenUp(error: unknown, path?: string): unknown {
  if (error instanceof NoThread) return explainNoThread(path)
  if (!(error instanceof GivenUp)) return error
  if (error.isAborted) return error.cause
  const who = nameOf(error.asked) ?? path
  return refusal('timeout', 'ioctl', `${who ?? 'the kernel'} did not answer in time`, {
    path: who,
    hint: 'see whether the server of its filesystem is still there; what was begun is undone when it answers',
    cause: error,
  })
}

/** Runs what can be given up on, and explains it. */
export async function explained<T>(operation: () => Promise<T>, path?: string): Promise<T> {
  try {
    return await operation()
  } catch (error) {
    throw explainGivenUp(error, path)
  }
}

function explainNoThread(path: string | undefined): LoopError {
  const silent = listUnanswering().map(nameOf)
  return new LoopError({
    reason: 'resources',
    errno: -constants.errno.EAGAIN,
    syscall: 'clone',
    path,
    detail: `there is no thread for another call${silent.length === 0 ? '' : `: these do not answer: ${silent.join(', ')}`}`,
    hint: 'see whether the servers of their filesystems are still there, or raise the limit of processes (ulimit -u)',
  })
}

function nameOf(asked: Asked | undefined): string | undefined {
  return typeof asked === 'number' ? devicePath(asked) : asked
}
