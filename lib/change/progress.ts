import type { Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'

/** How far a change or a migration has come. */
export interface Progress {
  phase: 'copy' | 'flush' | 'verify' | 'switch'
  /** Bytes that this phase has done. */
  copied: number
  /** Bytes that this phase has to do; more than 0. */
  total: number
  bytesPerSecond: number
}

/** Makes the caller's progress of phases and bytes; the time counts from here. */
export function reporter(
  size: bigint,
  onProgress: ((progress: Progress) => void) | undefined,
): (phase: Progress['phase'], done: bigint) => void {
  const start = performance.now()
  const total = Number(size)
  return (phase, done) => {
    if (total === 0) return
    const seconds = (performance.now() - start) / 1000
    const copied = Number(done)
    onProgress?.({ phase, copied, total, bytesPerSecond: seconds > 0 ? copied / seconds : 0 })
  }
}

/** @throws the signal's reason; `timeout` */
export function assertNotOver(deadline: Deadline, path: string): void {
  deadline.throwIfAborted()
  if (!deadline.isOver) return
  throw refusal('timeout', 'ioctl', `not done after ${deadline.waited} ms`, {
    path,
    hint: 'a longer timeout, or none; nothing was changed',
  })
}
