/**
 * flock(LOCK_EX) on /dev/loop-control, the protocol that systemd follows too: whoever attaches has the free devices to
 * itself for a moment. It is for speed alone and guarantees nothing: losetup takes no lock, and a private /dev of a
 * container has a node, and so a lock, of its own.
 */

import { constants } from 'node:os'
import { backoff, type Deadline } from '../common/deadline.ts'
import { binding } from '../kernel/binding.ts'
import * as sysfs from '../kernel/sysfs.ts'

export const LOCK_EX = 2
export const LOCK_NB = 4
export const LOCK_UN = 8

/** How long to wait for somebody who does not get on, in milliseconds; then the work goes on without the lock. */
const PATIENCE = 250
/** The same while devices come and go, which the kernel counts. */
const MOST_PATIENCE = 2_000

/** The attempt after which pauses get no longer: with all in long ones the lock is free and nobody there. */
const LONGEST = 5

export interface ControlLock {
  /** False: somebody else may attach at the same time. */
  readonly held: boolean
  /** Idempotent. */
  release(): void
}

/**
 * @param control a descriptor of /dev/loop-control; -1 where there is none
 * @throws the signal's reason
 */
export async function lockControl(control: number, deadline: Deadline): Promise<ControlLock> {
  let held = control >= 0 && (await lockFile(control, deadline))
  return {
    held,
    release() {
      if (held) binding().flockSync(control, LOCK_UN)
      held = false
    },
  }
}

/** Somebody had the lock for longer than our patience: until it is free again, only a look and no waiting. */
let stuck = false

/**
 * Waits by trying again, not in flock(2): a thread that waits there cannot be called back. False where it was given up.
 *
 * @throws the signal's reason
 */
export async function lockFile(control: number, deadline: Deadline): Promise<boolean> {
  const start = performance.now()
  let seen: number | undefined
  let since = start
  for (let attempt = 1; binding().flockSync(control, LOCK_EX | LOCK_NB) === -constants.errno.EAGAIN; attempt++) {
    const now = performance.now()
    if (attempt === 1) seen = sysfs.readUeventCount()
    else if (now - since > PATIENCE) {
      // Many who attach one after another are no reason to go on without: that would be in the way of them all.
      const count = sysfs.readUeventCount()
      stuck = count === seen || now - start > MOST_PATIENCE
      ;[seen, since] = [count, now]
    }
    if (stuck || !(await deadline.pause(backoff(Math.min(attempt, LONGEST))))) return false
  }
  stuck = false
  return true
}
