/** /dev/loop-control: devices found, made and removed. */

import { constants } from 'node:os'
import { backoff, type Deadline, tries } from '../common/deadline.ts'
import { explain } from '../errors/explain.ts'
import { findHolders } from '../errors/holders.ts'
import { type Bound, within } from '../kernel/bounded.ts'
import { CONTROL, devicePath, removeNode } from '../kernel/devnode.ts'
import { minorOfDevice } from '../kernel/features.ts'
import { O_RDWR, open, openSync } from '../kernel/files.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { removeNodesOfGone } from '../partitions/nodes.ts'

const { EBUSY, EEXIST, ENODEV } = constants.errno

/**
 * Opens /dev/loop-control; that loads the module where it is one, and only then takes time.
 *
 * @throws `no-loop-driver`, `permission`, `resources`
 */
export async function openControl(bound?: Bound): Promise<number> {
  const fd = sysfs.isControlThere() ? openSync(CONTROL, O_RDWR) : await open(CONTROL, O_RDWR, 0, bound)
  if (fd < 0) throw explain({ call: 'open', errno: fd, path: CONTROL }, 'open /dev/loop-control')
  return fd
}

/** LOOP_CTL_GET_FREE: reserves nothing; anybody can attach, or remove, the device the next moment. */
export async function getFree(control: number, bound?: Bound): Promise<number> {
  const number = await within(bound).loopCtlGetFree(control)
  if (number < 0) throw explain({ call: 'LOOP_CTL_GET_FREE', errno: number, path: CONTROL })
  return number
}

/**
 * LOOP_CTL_ADD: makes the device of that number, or one of the next unused number.
 *
 * @throws `device-exists`, `permission`, `resources`
 */
export async function addDevice(control: number, number?: number, bound?: Bound): Promise<number> {
  const answer = await within(bound).loopCtlAdd(control, number ?? -1)
  if (answer >= 0) return answer
  if (number === undefined && answer === -EEXIST) return addLowestUnused(control, bound)
  throw explain({
    call: 'LOOP_CTL_ADD',
    errno: answer,
    path: number === undefined ? CONTROL : devicePath(number),
    number,
  })
}

/** Kernels up to 5.13 answer EEXIST to "any number" as long as there is a free device. */
async function addLowestUnused(control: number, bound: Bound | undefined): Promise<number> {
  for (let candidate = 0; ; candidate++) {
    if (sysfs.deviceExists(candidate)) continue
    const answer = await within(bound).loopCtlAdd(control, candidate)
    if (answer >= 0) return answer
    if (answer !== -EEXIST) {
      throw explain({ call: 'LOOP_CTL_ADD', errno: answer, path: devicePath(candidate), number: candidate })
    }
  }
}

/**
 * LOOP_CTL_REMOVE: waits, until the deadline, for an opener to go and for a removal by another to end.
 *
 * @returns the number; the kernel says it up to 5.11 and 0 after that
 * @throws `in-use` (at once where it is attached), `no-such-device`, `permission`
 */
export async function removeDevice(control: number, number: number, deadline: Deadline): Promise<number> {
  // K3: left by an attachment that ended otherwise than by a detach. Whoever opens the device can have the kernel forget
  // them, but not their nodes.
  let partitions: readonly sysfs.KnownPartition[] = []
  for (let attempt = 1; ; attempt++) {
    deadline.throwIfAborted()
    if (sysfs.hasPartitions(number)) partitions = sysfs.readPartitions(number)
    const answer = await within(deadline.bound, number).loopCtlRemove(control, number)
    if (answer >= 0) {
      // In its own /dev the kernel has removed the one that it had made.
      if (!sysfs.deviceExists(number)) removeNode(devicePath(number), `7:${minorOfDevice(number)}`)
      removeNodesOfGone(number, partitions)
      return number
    }
    // ENODEV while it is still in sysfs: another's removal, or making, is under way.
    const isOpen = answer === -EBUSY && sysfs.isMounted() && !sysfs.isBound(number)
    const passes = isOpen || (answer === -ENODEV && sysfs.deviceExists(number))
    if (!passes || !(await deadline.pause(backoff(attempt)))) {
      throw explain({
        call: 'LOOP_CTL_REMOVE',
        errno: answer,
        path: devicePath(number),
        number,
        holders: isOpen ? await findHolders(number) : undefined,
        effort: tries(attempt, deadline),
      })
    }
  }
}
