/** Causes that several calls have in common. */

import {
  type Cause,
  describePrivileges,
  describeSandbox,
  inUserNamespace,
  isAdministrator,
  isGoing,
} from './evidence.ts'
import { adviseHolders, describeHolders } from './holders.ts'

const RUN_AS_ROOT = 'run as root or add CAP_SYS_ADMIN'

export const LEAVE_USER_NAMESPACE =
  'run it in the initial user namespace: as root, in a container without rootless mode and without a user namespace'

const ALLOW_CALLS = 'let the sandbox allow the ioctls of loop devices, in docker with --security-opt seccomp=PROFILE'

export const inUserNamespaceCause: Cause = {
  reason: 'permission',
  when: inUserNamespace,
  detail: 'a user namespace has no rights on the devices of the machine',
  hint: LEAVE_USER_NAMESPACE,
}

const notAdministrator: Cause = {
  reason: 'permission',
  when: () => !isAdministrator(),
  detail: describePrivileges,
  hint: RUN_AS_ROOT,
}

export const sandbox: Cause = { reason: 'permission', detail: describeSandbox, hint: ALLOW_CALLS }

/** Calls that want CAP_SYS_ADMIN, or a descriptor open for writing. */
export const notAllowed: Cause[] = [inUserNamespaceCause, notAdministrator, sandbox]

export const beingDetached: Cause = {
  reason: 'detaching',
  when: isGoing,
  detail: 'the device is being detached, and still held by another process',
  hint: 'wait until it is detached, or leave out the number to get another device',
}

export const inUse: Cause = {
  reason: 'in-use',
  detail: ({ holders }) => (holders?.length ? describeHolders(holders) : 'somebody else holds the device'),
  hint: ({ holders }) =>
    holders?.length ? adviseHolders(holders) : 'see who holds it with holders(), and end that use',
}
