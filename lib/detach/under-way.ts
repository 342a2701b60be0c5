/** How many detaches of this process are under way: attaches wait for them, or descriptors run out. */

let underWay = 0
const waiting = new Set<() => void>()

/** Detaches that may be under way before an attach begins. Each needs two descriptors for a moment. */
const MOST = 16

export function areManyUnderWay(): boolean {
  return underWay >= MOST
}

/** Calls back, once, when there are fewer. */
export function whenFewerAreUnderWay(callback: () => void): void {
  waiting.add(callback)
}

/** Counts the operation for as long as it takes. */
export async function countUnderWay<T>(operation: () => Promise<T>): Promise<T> {
  underWay++
  try {
    return await operation()
  } finally {
    underWay--
    if (!areManyUnderWay()) {
      const callbacks = [...waiting]
      waiting.clear()
      for (const callback of callbacks) callback()
    }
  }
}
