/** Listening to AbortSignals, many at once to the same one. */

/** Who listens to each signal: one listener of ours each, since Node warns of many and removes them one by one. */
const listeners = new WeakMap<AbortSignal, Set<(reason: unknown) => void>>()

/** Calls back, once, when the signal is aborted. Returns how to be forgotten. */
export function onAbort(signal: AbortSignal | undefined, callback: (reason: unknown) => void): () => void {
  if (signal === undefined) return () => {}
  const known = listeners.get(signal) ?? new Set()
  if (known.size === 0) {
    listeners.set(signal, known)
    signal.addEventListener('abort', tellListeners, { once: true })
  }
  known.add(callback)
  return () => {
    if (known.delete(callback) && known.size === 0) {
      listeners.delete(signal)
      signal.removeEventListener('abort', tellListeners)
    }
  }
}

function tellListeners(event: Event): void {
  const signal = event.target as AbortSignal
  const known = listeners.get(signal)
  listeners.delete(signal)
  for (const callback of known ?? []) callback(signal.reason)
}
