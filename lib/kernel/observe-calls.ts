/** Where a test can stand between this library and the kernel: every call through the addon and node:fs passes here. */

import { isTraced, traced } from './trace.ts'

let observer: ((call: string) => void) | undefined
let inSequences = false

/**
 * Called with the call's name before it is made. Calls of a sequence are then made one by one; with `inSequences` they
 * are made as without a test, and told when they have been. For tests.
 */
export function observe(onCall: ((call: string) => void) | undefined, options?: { inSequences: boolean }): void {
  observer = onCall
  inSequences = options?.inSequences ?? false
}

export function isObserved(): boolean {
  return observer !== undefined
}

/** Whether somebody wants to stand between the calls of a sequence. */
export function wantsSingleCalls(): boolean {
  return observer !== undefined && !inSequences
}

export function tell(name: string): void {
  observer?.(name)
}

export function observed<Values extends unknown[], Result>(
  name: string,
  call: (...values: Values) => Result,
): (...values: Values) => Result {
  return (...values) => {
    tell(name)
    return isTraced() ? traced(name, values, () => call(...values)) : call(...values)
  }
}
