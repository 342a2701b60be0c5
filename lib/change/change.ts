/** LOOP_CHANGE_FD: another file of the same content under a read-only device in use. */

import { type Backing, openBacking } from '../attach/backing.ts'
import {
  type BackingFile,
  checkBackingFile,
  checkBoolean,
  checkFunction,
  checkOptions,
  wrongValue,
} from '../common/arguments.ts'
import { checkDeadline, type Wait } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { sizeDifference } from '../errors/evidence.ts'
import type { Handle } from '../handle/handle.ts'
import { onBackingDevice } from '../handle/lower.ts'
import { visibleSize } from '../kernel/uapi.ts'
import { compareContents } from './compare.ts'
import { guardFilesystem } from './mounted-guard.ts'
import { CHANGE, refuseOverlap } from './overlap.ts'
import { assertNotOver, type Progress, reporter } from './progress.ts'
import { letGo, openPresent, readChangeable, type Shown, switchBackingFile } from './switch.ts'

export interface ChangeOptions extends Wait {
  /** Compare the new file with the present one first; `content-differs` where they are not the same. Default false. */
  verify?: boolean | undefined
  /** Change it even under a mounted filesystem, which the kernel may shut down (K2). Default false. */
  force?: boolean | undefined
  /**
   * `refuse`, the default: `overlap` where another loop device that can write has the new file, or for `migrate` the file
   * that is to be replaced is attached or in use as swap. `allow`: nothing of that is looked at.
   */
  overlap?: 'refuse' | 'allow' | undefined
  /** Called at least once before the switch; an exception in it aborts and rejects. */
  onProgress?: ((progress: Progress) => void) | undefined
  /** Gives up and rejects with the signal's reason; without effect once the switch has begun. */
  signal?: AbortSignal | undefined
  /** Milliseconds for all that comes before the switch; 0, the default: none. */
  timeout?: number | undefined
}

/** The options that a change has in common with a migration, checked and complete but for `verify`. */
export interface Checked {
  force: boolean
  overlap: 'refuse' | 'allow'
  onProgress: ((progress: Progress) => void) | undefined
}

export function checkChange({ force, overlap, onProgress }: ChangeOptions): Checked {
  if (overlap !== undefined && overlap !== 'refuse' && overlap !== 'allow') {
    throw wrongValue('overlap', "must be 'refuse' or 'allow'")
  }
  return {
    force: force === undefined ? false : checkBoolean('force', force),
    overlap: overlap ?? 'refuse',
    onProgress: onProgress === undefined ? undefined : checkFunction('onProgress', onProgress),
  }
}

/** The names of {@link ChangeOptions}. */
export const CHANGE_OPTIONS = ['verify', 'force', 'overlap', 'onProgress', 'signal', 'timeout'] as const

/** Everything checked before the ioctl; read back after it. */
export async function changeBackingFile(handle: Handle, file: BackingFile, options?: ChangeOptions): Promise<void> {
  const given = checkOptions(options, CHANGE_OPTIONS)
  const argument = checkBackingFile(file)
  const verify = given.verify === undefined ? false : checkBoolean('verify', given.verify)
  const { force, overlap, onProgress } = checkChange(given)
  // It reads and compares as long as the file is long.
  const deadline = checkDeadline(given, Number.POSITIVE_INFINITY)
  return handle.run(async () => {
    assertNotOver(deadline, handle.path)
    await handle.readInfo()
    await onBackingDevice(handle, async (target) => {
      const shown = await readChangeable(target)
      if (!force) await letGo(await guardFilesystem(target))
      const present = await openPresent(target, shown)
      try {
        const backing = await openBacking(argument, true, deadline)
        try {
          checkSize(target, shown, backing)
          if (overlap === 'refuse') await refuseOverlap(target, backing, shown.info)
          const { size } = shown
          const report = reporter(size, onProgress)
          if (verify) {
            const candidate = { fd: backing.fd, path: backing.path, start: shown.info.offset }
            const everything = !present.isFile
            await compareContents(present, candidate, { size, everything }, deadline, (done) => report('verify', done))
          }
          assertNotOver(deadline, target.path)
          report('switch', size)
          await switchBackingFile(target, { backing, present, shown, force, overlap })
        } finally {
          await backing.close()
        }
      } finally {
        await present.close()
      }
    })
  })
}

function checkSize(target: Handle, { info, size }: Shown, backing: Backing): void {
  const then = visibleSize(backing.size, info.offset, info.sizeLimit)
  if (size === then) return
  throw refusal('size-mismatch', 'ioctl', sizeDifference(size, then), {
    path: target.path,
    backingFile: backing.path,
    ioctl: CHANGE,
  })
}
