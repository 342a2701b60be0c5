/**
 * The share of libuv's thread pool that loopctl takes: calls that can block for long (detach, change, remove; a
 * backing file on a dead server) must leave threads for the rest of the program's fs, dns and crypto.
 */

const slots = Math.max(1, Math.floor(countThreads(process.env['UV_THREADPOOL_SIZE']) / 2))

/** As libuv reads it: 4 where it is not set, 1 for what is no number, at most 1024. */
function countThreads(setting: string | undefined): number {
  if (setting === undefined) return 4
  const threads = Number.parseInt(setting, 10)
  return threads > 0 ? Math.min(threads, 1024) : 1
}

let running = 0
const waiting: (() => void)[] = []

/** Runs `start` when one of loopctl's slots is free; first come, first served. */
export async function onPool<T>(start: () => Promise<T>): Promise<T> {
  // A released slot is handed to the first waiter without being freed, so nobody overtakes.
  if (running < slots) running++
  else await new Promise<void>((resolve) => waiting.push(resolve))
  try {
    return await start()
  } finally {
    const next = waiting.shift()
    if (next) next()
    else running--
  }
}

/** Items that are worth a hop to the pool. */
const LEAST = 4

/**
 * Runs `work` on all of them, in as many lists as may run at once: where there are more, a thread waits for this one to
 * hand it the next.
 */
export function inBatches<Item, Result>(
  items: readonly Item[],
  work: (batch: readonly Item[]) => Promise<Result>,
): Promise<Result[]> {
  const size = Math.max(LEAST, Math.ceil(items.length / slots))
  const starts = Array.from({ length: Math.ceil(items.length / size) }, (_, i) => i * size)
  return Promise.all(starts.map((start) => work(items.slice(start, start + size))))
}

/** Calls that were given up and have not come back: each holds a thread. */
let stuck = 0

/**
 * {@link onPool} for what may never come back: undefined after `ms`. What has not begun by then never does, so that it
 * cannot act on what the caller has closed meanwhile; what has gives its slot back. While one is stuck no other is tried.
 */
export async function onPoolWithin<T>(ms: number, start: () => Promise<T>): Promise<T | undefined> {
  if (stuck > 0) return undefined
  let state: 'waiting' | 'running' | 'done' | 'late' = 'waiting'
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(() => {
      if (state === 'running') stuck++
      state = 'late'
      resolve(undefined)
    }, ms)
  })
  const run = async (): Promise<T> => {
    try {
      return await start()
    } finally {
      if (state === 'late') stuck--
      state = 'done'
    }
  }
  const answer = onPool<T | undefined>(() => {
    if (state === 'late') return late
    state = 'running'
    return Promise.race([run(), late])
  })
  try {
    return await Promise.race([answer, late])
  } finally {
    clearTimeout(timer)
  }
}
