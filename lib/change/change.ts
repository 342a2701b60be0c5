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
import { checkDeadline, type Deadline, type Wait } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { sizeDifference } from '../errors/evidence.ts'
import { cleaningUp } from '../errors/given-up.ts'
import type { Handle } from '../handle/handle.ts'
import { onBackingDevice } from '../handle/lower.ts'
import { closeSoon } from '../kernel/files.ts'
import { visibleSize } from '../kernel/uapi.ts'
import { compareContents } from './compare.ts'
import { guardFilesystem } from './mounted-guard.ts'
import { CHANGE, refuseOverlap } from './overlap.ts'
import { assertNotOver, type Progress, reporter } from './progress.ts'
import { openPresent, readChangeable, type Shown, switchBackingFile, switching } from './switch.ts'

export interface ChangeOptions extends Wait {
  /** Compares the new file with the present one first; rejects with `content-differs` if they differ. Default false. */
  verify?: boolean | undefined
  /** Changes the file even under a mounted filesystem, which the kernel may then shut down (K2). Default false. */
  force?: boolean | undefined
  /**
   * `'refuse'`, the default: rejects with `overlap` if a writable loop device has the new file, or, for `migrate`, if
   * the file that would be replaced is attached or used as swap. `'allow'`: does not check.
   */
  overlap?: 'refuse' | 'allow' | undefined
  /** Called at least once before the switch. If it throws, the change is given up, and the call rejects. */
  onProgress?: ((progress: Progress) => void) | undefined
  /** When it is aborted, the call rejects with the signal's reason. It has no effect after the switch has begun. */
  signal?: AbortSignal | undefined
  /**
   * Milliseconds for the whole call, also if the kernel does not answer; 0, the default: no limit. If the time is up
   * after the switch has begun, the error says that the outcome is not known.
   */
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
  const deadline = checkChangeDeadline(given)
  return handle.run(async () => {
    assertNotOver(deadline, handle.path)
    await handle.readInfo()
    await onBackingDevice(handle, async (target) => {
      const shown = await readChangeable(target)
      if (!force) await closeSoon(await guardFilesystem(target))
      const present = await openPresent(target, shown)
      const compareAndSwitch = async (backing: Backing) => {
        checkSize(target, shown, backing)
        if (overlap === 'refuse') await refuseOverlap(target, backing, shown.info)
        const { size } = shown
        const report = reporter(size, onProgress)
        if (verify) {
          const candidate = { fd: backing.fd, path: backing.path, asked: backing.path, start: shown.info.offset }
          const everything = !present.isFile
          await compareContents(present, candidate, { size, everything }, deadline, (done) => report('verify', done))
        }
        assertNotOver(deadline, target.path)
        await switching(deadline, async () => {
          report('switch', size)
          await switchBackingFile(target, { backing, present, shown, force, overlap })
        })
      }
      const withBacking = async () => {
        const backing = await openBacking(argument, true, deadline)
        await cleaningUp(
          () => compareAndSwitch(backing),
          () => backing.close(),
        )
      }
      await cleaningUp(withBacking, () => present.close())
    })
  }, deadline)
}

/** It reads and compares as long as the file is long. */
export function checkChangeDeadline(given: ChangeOptions): Deadline {
  const deadline = checkDeadline(given, Number.POSITIVE_INFINITY)
  return deadline.isOneTry ? checkDeadline({ signal: given.signal }, Number.POSITIVE_INFINITY) : deadline
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
