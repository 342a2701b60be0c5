/**
 * Calls with an end for exit handlers, where no event loop runs: a thread of the addon makes the call, and the thread of
 * JavaScript waits for it, for so many milliseconds. What is given up on is left to its thread, as bounded.ts says. Other
 * calls to the same device or file that are stuck keep none of these from beginning.
 */

import { binding, type CallName, type Calls, NoThread } from './binding.ts'
import { type Asked, GivenUp, leaveToThread, whenUnstuck } from './bounded.ts'
import { wantsSingleCalls } from './observe-calls.ts'

/** A call that has come back, and is about to be told, is waited for so long. */
const TELLING_MS = 1_000

/**
 * Undefined where the call was given up on. Where no thread is to be had, the calling one makes it, and it has no end
 * then.
 */
export function callWithinSync<Name extends CallName>(
  ms: number,
  asked: Asked | undefined,
  name: Name,
  ...values: Calls[Name]
): number | undefined {
  const makeNow = () => (binding()[`${name}Sync`] as (...native: Calls[Name]) => number)(...values)
  if (wantsSingleCalls()) return makeNow()
  const call = binding()[name] as (...native: Calls[Name]) => Promise<number>
  try {
    return callBoundedSync(name, () => call(...values), ms, asked)
  } catch (error) {
    if (error instanceof NoThread) return makeNow()
    if (error instanceof GivenUp) return undefined
    throw error
  }
}

/** The descriptor is gone in any case: where the call does not come back in time, once it does. */
export function closeWithinSync(fd: number, ms: number): void {
  if (!leaveToThread(fd)) callWithinSync(ms, undefined, 'close', fd)
}

/**
 * Starts a call that is one hop, and waits for it. What it fills is filled when this returns; its promise settles after
 * that.
 *
 * @throws GivenUp, NoThread
 */
export function callBoundedSync<T>(name: string, start: () => Promise<T>, ms: number, asked: Asked | undefined): T {
  const { lastCallSync, waitSync, giveUpSync } = binding()
  const before = lastCallSync()
  const back = start().catch(() => {})
  const call = lastCallSync()
  if (call === before) throw new NoThread(`no thread is to be had for ${name}`)
  const answer = waitSync(call, ms)
  if (answer !== null) return answer as T
  switch (giveUpSync(call)) {
    case 0:
      return waitSync(call, TELLING_MS) as T
    case 1:
      throw new NoThread(`no thread was to be had in time for ${name}`)
    default:
      throw new GivenUp(name, asked, undefined, whenUnstuck(asked, back))
  }
}
