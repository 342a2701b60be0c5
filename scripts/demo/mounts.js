/** The mount table, and how something gets out of it. */

import { readdirSync, readFileSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'

/** How long unmount() waits for other mount namespaces, in ms. */
const PATIENCE = 30_000

/**
 * @param {string} pid of the process whose mount namespace it is
 * @returns {{ point: string, device: string }[]} `device` as 7:0
 */
function mountsOf(pid) {
  const lines = readFileSync(`/proc/${pid}/mountinfo`, 'utf8').split('\n')
  return lines.map((line) => {
    const [, , device = '', , point = ''] = line.split(' ')
    return { device, point: point.replaceAll(/\\([0-7]{3})/g, (_, octal) => fromOctal(octal)) }
  })
}

/** The mount table has blanks and backslashes as `\040` and `\134`. @param {string} digits */
const fromOctal = (digits) => String.fromCodePoint(Number.parseInt(digits, 8))

/** What is mounted under the folder, the last one first. @param {string} folder */
export function mountsIn(folder) {
  return mountsOf('self')
    .filter(({ point }) => point.startsWith(`${folder}/`))
    .toReversed()
}

/**
 * Unmounts. A mount namespace that was made meanwhile, by `unshare --mount` or with a container, has a copy of the mount,
 * which keeps the device in use: that is waited for.
 *
 * @param {import('loopctl').Mount} mount
 */
export async function unmount(mount) {
  const point = mount.path
  const device = mountsOf('self').findLast((each) => each.point === point)?.device
  await mount.unmount()
  let said = false
  for (const began = Date.now(); ; await setTimeout(20)) {
    const holder = holderOf(device)
    if (holder === undefined) return
    if (Date.now() - began > PATIENCE) throw new Error(`${holder} still has ${point} in its mount namespace`)
    if (!said) console.error(`waiting for ${holder}, whose mount namespace has a copy of ${point}`)
    said = true
  }
}

/** The first process that sees the device mounted. @param {string | undefined} device @returns {string | undefined} */
function holderOf(device) {
  for (const pid of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
    try {
      if (!mountsOf(pid).some((mount) => mount.device === device)) continue
      return `process ${pid} (${readFileSync(`/proc/${pid}/comm`, 'utf8').trim()})`
    } catch {
      // It has ended, and sees nothing any more.
    }
  }
  return undefined
}
