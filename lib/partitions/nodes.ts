/** The nodes of partitions in /dev: waited for, made where they are missing, removed where the partition is gone. */

import { constants } from 'node:os'
import { backoff, Deadline } from '../common/deadline.ts'
import { refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import type { Handle } from '../handle/handle.ts'
import { checkNode, devicePath, isDevKernels, isStaleNode, makeNode, removeNode } from '../kernel/devnode.ts'
import { close, O_RDONLY, open, unlinkSync } from '../kernel/files.ts'
import { isUdevRunning } from '../kernel/system.ts'
import * as sysfs from '../kernel/sysfs.ts'
import type { KnownPartition } from '../kernel/sysfs.ts'

const { EACCES, EEXIST, ENOENT, ENOTTY, EPERM } = constants.errno

/** Those of partitions that are not there any more. In its own /dev the kernel has removed those that it had made. */
export function removeNodesOfGone(number: number, partitions: readonly KnownPartition[]): void {
  if (partitions.length === 0) return
  const known = sysfs.readPartitions(number)
  for (const { path, device } of partitions) {
    if (!known.some((partition) => partition.device === device)) removeNode(path, device)
  }
}

/** How long the set has to stay the same where udev is there: its own look makes the kernel scan again (K4). */
const QUIET_MS = 50

/** After so long a node that is missing in the kernel's own /dev is not going to come. */
const LOST_MS = 100

/**
 * Waits until each partition that the kernel knows has its node, and their set is stable (K4, seen from 5.10 to 7.2).
 * Makes the nodes where the kernel does not look after /dev, and those that somebody has removed from its own.
 *
 * @throws `node-missing`, `not-a-loop-device` where there is something else at the path of a node
 */
export async function settlePartitions({ number, createNode }: Handle, deadline: Deadline): Promise<void> {
  const quiet = isUdevRunning() ? QUIET_MS : 0
  let last: string | undefined
  let since = 0
  for (let attempt = 1; ; attempt++) {
    const known = sysfs.readPartitions(number)
    const [now, seen] = [performance.now(), JSON.stringify(known)]
    if (seen !== last) [last, since] = [seen, now]
    const lacking: KnownPartition[] = []
    // In its own /dev the kernel makes it, a moment after the partition: only then somebody has removed it.
    const makes = createNode && (!isDevKernels() || now - since >= LOST_MS || deadline.left === 0)
    for (const partition of known) if (!(await hasNode(partition, makes))) lacking.push(partition)
    const [first] = lacking
    const isSteady = first === undefined && JSON.stringify(sysfs.readPartitions(number)) === seen
    if (isSteady && now - since >= quiet) return assertOpen(known, number)
    if (await deadline.pause(backoff(attempt))) continue
    if (isSteady) return assertOpen(known, number)
    if (first === undefined) {
      throw refusal('timeout', 'open', 'the partitions come and go', { path: devicePath(number) })
    }
    throw explain({ call: 'open', errno: -ENOENT, path: first.path, number, node: first.device }, 'open device')
  }
}

/** A device cgroup lets a node be made that it then does not let be opened. The kernel's own /dev needs no proof. */
async function assertOpen(partitions: readonly KnownPartition[], number: number): Promise<void> {
  if (isDevKernels()) return
  for (const { path, device } of partitions) {
    const fd = await open(path, O_RDONLY)
    if (fd >= 0) await close(fd)
    else if (fd === -EPERM || fd === -EACCES) {
      throw explain({ call: 'open', errno: fd, path, number, node: device }, 'open device')
    }
  }
}

/** Whether the partition has its node, made here where need be. */
async function hasNode({ path, device }: KnownPartition, makes: boolean): Promise<boolean> {
  const state = checkNode(path, device)
  if (state === 0) return true
  if (!makes) return false
  // Minors of partitions are given out anew each time: this one is of a partition that was there before.
  if (state === -ENOTTY && isStaleNode(path)) unlinkSync(path)
  const made = await makeNode(path, device)
  if (made >= 0 || (made === -EEXIST && checkNode(path, device) === 0)) return true
  if (made !== -EEXIST) throw explain({ call: 'mknod', errno: made, path, node: device }, 'make node')
  throw explain({ call: 'open', errno: -ENOTTY, path, node: device }, 'open device')
}
