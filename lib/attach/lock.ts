/**
 * One attach at a time, as far as that goes: flock(LOCK_EX) on /dev/loop-control, the protocol that systemd follows
 * too, and a queue within the process. An optimisation and no guarantee: losetup takes no lock, private /dev nodes do
 * not share it, and nobody waits long for it.
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

/** Whether nobody in this process has the lock, or waits for it. */
export function isLockIdle(): boolean {
  return !busy
}

interface Waiter {
  hasTurn: boolean
  wake: () => void
}

const waiting: Waiter[] = []
let busy = false
/** Counts turns: as long as it moves, waiting is worth while. */
let turns = 0

/**
 * @param control a descriptor of /dev/loop-control; -1 where there is none
 * @throws the signal's reason
 */
export async function lockControl(control: number, deadline: Deadline): Promise<ControlLock> {
  const hadTurn = await waitForTurn(deadline)
  let locked = false
  try {
    locked = hadTurn && control >= 0 && (await lockFile(control, deadline))
  } catch (error) {
    if (hadTurn) endTurn()
    throw error
  }
  let released = false
  return {
    held: locked,
    release() {
      if (released) return
      released = true
      if (locked) binding().flockSync(control, LOCK_UN)
      if (hadTurn) endTurn()
    },
  }
}

async function waitForTurn(deadline: Deadline): Promise<boolean> {
  if (!busy) {
    busy = true
    return true
  }
  const waiter: Waiter = { hasTurn: false, wake: nothing }
  const woken = new Promise<void>((resolve) => {
    waiter.wake = resolve
  })
  waiting.push(waiter)
  try {
    // For as long as the others get on.
    for (let seen = -1; !waiter.hasTurn && seen !== turns;) {
      seen = turns
      if (!(await deadline.pause(PATIENCE, woken))) break
    }
  } catch (error) {
    if (waiter.hasTurn) endTurn()
    throw error
  } finally {
    if (!waiter.hasTurn) waiting.splice(waiting.indexOf(waiter), 1)
  }
  return waiter.hasTurn
}

function nothing(): void {}

function endTurn(): void {
  turns++
  const next = waiting.shift()
  if (next) {
    next.hasTurn = true
    next.wake()
  } else busy = false
}

/** Somebody had the lock for longer than our patience: until it is free again, only a look and no waiting. */
let stuck = false

/** Never in a pool thread: four of them waiting there would stop the whole program. */
async function lockFile(control: number, deadline: Deadline): Promise<boolean> {
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
