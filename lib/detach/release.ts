/** release(): the attachment outlives the process. */

import { CHANGING, checkWait, type Wait } from '../common/deadline.ts'
import { lockOf } from '../handle/device-lock.ts'
import type { Handle, Info } from '../handle/handle.ts'
import { OF_DEVICE } from '../handle/open.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { decodeInfo, LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN, newInfo, patchInfo } from '../kernel/uapi.ts'

/** Keeps the attachment when this process ends, and closes the handle. Resolves to the device's path. */
export async function release(handle: Handle, options?: Wait): Promise<string> {
  const deadline = checkWait(options, CHANGING)
  // Nobody else would tell udev to look.
  await lockOf(handle)?.release()
  return handle.run(async () => {
    await clearAutoclear(handle)
    await handle.closeNow()
    return handle.path
  }, deadline)
}

/** LOOP_SET_STATUS64 with what was just read, without the flag. Works under a mount. */
export async function clearAutoclear(handle: Handle): Promise<void> {
  const { bytes, info } = await readOrRecall(handle)
  if ((info.flags & LO_FLAGS_AUTOCLEAR) === 0) return
  handle.assertOpen()
  patchInfo(bytes, { flags: info.flags & ~LO_FLAGS_AUTOCLEAR })
  const answer = await handle.write('loopSetStatus64', bytes)
  if (answer < 0) throw handle.explain('LOOP_SET_STATUS64', answer)
  await handle.renewDetach()
}

/** LOOP_GET_STATUS64; where the filesystem of the backing file is gone, which it asks, what else is known. */
async function readOrRecall(handle: Handle): Promise<Info> {
  const bytes = newInfo()
  const answer = await handle.calls.loopGetStatus64(handle.descriptor, bytes)
  const recalled = answer >= 0 || OF_DEVICE.has(-answer) ? undefined : recall(handle)
  if (recalled === undefined) return { bytes, info: handle.takeOver(bytes, answer) }
  handle.assertAttachment()
  return recalled
}

/**
 * What LOOP_SET_STATUS64 can change, as it is: from sysfs, and what sysfs does not have, `lo_file_name`, as it was last
 * seen. A handle that has never seen it loses it. Undefined where sysfs does not tell.
 */
function recall({ number, reference = '' }: Handle): Info | undefined {
  const [offset, sizeLimit] = [sysfs.readOffsetSync(number), sysfs.readSizeLimitSync(number)]
  if (offset === undefined || sizeLimit === undefined) return undefined
  const flags =
    (sysfs.readAutoclearSync(number) === true ? LO_FLAGS_AUTOCLEAR : 0) |
    (sysfs.isScannedSync(number) ? LO_FLAGS_PARTSCAN : 0)
  const bytes = patchInfo(newInfo(), { offset, sizeLimit, fileName: reference, flags })
  return { bytes, info: decodeInfo(bytes) }
}
