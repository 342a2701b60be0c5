/** Filesystems that another process or machine serves: they can stop to answer, and be gone while files of them are used. */

import { readMountsSync } from './mountinfo.ts'
import { formatDevice } from './uapi.ts'

const SERVED = /^(?:fuse(?:blk)?(?:\..*)?|nfs4?|cifs|smb3|9p|ceph|afs|gfs2|ocfs2|lustre|virtiofs|vboxsf|vmhgfs)$/

/** By the device number of the filesystem, which costs a look at the mount table the first time. */
const known = new Map<bigint, boolean>()

/** Whether the filesystem is such a one; false where it is not in this mount namespace. */
export function isServed(device: bigint): boolean {
  let served = known.get(device)
  if (served === undefined) {
    const name = formatDevice(device)
    served = readMountsSync().some((mount) => mount.device === name && SERVED.test(mount.fsType))
    known.set(device, served)
  }
  return served
}
