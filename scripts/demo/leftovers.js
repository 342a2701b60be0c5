/** What the demo can leave behind: how it is taken back, and how one sees that there is none. */

import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { list } from 'loopctl'
import { mountsIn, unmount } from './mounts.js'

/** Bytes that have been read from a loop device since it was made; the third figure counts sectors of 512. */
export function bytesRead(/** @type {number} */ number) {
  return Number(readFileSync(`/sys/block/loop${number}/stat`, 'utf8').trim().split(/\s+/)[2]) * 512
}

/**
 * Whatever is left of the demo: devices with a file of the folder behind them, mounts in it, and the folder itself. The
 * upper device of a stack needs no look: it holds the lower one, which would be found.
 *
 * @param {string} folder
 */
export async function whatIsLeft(folder) {
  const isOurs = (/** @type {string | null} */ file) => file?.startsWith(`${folder}/`) === true
  const listed = (await list()).filter(({ backingFile }) => isOurs(backingFile)).map(({ path }) => `${path} in list()`)
  const inSysfs = readdirSync('/sys/block').filter((name) => isOurs(backingFileOf(name)))
  return [
    ...listed,
    ...inSysfs.map((name) => `/sys/block/${name}/loop`),
    ...mountsIn(folder).map(({ point }) => `the mount ${point}`),
    ...(existsSync(folder) ? [folder] : []),
  ]
}

/** @param {string} name of a block device; null: it is no loop device, or a free one */
function backingFileOf(name) {
  try {
    return readFileSync(`/sys/block/${name}/loop/backing_file`, 'utf8')
  } catch {
    return null
  }
}

/**
 * Takes back what there still is, the last thing first, and each although another failed.
 *
 * @param {string} folder
 * @param {import('./reader.js').Reader | undefined} reader
 * @param {import('loopctl').Mount | undefined} mount
 * @param {(import('loopctl').LoopDevice | undefined)[]} devices
 * @returns {Promise<unknown[]>} the errors
 */
export async function takeBack(folder, reader, mount, devices) {
  /** @type {unknown[]} */
  const errors = []
  const attempt = async (/** @type {() => unknown} */ operation) => {
    try {
      await operation()
    } catch (error) {
      errors.push(error)
    }
  }
  await attempt(() => reader?.stop())
  process.chdir('/')
  if (mount !== undefined && mountsIn(folder).length > 0) await attempt(() => unmount(mount))
  for (const device of devices) if (device !== undefined && device.fd !== -1) await attempt(() => device.detach())
  // Never through a mount that did not go.
  if (mountsIn(folder).length === 0) await attempt(() => rmSync(folder, { recursive: true, force: true }))
  return errors
}
