/** Why the kernel did not mount or unmount. What a filesystem says of its superblock is not here: lib/mount/refused.ts. */

import { type Cause, describePrivileges } from './evidence.ts'
import { inUse, notAllowed } from './causes-shared.ts'

const notMounted: Cause[] = [{ reason: 'not-mounted', detail: 'nothing is mounted there' }]

const noMountApi: Cause[] = [
  { reason: 'unsupported-kernel', detail: 'the kernel, or a sandbox in its place, does not know the mount API (5.2)' },
]

/** Per call or role, per errno. */
export const MOUNT_CAUSES: Record<string, Record<string, Cause[]>> = {
  fsopen: { EPERM: notAllowed, EACCES: notAllowed, ENOSYS: noMountApi },
  fsconfig: { EPERM: notAllowed },
  fsmount: { EPERM: notAllowed, EACCES: notAllowed },
  move_mount: {
    EPERM: notAllowed,
    EACCES: notAllowed,
    ENOTDIR: [{ reason: 'target', detail: 'it is not a folder, and a filesystem can only be mounted on a folder' }],
    ENOENT: [{ reason: 'target', detail: 'the folder was removed' }],
    ELOOP: [{ reason: 'target', detail: 'the folder is in the filesystem that is to be mounted on it' }],
    EINVAL: [{ reason: 'target', detail: 'the kernel says that the folder does not belong to this mount namespace' }],
  },
  umount2: { EPERM: notAllowed, EBUSY: [inUse], EINVAL: notMounted, ENOENT: notMounted, ENOTDIR: notMounted },
  target: {
    ENOENT: [{ reason: 'target', detail: 'there is no such folder', hint: 'make it, or mount with makeTarget: true' }],
    ENOTDIR: [{ reason: 'target', detail: 'a part of the path is not a folder' }],
    ELOOP: [{ reason: 'target', detail: 'there are too many symbolic links' }],
    ENAMETOOLONG: [{ reason: 'target' }],
    EROFS: [{ reason: 'target', detail: 'the filesystem there is read-only' }],
    EACCES: [
      { reason: 'permission', detail: () => `this process may not find or make the folder: ${describePrivileges()}` },
    ],
    EPERM: [
      { reason: 'permission', detail: () => `this process may not find or make the folder: ${describePrivileges()}` },
    ],
  },
}
