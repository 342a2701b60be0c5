/** Errors of the public functions lead to the line that called them. */

import { isForeign, isFrame, limitStack, restoreStackLimit } from '../common/stack.ts'
import { LoopError } from './errors.ts'

/** This function, the public one, and two of the caller's: every frame more costs. */
const NOTED_FRAMES = 4

/**
 * Waits for the work of a public function, which calls this without awaiting anything before. V8 finds the caller by
 * itself only where the promise is awaited already when the error is made; where it is awaited later, is handled with
 * `catch`, or not at all, the frames that are noted here stand in.
 *
 * Noting them takes some two microseconds. The work is begun already: in most calls a thread is in the kernel by then.
 */
export async function fromCaller<T>(work: Promise<T>): Promise<T> {
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
  const frames = callers.split('\n').filter(isFrame).slice(1)
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
