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
  const detail = who === undefined ? 'the kernel did not answer in time' : 'did not answer in time'
  const syscall = typeof error.asked === 'string' ? 'open' : 'ioctl'
  const more = error.isUndone ? 'what was begun is undone when it answers' : 'look at the status when it answers'
  return refusal('timeout', syscall, error.isUndone ? detail : `${detail}, and what came of it is not known`, {
    path: who,
    hint: `see whether the server of its filesystem is still there; ${more}`,
    cause: error,
  })
}

/**
 * Cleans up after an operation that has failed: where it was given up on in a call, when that has come back, without being
 * waited for, since what would be asked does not answer until then. What fails of it is not told.
 */
export async function cleanUpAfter(error: unknown, cleanUp: () => Promise<unknown>): Promise<void> {
  if (error instanceof GivenUp && error.hasBegun) error.back = cleanUpQuietly(cleanUp, error.back)
  else await cleanUpQuietly(cleanUp)
}

async function cleanUpQuietly(cleanUp: () => Promise<unknown>, after?: Promise<unknown>): Promise<void> {
  try {
    await after
    await cleanUp()
  } catch {
    // The error of the operation is the one to be told.
  }
}

/** Runs the operation, and cleans up whatever became of it: see {@link cleanUpAfter}. */
export async function cleaningUp<T>(operation: () => Promise<T>, cleanUp: () => Promise<unknown>): Promise<T> {
  let result: T
  try {
    result = await operation()
  } catch (error) {
    await cleanUpAfter(error, cleanUp)
    throw error
  }
  await cleanUp()
  return result
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
