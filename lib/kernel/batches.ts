/** Work on many things, in as many lists as there are processors. */

import { availableParallelism } from 'node:os'

/** Items that are worth a hop to a thread. */
const LEAST = 4

/** More lists than that gain nothing: sysfs has locks of its own. */
const MOST = 8

/** Runs `work` on all of the items, in lists of consecutive ones that are worked on at the same time. */
export function inBatches<Item, Result>(
  items: readonly Item[],
  work: (batch: readonly Item[]) => Promise<Result>,
): Promise<Result[]> {
  const lists = Math.min(MOST, Math.max(2, availableParallelism()))
  const size = Math.max(LEAST, Math.ceil(items.length / lists))
  const starts = Array.from({ length: Math.ceil(items.length / size) }, (_, i) => i * size)
  return Promise.all(starts.map((start) => work(items.slice(start, start + size))))
}
