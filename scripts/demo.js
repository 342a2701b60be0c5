/** The main job on a real device: an image attached, mounted, written, read back, let go. Run as root. */

import { execFileSync } from 'node:child_process'
import { closeSync, fsyncSync, mkdirSync, mkdtempSync, openSync, readFileSync, rmSync, truncateSync } from 'node:fs'
import { writeFileSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { attach, find, list, LoopError } from 'loopctl'

/** @param {string} text */
const say = (text) => console.log(text)

/** @param {string} program @param {string[]} words */
function has(program, ...words) {
  try {
    execFileSync(program, words, { stdio: 'ignore' })
    return true
  } catch (error) {
    return /** @type {NodeJS.ErrnoException} */ (error).code !== 'ENOENT'
  }
}

/** @param {string} folder */
async function demo(folder) {
  const image = join(folder, 'disk.img')
  writeFileSync(image, '')
  truncateSync(image, 16 << 20)
  const withExt4 = has('mkfs.ext4', '-V')
  if (withExt4) execFileSync('mkfs.ext4', ['-q', image])
  else say('mkfs.ext4 is not installed (package e2fsprogs): the device is written without a filesystem')

  const device = await attach(image, { reference: 'loopctl-demo' })
  try {
    say(`attached ${image} to ${device.path}`)
    if (withExt4) writeThroughFilesystem(device.path, join(folder, 'mnt'))
    else writeThroughDevice(device.path)
    say('\nwhat is attached now:')
    for (const { path, size, backingFile } of await list()) say(`  ${path}  ${size} bytes  ${backingFile}`)
    say('')
  } finally {
    say(`${device.path} ${await device.detach()}`)
  }
  const left = await find(image)
  if (left.length > 0) throw new Error(`still attached: ${left.map(({ path }) => path).join(', ')}`)

  await showSquashfs(folder)
  say('nothing is left')
}

/** @param {string} device @param {string} mountPoint */
function writeThroughFilesystem(device, mountPoint) {
  mkdirSync(mountPoint)
  execFileSync('mount', [device, mountPoint])
  try {
    writeFileSync(join(mountPoint, 'hello'), 'written through the filesystem')
    say(`mounted it, wrote a file, and read: ${readFileSync(join(mountPoint, 'hello'), 'utf8')}`)
  } finally {
    execFileSync('umount', [mountPoint])
  }
}

/** @param {string} device */
function writeThroughDevice(device) {
  const fd = openSync(device, 'r+')
  writeSync(fd, 'written through the device', 4096)
  fsyncSync(fd)
  closeSync(fd)
  say(`wrote, and read: ${readFileSync(device).subarray(4096, 4122).toString()}`)
}

/** @param {string} folder */
async function showSquashfs(folder) {
  if (!has('mksquashfs', '-version')) {
    say('mksquashfs is not installed (package squashfs-tools): the read-only image is left out')
    return
  }
  const source = join(folder, 'source')
  const image = join(folder, 'root.squashfs')
  mkdirSync(source)
  writeFileSync(join(source, 'motd'), 'read from a squashfs')
  execFileSync('mksquashfs', [source, image, '-quiet', '-no-progress'])
  const device = await attach(image, { readOnly: true })
  const mountPoint = join(folder, 'squashfs')
  mkdirSync(mountPoint)
  try {
    execFileSync('mount', ['-t', 'squashfs', '-o', 'ro', device.path, mountPoint], { stdio: 'pipe' })
    try {
      say(`mounted ${image} from ${device.path}: ${readFileSync(join(mountPoint, 'motd'), 'utf8')}`)
    } finally {
      execFileSync('umount', [mountPoint])
    }
  } catch (error) {
    say(`this kernel does not mount a squashfs: ${error instanceof Error ? error.message.trim() : String(error)}`)
  } finally {
    say(`${device.path} ${await device.detach()}`)
  }
}

const folder = mkdtempSync(join(tmpdir(), 'loopctl-demo-'))
try {
  await demo(folder)
} catch (error) {
  if (!LoopError.is(error)) throw error
  console.error(`${error.message}${error.hint ? `\nhint: ${error.hint}` : ''}`)
  process.exitCode = 1
} finally {
  rmSync(folder, { recursive: true, force: true })
}
