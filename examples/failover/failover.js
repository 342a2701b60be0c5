/**
 * Failover with LOOP_CHANGE_FD: the server with the image fails, and the device is switched to a replica while a program
 * reads from it. Run as root:
 *
 *     node examples/failover/failover.js [rename|unmount]
 *
 * The argument says how the primary goes away: its image is renamed, or its filesystem is unmounted (umount -l).
 */

import { execFileSync } from 'node:child_process'
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, realpathSync, renameSync, rmSync, watch } from 'node:fs'
import { access } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { attach } from 'loopctl'
import { complain, takeBack } from '../support.js'
import { makeFiles, Program } from '../installer/program.js'

/** How long the switch may take, and how often the primary is looked for, in ms. */
const LIMIT = 30_000
const HEARTBEAT = 200

/** @param {string} text */
const say = (text) => console.log(text)

/** @param {string} program @param {string[]} words */
function run(program, ...words) {
  execFileSync(program, words, { stdio: 'pipe' })
}

/**
 * Resolves when the file cannot be reached any more.
 *
 * @param {string} file
 * @param {AbortSignal} signal
 */
async function waitUntilGone(file, signal) {
  const ended = new AbortController()
  try {
    await new Promise((resolve, reject) => {
      // Any error means that it is gone: a dead server answers EIO or ESTALE, not ENOENT.
      const look = () => void access(file).catch(resolve)
      watch(dirname(file), { signal: ended.signal }, look).on('error', look)
      // A filesystem that is unmounted, or whose server is dead, tells its watchers nothing.
      const heartbeat = setInterval(look, HEARTBEAT)
      ended.signal.addEventListener('abort', () => clearInterval(heartbeat))
      signal.addEventListener('abort', () => reject(signal.reason))
    })
  } finally {
    ended.abort()
  }
}

/**
 * Puts the replica under the device when the primary goes away.
 *
 * @param {import('loopctl').LoopDevice} device
 * @param {string} primary
 * @param {string} replica
 * @param {AbortSignal} signal
 */
async function standBy(device, primary, replica, signal) {
  await waitUntilGone(primary, signal)
  // To verify is to compare the replica with what the device shows, and that is the primary, which cannot be read any
  // more: it would fail or hang, just when the switch is needed. Compare them while both are well.
  await device.changeBackingFile(replica, { verify: false, signal })
}

/**
 * @param {string} meltdown
 * @param {string} folder
 * @param {AbortSignal} signal
 * @param {Set<() => unknown>} undo
 */
async function failOver(meltdown, folder, signal, undo) {
  const [source, root] = [join(folder, 'source'), join(folder, 'root')]
  const [primary, replica] = [join(folder, 'primary'), join(folder, 'replica')]
  for (const path of [root, primary, replica]) mkdirSync(path)

  const unmountPrimary = () => run('umount', primary)
  run('mount', '-t', 'tmpfs', 'loopctl-primary', primary)
  undo.add(unmountPrimary)
  run('mount', '-t', 'tmpfs', 'loopctl-replica', replica)
  undo.add(() => run('umount', replica))
  const [image, copy] = [join(primary, 'root.squashfs'), join(replica, 'root.squashfs')]
  makeFiles(source)
  run('mksquashfs', source, image, '-quiet', '-no-progress')
  rmSync(source, { recursive: true })
  copyFileSync(image, copy)

  const device = await attach(image, { readOnly: true, signal })
  undo.add(() => device.detach())
  run('mount', '-o', 'ro', device.path, root)
  undo.add(() => run('umount', root))
  say(`${device.path} shows ${image}, and is mounted`)

  const program = new Program(root)
  const stopProgram = () => program.stop()
  undo.add(stopProgram)
  await program.passesSince(0, 1, signal)
  say('the program runs from it, and has read every file')

  const watching = new AbortController()
  const watcher = standBy(device, image, copy, AbortSignal.any([signal, watching.signal]))
  undo.add(() => {
    watching.abort()
    return watcher.catch(() => undefined)
  })
  meltDown(meltdown, image)
  if (meltdown === 'unmount') undo.delete(unmountPrimary)
  const limit = setTimeout(() => watching.abort(new Error(`not switched within ${LIMIT / 1000} s`)), LIMIT)
  await watcher.finally(() => clearTimeout(limit))

  const backingFile = readFileSync(`/sys/block/loop${device.number}/loop/backing_file`, 'utf8').trimEnd()
  if (backingFile !== copy) throw new Error(`${device.path} is backed by ${backingFile}`)
  say(`the watcher has switched ${device.path} to ${copy}`)
  // Without -l: whoever still had it open would make it fail.
  if (undo.delete(unmountPrimary)) unmountPrimary()

  await program.passesSince(Date.now(), 2, signal)
  undo.delete(stopProgram)
  await stopProgram()
  return `${program.passes} passes, ${program.errors} errors; the primary went away while the program ran`
}

/** @param {string} meltdown @param {string} image */
function meltDown(meltdown, image) {
  say(`the primary goes away: ${meltdown}`)
  if (meltdown === 'rename') renameSync(image, `${image}.gone`)
  else run('umount', '-l', dirname(image))
}

/** @param {string} meltdown */
async function main(meltdown) {
  const folder = realpathSync(mkdtempSync(join(process.env['LOOPCTL_EXAMPLE_FOLDER'] ?? tmpdir(), 'loopctl-failover-')))
  const interrupted = new AbortController()
  for (const name of ['SIGINT', 'SIGTERM']) {
    process.once(name, () => interrupted.abort(new Error(`interrupted by ${name}`)))
  }
  /** @type {Set<() => unknown>} */
  const undo = new Set([() => rmSync(folder, { recursive: true })])
  let result = ''
  try {
    result = await failOver(meltdown, folder, interrupted.signal, undo)
  } catch (error) {
    complain(interrupted.signal.aborted ? interrupted.signal.reason : error)
  }
  await takeBack(undo)
  if (process.exitCode !== 1) say(result)
}

function hasMksquashfs() {
  try {
    execFileSync('mksquashfs', ['-version'], { stdio: 'ignore' })
    return true
  } catch (error) {
    return /** @type {NodeJS.ErrnoException} */ (error).code !== 'ENOENT'
  }
}

const meltdown = process.argv[2] ?? 'rename'
if (meltdown !== 'rename' && meltdown !== 'unmount') {
  console.error('usage: failover.js [rename|unmount]')
  process.exitCode = 2
} else if (process.getuid?.() !== 0) {
  console.error('run it as root: it mounts')
  process.exitCode = 2
} else if (hasMksquashfs()) {
  await main(meltdown)
} else {
  console.error('mksquashfs is not installed: it is in the Debian package squashfs-tools')
  process.exitCode = 2
}
