/** Errors of the public functions lead to the line that called them. */

import { isForeign, isFrame, limitStack, restoreStackLimit } from '../common/stack.ts'
import { isTraced } from '../kernel/trace.ts'
import { LoopError } from './errors.ts'

/** The function that notes, this one, the public one, and two of the caller's. */
const NOTED_FRAMES = 5

/**
 * To be called with the work of a public function, before anything is awaited there.
 *
 * V8 finds the caller by itself, at no cost, as long as each function on the way
 * awaits the next one, and the caller has awaited the promise already. Where it awaits later, or not at all, its frames
 * have to be noted at the call, which takes some microseconds: only while somebody listens to what loopctl does.
 */
export function fromCaller<T>(work: Promise<T>): Promise<T> {
  return isTraced() ? noting(work) : work
}

async function noting<T>(work: Promise<T>): Promise<T> {
  const before = limitStack(NOTED_FRAMES)
  const noted = new Error('called here')
  restoreStackLimit(before)
  try {
    return await work
  } catch (error) {
    if (error instanceof LoopError) showCaller(error, noted)
    throw error
  }
}

/** Puts the frames of the public function and of its caller after those of this library, unless the caller is there. */
function showCaller(error: LoopError, noted: Error): void {
  // Where Error.prepareStackTrace is somebody else's, a stack can be anything.
  const { stack } = error as { stack?: unknown }
  const { stack: callers } = noted as { stack?: unknown }
  if (typeof stack !== 'string' || typeof callers !== 'string') return
  const frames = callers.split('\n').filter(isFrame).slice(2)
  const caller = frames.find(isForeign)
  const lines = stack.split('\n')
  if (caller === undefined || lines.some((line) => isFrame(line) && lineOf(line) === lineOf(caller))) return
  const own = lines.findIndex((line) => isFrame(line) && isForeign(line))
  lines.splice(own < 0 ? lines.length : own, 0, ...frames)
  error.stack = lines.join('\n')
}

/** `/srv/app.js:7` of `    at async main (file:///srv/app.js:7:3)`. */
function lineOf(frame: string): string {
  return /([^\s(]+:\d+):\d+\)?$/.exec(frame)?.[1] ?? frame
}
