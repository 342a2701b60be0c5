/**
 * What is asked of the kernel and what is decided, for whoever listens: `NODE_DEBUG=loopctl` prints it, and subscribers of
 * the diagnostics channel `loopctl:call` get it. Where nobody listens, a call costs one look at the channel more.
 */

import { describeArguments, format, nameOfCall, type TraceMessage } from './trace-format.ts'

const channel = process.getBuiltinModule('node:diagnostics_channel').channel('loopctl:call')

/** Whether anybody listens. */
export function isTraced(): boolean {
  return channel.hasSubscribers
}

/** Tells of a decision; the text is made only where somebody listens. */
export function decide(text: () => string): void {
  if (channel.hasSubscribers) publish({ type: 'decision', text: text() })
}

/** Tells of a call that has been made. */
export function traceCall(name: string, values: readonly unknown[], answer: unknown, microseconds: number): void {
  const value = numberOf(answer)
  publish({
    type: 'call',
    call: nameOfCall(name),
    arguments: describeArguments(name, values, value),
    answer: value,
    ...(value < 0 && { code: process.getBuiltinModule('node:util').getSystemErrorName(value) }),
    microseconds: Math.round(microseconds * 10) / 10,
  })
}

/** Makes the call, and tells of it when it has come back. */
export function traced<Result>(name: string, values: readonly unknown[], call: () => Result): Result {
  const start = performance.now()
  const tell = (answer: unknown) => traceCall(name, values, answer, (performance.now() - start) * 1000)
  let result: Result
  try {
    result = call()
  } catch (error) {
    // Of node:fs; what the addon throws is no answer of the kernel.
    const { errno } = error as NodeJS.ErrnoException
    if (errno !== undefined) tell(errno)
    throw error
  }
  if (result instanceof Promise) result.then(tell, () => {})
  else tell(result)
  return result
}

function publish(message: TraceMessage): void {
  channel.publish(message)
}

function numberOf(answer: unknown): number {
  if (typeof answer === 'number') return answer
  if (typeof answer === 'boolean') return answer ? 1 : 0
  return typeof answer === 'string' || answer instanceof Uint8Array || Array.isArray(answer) ? answer.length : 0
}

function printOnDemand(): void {
  // Looked at here too, since node:util takes a while to load.
  if (process.env['NODE_DEBUG'] === undefined) return
  const log = process.getBuiltinModule('node:util').debuglog('loopctl')
  if (log.enabled) channel.subscribe((message) => log('%s', format(message as TraceMessage)))
}

printOnDemand()
