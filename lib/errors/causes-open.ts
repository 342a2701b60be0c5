/** Why a file or a node could not be opened or made. */

import { constants } from 'node:os'
import {
  canMakeNodes,
  type Cause,
  describeNodeOf,
  describePrivileges,
  inUserNamespace,
  isDriverLoaded,
  isThere,
  nodeNumbersOf,
  nodevMount,
  overridesModes,
} from './evidence.ts'
import { LEAVE_USER_NAMESPACE, inUserNamespaceCause, beingDetached, inUse } from './causes-shared.ts'

const ALLOW_DEVICES =
  "allow the devices: docker run --device-cgroup-rule 'b 7:* rmw' --device-cgroup-rule 'b 259:* rmw' --device-cgroup-rule 'c 10:237 rwm'"
const ALLOW_MKNOD =
  "let the container make nodes: docker or podman run --cap-add MKNOD --device-cgroup-rule 'b 7:* rmw' --device-cgroup-rule 'b 259:* rmw'; Kubernetes: securityContext.capabilities.add: [MKNOD]"

const LOAD_DRIVER = 'load the module (modprobe loop); in a container, pass the node in: --device /dev/loop-control'

/** The kernel's own order: the mount, the node's mode, the device cgroup, a security module. */
const openRefused: Cause[] = [
  {
    reason: 'permission',
    when: ({ errno }) => errno === -constants.errno.EPERM,
    detail: 'the device cgroup of this process denies it',
    hint: ALLOW_DEVICES,
  },
  {
    reason: 'permission',
    when: (failure) => nodevMount(failure) !== undefined,
    detail: (failure) => `${nodevMount(failure)} is mounted nodev`,
    hint: (failure) => `mount it without nodev: mount -o remount,dev ${nodevMount(failure)}`,
  },
  inUserNamespaceCause,
  {
    reason: 'permission',
    when: overridesModes,
    detail: 'a security module (AppArmor, SELinux) denies it',
    hint: 'let its profile allow the node, in docker with --security-opt apparmor=PROFILE',
  },
  {
    reason: 'permission',
    detail: () => `the node's mode denies it: ${describePrivileges()}`,
    hint: 'run as root, or as a member of the group that the node belongs to',
  },
]

/** Per role, per errno. */
export const OPEN_CAUSES: Record<string, Record<string, Cause[]>> = {
  'open /dev/loop-control': {
    EACCES: openRefused,
    EPERM: openRefused,
    ENOENT: [
      {
        reason: 'node-missing',
        when: isDriverLoaded,
        detail: 'the kernel has the loop driver, but /dev has no node for it',
        hint: 'in a container, pass the node in: --device /dev/loop-control; elsewhere: mknod /dev/loop-control c 10 237',
      },
      { reason: 'no-loop-driver', detail: 'there is no such node', hint: LOAD_DRIVER },
    ],
    ENODEV: [
      { reason: 'no-loop-driver', detail: 'the kernel has no loop driver and could not load one', hint: LOAD_DRIVER },
    ],
    ENXIO: [
      { reason: 'no-loop-driver', detail: 'the kernel has no loop driver and could not load one', hint: LOAD_DRIVER },
    ],
  },
  'open device': {
    EACCES: openRefused,
    EPERM: openRefused,
    ENOENT: [
      {
        reason: 'node-missing',
        when: isThere,
        detail: 'the kernel has the device, but /dev has no node for it',
        hint: (failure) =>
          `make the node: mknod ${failure.path} b ${nodeNumbersOf(failure)}; attach() makes it if it is allowed to`,
      },
      { reason: 'no-such-device', detail: 'there is no such device' },
    ],
    ENXIO: [
      beingDetached,
      { reason: 'no-such-device', detail: 'the node is there, but the kernel has no such device' },
    ],
    EBUSY: [inUse],
    ENOTTY: [
      {
        reason: 'not-a-loop-device',
        detail: describeNodeOf,
        hint: (failure) => `it should be b ${nodeNumbersOf(failure)}`,
      },
    ],
  },
  'make node': {
    EPERM: [
      {
        reason: 'node-missing',
        when: inUserNamespace,
        detail: 'this /dev has no node for it, and root of a user namespace can make none',
        hint: LEAVE_USER_NAMESPACE,
      },
      {
        reason: 'node-missing',
        when: () => !canMakeNodes(),
        detail: 'this /dev has no node for it, and making one needs CAP_MKNOD',
        hint: ALLOW_MKNOD,
      },
      {
        reason: 'node-missing',
        detail: 'this /dev has no node for it, and the device cgroup denies making one',
        hint: ALLOW_DEVICES,
      },
    ],
    EACCES: [
      {
        reason: 'node-missing',
        detail: () => `this /dev has no node for it, and this process may not make one: ${describePrivileges()}`,
        hint: ALLOW_MKNOD,
      },
    ],
    EROFS: [
      {
        reason: 'node-missing',
        detail: 'this /dev has no node for it, and is read-only',
        hint: (failure) => `make the node where /dev comes from: mknod ${failure.path} b ${nodeNumbersOf(failure)}`,
      },
    ],
  },
  'open backing file': {
    ENOENT: [{ reason: 'no-such-file' }],
    ENOTDIR: [{ reason: 'no-such-file' }],
    ELOOP: [{ reason: 'no-such-file' }],
    ENAMETOOLONG: [{ reason: 'no-such-file' }],
    EACCES: [{ reason: 'permission', detail: () => `this process may not open the file: ${describePrivileges()}` }],
    EPERM: [{ reason: 'permission', detail: () => `this process may not open the file: ${describePrivileges()}` }],
    EISDIR: [{ reason: 'not-a-file-or-block-device' }],
    EBUSY: [
      {
        reason: 'in-use',
        detail: 'the block device is mounted or held otherwise',
        hint: 'unmount it first, or attach with readOnly: true',
      },
    ],
    ENXIO: [{ reason: 'not-a-file-or-block-device', detail: 'there is no device behind the node' }],
  },
  'create destination': {
    ENOENT: [{ reason: 'no-such-file', detail: 'the folder does not exist' }],
    ENOTDIR: [{ reason: 'no-such-file' }],
    ENAMETOOLONG: [{ reason: 'no-such-file' }],
    ELOOP: [{ reason: 'no-such-file' }],
    EROFS: [{ reason: 'permission', detail: 'the filesystem is mounted read-only' }],
    EACCES: [{ reason: 'permission', detail: () => `this process may not make the file: ${describePrivileges()}` }],
    EPERM: [{ reason: 'permission', detail: () => `this process may not make the file: ${describePrivileges()}` }],
    EEXIST: [{ reason: 'destination-exists' }],
    EDQUOT: [{ reason: 'no-space' }],
    EFBIG: [{ reason: 'no-space', detail: 'the filesystem cannot hold a file of that size' }],
    EOPNOTSUPP: [
      {
        reason: 'unsupported-kernel',
        detail: 'the filesystem of the file cannot reserve blocks',
        hint: 'do not reserve blocks: the file is then sparse',
      },
    ],
  },
  // Used only where the same file can be opened for reading.
  'open backing file for writing': Object.fromEntries(
    ['EACCES', 'EPERM', 'EROFS', 'ETXTBSY'].map((code) => [
      code,
      [
        {
          reason: 'backing-not-writable' as const,
          detail: 'cannot be opened for writing',
          hint: 'it can be read: attach with readOnly: true, or make it writable',
        },
      ],
    ]),
  ),
}
