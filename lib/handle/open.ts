/** A handle of a device that somebody else attached, or of a free one. */

import { constants } from 'node:os'
import { checkInteger, checkLoopNumber, wrongType, wrongValue } from '../common/arguments.ts'
import { checkWait, LOOKING, type Wait } from '../common/deadline.ts'
import { assertSupported, refusal } from '../errors/errors.ts'
import { explained } from '../errors/given-up.ts'
import { explain } from '../errors/explain.ts'
import { type Bound, GivenUp, listUnanswering, within } from '../kernel/bounded.ts'
import { devicePath, numberOfNode, openDevice } from '../kernel/devnode.ts'
import { close, O_RDONLY } from '../kernel/files.ts'
import { isBound } from '../kernel/sysfs.ts'
import { decodeInfo, newInfo } from '../kernel/uapi.ts'
import { Handle } from './handle.ts'
import type { LoopRef } from './identity.ts'

/** 7, `'/dev/loop7'`, `'loop7'`, the path of a link to it (`/dev/disk/by-...`), `device.ref`, or a LoopInfo. */
export type DeviceRef = number | string | Readonly<LoopRef>

export interface OpenOptions extends Wait {
  /** Milliseconds; default 5 000. */
  timeout?: number | undefined
}

/**
 * @throws `no-such-device`, `node-missing`, `replaced` where the reference names an attachment that is gone,
 *   `detaching`, `permission`
 */
export async function openHandle(device: DeviceRef, options?: OpenOptions): Promise<Handle> {
  const named = checkDeviceRef(device)
  const deadline = checkWait(options, LOOKING)
  assertSupported()
  deadline.throwIfAborted()
  const ref = 'link' in named ? { number: await resolveLink(named.link, deadline.bound) } : named
  const { number } = ref
  const handle = await explained(() => openAndIdentify(number, deadline.bound))
  try {
    deadline.throwIfAborted()
    handle.assertIs(ref)
    return handle
  } catch (error) {
    await handle.close()
    throw error
  }
}

async function openAndIdentify(number: number, bound: Bound): Promise<Handle> {
  const fd = await openDevice(number, O_RDONLY, bound)
  if (fd < 0) throw explain({ call: 'open', errno: fd, path: devicePath(number), number }, 'open device')
  const bytes = newInfo()
  const answer = await askInHalfTime(number, fd, bytes, bound)
  if (answer !== undefined && answer >= 0) return new Handle(number, fd, { owned: false, backing: decodeInfo(bytes) })
  if (answer === -ENXIO) return new Handle(number, fd, { owned: false, backing: undefined })
  // The filesystem of the backing file is gone, or silent. The device can be got rid of all the same.
  if (answer === undefined || (!OF_DEVICE.has(-answer) && isBound(number))) {
    return new Handle(number, fd, { owned: false, backing: undefined, attached: true })
  }
  await close(fd)
  throw explain({ call: 'LOOP_GET_STATUS64', errno: answer, path: devicePath(number), number })
}

const { EBADF, EFAULT, EINVAL, ENOTTY, ENXIO, EOVERFLOW, EPERM } = constants.errno

/**
 * What LOOP_GET_STATUS64 answers of the device itself, or of our descriptor; every other error is that of the backing
 * file's filesystem, which it asks.
 */
export const OF_DEVICE: ReadonlySet<number> = new Set([EBADF, EFAULT, EINVAL, ENOTTY, ENXIO, EOVERFLOW, EPERM])

/** Undefined: it does not answer, now or an earlier call. */
async function askInHalfTime(
  number: number,
  fd: number,
  bytes: Uint8Array,
  { left, signal }: Bound,
): Promise<number | undefined> {
  if (listUnanswering().includes(number)) return undefined
  try {
    return await within({ left: left / 2, signal }, number).loopGetStatus64(fd, bytes)
  } catch (error) {
    if (error instanceof GivenUp && !error.isAborted) return undefined
    await close(fd)
    throw error
  }
}

/** @throws `no-such-device`, `not-a-loop-device` */
async function resolveLink(path: string, bound: Bound): Promise<number> {
  const found = await explained(() => numberOfNode(path, bound), path)
  if (typeof found === 'number') return found
  if (found === 'not there') throw refusal('no-such-device', 'stat', 'there is nothing of that name', { path })
  const disk = /\/dev\/loop\d+$/.exec(found)?.[0]
  throw refusal('not-a-loop-device', 'stat', `is ${found}`, {
    path,
    hint: disk === undefined ? undefined : `give ${disk}`,
  })
}

/** A path that is not that of a node by its name has to be looked up. */
export function checkDeviceRef(value: unknown): LoopRef | { link: string } {
  if (typeof value === 'number') return { number: checkLoopNumber(value) }
  if (typeof value === 'string') {
    const digits = /^(?:\/dev\/)?loop(0|[1-9]\d*)$/.exec(value)?.[1]
    if (digits === undefined && /^\/(?!dev\/loop)[^\0]*$/s.test(value)) return { link: value }
    const whole = /^(?:\/dev\/)?(loop\d+)p\d+$/.exec(value)?.[1]
    if (whole !== undefined)
      throw wrongValue('device', `must not be a partition, as ${value} is: its device is /dev/${whole}`)
    if (digits === undefined)
      throw wrongValue(
        'device',
        `must look like loop7 or /dev/loop7, or be the path of a link to it, not ${JSON.stringify(value)}`,
      )
    return { number: checkLoopNumber(Number(digits)) }
  }
  if (typeof value !== 'object' || value === null || !('number' in value)) {
    throw wrongType('device', 'a number, a path or an object with a number', value)
  }
  const number = checkLoopNumber(value.number)
  const diskSeq = 'diskSeq' in value ? value.diskSeq : undefined
  const backing = 'backing' in value ? value.backing : undefined
  if (backing !== undefined && typeof backing !== 'string') throw wrongType('device.backing', 'a string', backing)
  return {
    number,
    ...(diskSeq !== undefined && { diskSeq: checkInteger('diskSeq', diskSeq, 0, Number.MAX_SAFE_INTEGER) }),
    ...(backing !== undefined && { backing }),
  }
}
