/** release(): the attachment outlives the process. */

import { CHANGING, checkWait, type Wait } from '../common/deadline.ts'
import type { Handle } from '../handle/handle.ts'
import { LO_FLAGS_AUTOCLEAR, patchInfo } from '../kernel/uapi.ts'

/** Keeps the attachment when this process ends, and closes the handle. Resolves to the device's path. */
export async function release(handle: Handle, options?: Wait): Promise<string> {
  const deadline = checkWait(options, CHANGING)
  return handle.run(async () => {
    await clearAutoclear(handle)
    await handle.closeNow()
    return handle.path
  }, deadline)
}

/** LOOP_SET_STATUS64 with what was just read, without the flag. Works under a mount. */
export async function clearAutoclear(handle: Handle): Promise<void> {
  const { bytes, info } = await handle.readInfo()
  if ((info.flags & LO_FLAGS_AUTOCLEAR) === 0) return
  handle.assertOpen()
  patchInfo(bytes, { flags: info.flags & ~LO_FLAGS_AUTOCLEAR })
  const answer = await handle.write('loopSetStatus64', bytes)
  if (answer < 0) throw handle.explain('LOOP_SET_STATUS64', answer)
  await handle.renewDetach()
}
