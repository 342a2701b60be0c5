/** A call of the kernel that can take long, for no longer than its caller waits. */

import { Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'

/** Milliseconds that a call gets in any case: mostly the kernel answers at once, and a hop to a thread takes its time. */
const LEAST = 50

/**
 * What the work comes to. Where the caller's time is up first, rejects with `timeout`, or with the signal's reason; what
 * the work then comes to later is given to `undo`.
 */
export async function within<T>(
  deadline: Deadline,
  { call, path }: { call: string; path: string },
  work: Promise<T>,
  undo: (late: T) => void,
): Promise<T> {
  const outcome: { value?: { of: T } | { error: unknown } } = {}
  const done = work.then(
    (of) => void (outcome.value = { of }),
    (error: unknown) => void (outcome.value = { error }),
  )
  const giveUp = (): void => void work.then(undo, () => {})
  try {
    // A timeout of 0 is one try, however long that takes.
    if (deadline.isUnbounded) await done
    else {
      const patience = deadline.left > LEAST ? deadline : new Deadline(LEAST)
      await patience.pause(patience.left, done)
    }
    deadline.throwIfAborted()
  } catch (error) {
    giveUp()
    throw error
  }
  if (outcome.value === undefined) {
    giveUp()
    throw refusal('timeout', call, `the kernel has not answered for ${deadline.waited} ms`, { path })
  }
  if ('error' in outcome.value) throw outcome.value.error
  return outcome.value.of
}
