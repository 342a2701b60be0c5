/** LOOP_CHANGE_FD: another file of the same content under a read-only device in use. */

import { type Backing, openBacking } from '../attach/backing.ts'
import { type BackingFile, checkBackingFile, checkBoolean, checkFunction, checkOptions } from '../common/arguments.ts'
import { checkDeadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { sizeDifference } from '../errors/evidence.ts'
import { type Handle, readSize } from '../handle/handle.ts'
import { onBackingDevice } from '../handle/lower.ts'
import { type LoopInfo64, visibleSize } from '../kernel/uapi.ts'
import { compareContents } from './compare.ts'
import { guardFilesystem } from './mounted-guard.ts'
import { type Progress, reporter } from './progress.ts'
import { CHANGE, letGo, openPresent, readChangeable, refuseOverlap, switchBackingFile } from './switch.ts'

export interface ChangeOptions {
  /** Compare the new file with the present one first; `content-differs` where they are not the same. Default false. */
  verify?: boolean | undefined
  /** Change it even under a mounted filesystem, which the kernel may shut down (K2). Default false. */
  force?: boolean | undefined
  /** Called at least once before the switch; an exception in it aborts and rejects. */
  onProgress?: ((progress: Progress) => void) | undefined
  /** Gives up and rejects with the signal's reason; without effect once the switch has begun. */
  signal?: AbortSignal | undefined
}

/** Everything checked before the ioctl; read back after it. */
export async function changeBackingFile(handle: Handle, file: BackingFile, options?: ChangeOptions): Promise<void> {
  const given = checkOptions(options, ['verify', 'force', 'onProgress', 'signal'])
  const argument = checkBackingFile(file)
  const verify = given.verify === undefined ? false : checkBoolean('verify', given.verify)
  const force = given.force === undefined ? false : checkBoolean('force', given.force)
  const onProgress = given.onProgress === undefined ? undefined : checkFunction('onProgress', given.onProgress)
  // It reads and compares as long as the file is long: only the signal ends it.
  const deadline = checkDeadline({ signal: given.signal }, Number.POSITIVE_INFINITY)
  return handle.run(async () => {
    deadline.throwIfAborted()
    await handle.readInfo()
    await onBackingDevice(handle, async (target) => {
      const info = await readChangeable(target)
      if (!force) await letGo(await guardFilesystem(target))
      const present = await openPresent(target, info)
      try {
        const backing = await openBacking(argument, true, deadline)
        try {
          const size = checkSize(target, info, backing)
          await refuseOverlap(target, backing, info)
          const report = reporter(size, onProgress)
          if (verify) {
            const candidate = { fd: backing.fd, path: backing.path, start: info.offset }
            const all = [{ start: 0n, end: size }]
            await compareContents(present, candidate, all, deadline, (done) => report('verify', done))
          }
          deadline.throwIfAborted()
          report('switch', size)
          await switchBackingFile(target, backing, present, force)
        } finally {
          await backing.close()
        }
      } finally {
        await present.close()
      }
    })
  }, deadline)
}
function checkSize(target: Handle, info: LoopInfo64, backing: Backing): bigint {
  const now = readSize(target)
  const then = visibleSize(backing.size, info.offset, info.sizeLimit)
  if (now !== then) {
    throw refusal('size-mismatch', 'ioctl', sizeDifference(now, then), {
      path: target.path,
      backingFile: backing.path,
      ioctl: CHANGE,
    })
  }
  return now
}
