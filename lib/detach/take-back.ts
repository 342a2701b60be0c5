/** A detach that is not to be: it is taken back, at once or when what was given up on has come back. */

import { setTimeout } from 'node:timers/promises'
import { relock } from '../handle/device-lock.ts'
import type { Handle } from '../handle/handle.ts'
import { binding } from '../kernel/binding.ts'
import { GivenUp } from '../kernel/bounded.ts'
import { openDevice } from '../kernel/devnode.ts'
import { close, O_RDONLY } from '../kernel/files.ts'
import type { Detaching } from './detaching.ts'
import { clearAutoclear } from './release.ts'

/** Cancels the deferred detach, and has a plain descriptor in the place of the exclusive one. */
export async function takeBack(handle: Handle, autoclear: boolean): Promise<void> {
  if (!autoclear) await clearAutoclear(handle)
  const plain = await openDevice(handle.number, O_RDONLY, handle.bound)
  // No descriptor to be had: the exclusive one serves, and is better than none.
  if (plain < 0) throw handle.explain('open', plain)
  let answer: number
  try {
    answer = await handle.calls.dup3(plain, handle.descriptor)
  } finally {
    // Also where there was no time left for dup3.
    await close(plain)
  }
  if (answer < 0) throw handle.explain('dup3', answer)
  await relock(handle)
}

/** Milliseconds: a call that is not held up has come back by then. */
const SOON_MS = 100

/**
 * Runs what detaches. Where that is given up on, it is taken back when its call has come back; the handle's next operation
 * waits for that, and so does the caller for a moment.
 */
export async function takingBackLate(work: Detaching, run: () => Promise<void>): Promise<void> {
  try {
    await run()
  } catch (error) {
    if (error instanceof GivenUp && error.hasBegun) {
      const settled = settle(work, error.back)
      error.back = settled
      await waitAtMost(SOON_MS, settled)
    }
    throw error
  }
}

/** The timer keeps the process alive: nothing else does, and what the user waits for would never be told. */
async function waitAtMost(ms: number, settled: Promise<void>): Promise<void> {
  const over = new AbortController()
  const time = setTimeout(ms, undefined, { signal: over.signal }).catch(() => {})
  await Promise.race([settled, time])
  over.abort()
}

async function settle({ handle, autoclear }: Detaching, back: Promise<unknown>): Promise<void> {
  await back
  // It has succeeded late; or the handle was closed, and the detach is what is wanted.
  if (handle.descriptor < 0 || handle.isClosing || binding().blkSszGetSync(handle.descriptor) < 0) return
  try {
    await handle.takingBack(() => takeBack(handle, autoclear))
  } catch {
    // Whoever uses the handle next is told what is in its way.
  }
}
