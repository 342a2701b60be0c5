/** flock(2) on the whole device: udev's rule for block devices, by which it leaves them alone meanwhile. */

import { constants } from 'node:os'
import { backoff, CHANGING, Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { fromCaller } from '../errors/from-caller.ts'
import { binding } from '../kernel/binding.ts'
import { openDevice } from '../kernel/devnode.ts'
import { close, O_RDWR } from '../kernel/files.ts'
import type { Handle } from './handle.ts'

const { EAGAIN } = constants.errno
export const LOCK_EX = 2
export const LOCK_NB = 4
const LOCK_UN = 8

/** Of each handle that has one: the lock is on its own descriptor. */
const locks = new WeakMap<Handle, DeviceLock>()

/**
 * The lock of a device. `await using` releases it.
 */
export class DeviceLock implements AsyncDisposable {
  readonly #handle: Handle

  /** @hidden */
  constructor(handle: Handle) {
    this.#handle = handle
  }

  /**
   * Releases the lock, and makes udev look at the device: opens the device for writing and closes it, which udev
   * notices. Idempotent. After detach or close there is nothing to release.
   */
  async release(): Promise<void> {
    const handle = this.#handle
    if (locks.get(handle) !== this) return
    locks.delete(handle)
    if (handle.isClosing) return
    const unlocked = handle.run(async () => {
      const answer = binding().flockSync(handle.descriptor, LOCK_UN)
      if (answer < 0) throw handle.explain('flock', answer)
      // Where it is mounted and must not be written meanwhile, udev has no need to look.
      const fd = await openDevice(handle.number, O_RDWR, handle.bound)
      if (fd >= 0) await close(fd, handle.bound)
    }, new Deadline(CHANGING))
    await fromCaller(unlocked)
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.release()
  }
}

/** The lock that the handle has already. */
export function lockOf(handle: Handle): DeviceLock | undefined {
  return locks.get(handle)
}

/**
 * Waits for the lock; each try is an operation of the handle, so that others can pass between them. A handle that has it
 * already gets the same one again.
 *
 * @throws `timeout` where another process keeps it, `closed`
 */
export async function lockDevice(handle: Handle, deadline: Deadline): Promise<DeviceLock> {
  for (let attempt = 1; ; attempt++) {
    deadline.throwIfAborted()
    const answer = await handle.run(async () => binding().flockSync(handle.descriptor, LOCK_EX | LOCK_NB), deadline)
    if (answer >= 0) break
    if (answer !== -EAGAIN) throw explain(handle.failure('flock', answer))
    if (await deadline.pause(backoff(attempt))) continue
    throw refusal('timeout', 'flock', `another process has locked it (${attempt} attempts in ${deadline.waited} ms)`, {
      path: handle.path,
      hint: 'wait for it: udev lets go of a device in a moment, and a tool that partitions it when that is done',
    })
  }
  const lock = locks.get(handle) ?? new DeviceLock(handle)
  locks.set(handle, lock)
  return lock
}

/** Milliseconds for which the lock is waited for when it has to be taken again. */
const AGAIN_MS = 250

/**
 * Takes the lock again, where the handle had it: it belongs to the open file, and the handle's descriptor has become
 * another one. Who has got it meanwhile, udev, say, is waited for a moment; after that the handle has no lock.
 */
export async function relock(handle: Handle): Promise<void> {
  if (!locks.has(handle)) return
  const patience = new Deadline(AGAIN_MS)
  for (let attempt = 1; ; attempt++) {
    const answer = binding().flockSync(handle.descriptor, LOCK_EX | LOCK_NB)
    if (answer >= 0) return
    if (answer === -EAGAIN && (await patience.pause(backoff(attempt)))) continue
    locks.delete(handle)
    return
  }
}
