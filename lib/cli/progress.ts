/** A bar on a terminal for what takes long; nothing where nobody is watching. */

import type { Progress } from '../change/progress.ts'

/** Shows the phases of the operation on stderr, where that is a terminal. */
export async function withProgress<T>(
  operation: (onProgress: ((progress: Progress) => void) | undefined) => Promise<T>,
): Promise<T> {
  // The bar is drawn by moving the cursor, which a dumb terminal cannot do; it has no colours.
  if (!process.stderr.isTTY || process.env['TERM'] === 'dumb') return operation(undefined)
  // Loaded only here: most commands show no bar.
  const { SingleBar, Presets } = await import('cli-progress')
  const bar = new SingleBar(
    {
      format: '{phase} [{bar}] {percentage}% {rate}',
      stream: process.stderr,
      clearOnComplete: true,
      hideCursor: true,
    },
    Presets.legacy,
  )
  let started = false
  try {
    return await operation(({ phase, copied, total, bytesPerSecond }) => {
      const payload = { phase: phase.padEnd('verify'.length), rate: `${(bytesPerSecond / 2 ** 20).toFixed(0)} MiB/s` }
      if (!started) bar.start(total, 0, payload)
      started = true
      bar.update(copied, payload)
    })
  } finally {
    bar.stop()
  }
}
