/**
 * Devices that are free, from sysfs. LOOP_CTL_GET_FREE would make one where there is none and not say so; then nobody
 * could tell whether a device that appeared in that moment is this process's to remove. It also offers the same device
 * for ever where somebody holds that one exclusively.
 */

import { constants } from 'node:os'
import { explain } from '../errors/explain.ts'
import { Sequence } from '../kernel/sequence.ts'
import * as sysfs from '../kernel/sysfs.ts'

/** Those that were free when they were last looked at, so that most attaches need no look at all devices. */
const likely = new Set<number>()

/** A device that is probably free, the lowest first; undefined where none is remembered. */
export function likelyFree(avoid: (number: number) => boolean): number | undefined {
  let lowest: number | undefined
  for (const number of likely) {
    if ((lowest === undefined || number < lowest) && !avoid(number)) lowest = number
  }
  return lowest
}

export function noteFree(number: number): void {
  likely.add(number)
}

export function noteTaken(number: number): void {
  likely.delete(number)
}

/** How many are remembered of a look at all: low numbers are taken first, as LOOP_CTL_GET_FREE does. */
const REMEMBERED = 8

/** Devices asked in one hop to a thread. */
const BATCH = 256

/**
 * The free devices that sysfs shows, the lowest first; undefined where sysfs is not mounted.
 *
 * @throws `resources`
 */
export async function findFree(): Promise<number[] | undefined> {
  if (!sysfs.isMounted()) return undefined
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') throw explain({ call: 'scandir', errno: numbers, path: '/sys/block' }, 'read /sys')
  const free: number[] = []
  for (let at = 0; at < numbers.length; at += BATCH) {
    const sequence = new Sequence()
    const asked = numbers.slice(at, at + BATCH).map((number) => [number, sequence.try('sysfsLoop', number)] as const)
    await sequence.run()
    for (const [number, { answer }] of asked) if (answer === -constants.errno.ENOENT) free.push(number)
  }
  likely.clear()
  for (const number of free.slice(0, REMEMBERED)) likely.add(number)
  return free
}
