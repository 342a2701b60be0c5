/**
 * The main job on real devices, told as a story: each step shows its code, runs it, and shows what it answered.
 * Run as root: npm run demo. Whatever happens in the middle, Ctrl-C too, everything is taken back.
 */

import { mkdirSync, mkdtempSync, readFileSync, realpathSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { randomBytes } from 'node:crypto'
import { constants, tmpdir } from 'node:os'
import { join } from 'node:path'
import { attach, list, LoopError } from 'loopctl'
import { bytesRead, takeBack, whatIsLeft } from './demo/leftovers.js'
import { run, whyImpossible } from './demo/machine.js'
import { unmount } from './demo/mounts.js'
import { Narrator } from './demo/narrator.js'
import { Reader } from './demo/reader.js'

const MiB = 1 << 20

const interruption = new AbortController()
const { signal } = interruption
const { step, say, sayTable } = new Narrator(story, signal)

// Not in the story, because a failure in the middle of it has to take them back.
/** @type {import('loopctl').LoopDevice | undefined} */
let disk
/** @type {import('loopctl').LoopDevice | undefined} */
let system
/** @type {import('loopctl').Mount | undefined} */
let mount
/** @type {Reader | undefined} */
let reader

/** Runs in an empty folder of its own, whose path it is given. @param {string} folder */
async function story(folder) {
  await step('An empty file becomes a block device.')
  writeFileSync('disk.img', '')
  truncateSync('disk.img', 64 * MiB)
  disk = await attach('disk.img')
  say(`${disk.path}, ${(await disk.status()).size / MiB} MiB`)

  await step('It is a disk like any other: mkfs, mount, write, read.')
  await run('mkfs.ext4', '-q', disk.path)
  mount = await disk.mount('mnt', { makeTarget: true })
  writeFileSync('mnt/letter', 'written through the filesystem')
  say(readFileSync('mnt/letter', 'utf8'))

  await step('A device that is in use stays attached. detach() says who uses it.')
  await disk.detach().catch(({ reason, holders }) => say(reason, holders))

  await step('After the unmount it detaches. What was written is in the file.')
  await unmount(mount)
  say(await disk.detach())
  say(readFileSync('disk.img').includes('written through the filesystem'))

  await step('Another image, on a "CD", holds a system that will have to move.')
  const content = randomBytes(32 * MiB)
  for (const name of ['files', 'cd', 'hd']) mkdirSync(name)
  writeFileSync('files/program', content)
  await run('mkfs.ext4', '-q', '-d', 'files', 'cd/system.img', '56M')

  await step('It is attached as a stack of two devices, and its ext4 is mounted.')
  const options = { readOnly: true, swappable: true }
  system = await attach('cd/system.img', options)
  mount = await system.mount('mnt')
  const { lower = NaN } = await system.status()
  say(`${system.path} on /dev/loop${lower} on cd/system.img`)

  await step('A program reads from it all the time, around the page cache.')
  reader = new Reader('mnt/program', content, signal)
  const before = await reader.passes(2)
  say(`${before.reads} reads, ${before.errors} errors`)

  await step('migrate() moves the image to the "hard disk" while it is read.')
  const moved = await system.migrate('hd/system.img', { signal })
  say(`${moved.bytesCopied} bytes copied, verified: ${moved.verified}`)
  const during = (await reader.count()).reads - before.reads
  say(`${during} reads meanwhile`)

  await step('The CD is destroyed. The program reads on, from the new file.')
  rmSync('cd', { recursive: true })
  const earlier = bytesRead(lower)
  await run('blockdev', '--flushbufs', `/dev/loop${lower}`)
  const { reads, errors, slowest } = await reader.passes(2)
  const served = Math.round((bytesRead(lower) - earlier) / MiB)
  say(`${served} MiB came from the new file`)
  say(`${reads} reads, ${errors} errors; the slowest took ${slowest} ms`)

  await step('These loop devices are attached on this machine now.')
  sayTable(await list(), 'path', 'size', 'readOnly', 'backingFile')

  await step('The program ends, the mount goes, and both devices are detached.')
  await reader.stop()
  await unmount(mount)
  say(await system.detach())

  await step('list(), sysfs and the mount table agree that nothing is left.')
  process.chdir('/')
  rmSync(folder, { recursive: true })
  say('left:', await whatIsLeft(folder))
}

/** @param {unknown} error */
function complain(error) {
  console.error(error instanceof Error ? error.message.trim() : String(error))
  if (LoopError.is(error) && error.hint) console.error(`hint: ${error.hint}`)
  process.exitCode ||= 1
}

/** Tells the story in a folder of its own, and afterwards takes back whatever there still is of it. */
async function tell() {
  console.log('loopctl on real devices: the code of each step, and what it answered.')
  const folder = realpathSync(mkdtempSync(join(tmpdir(), 'loopctl-demo-')))
  process.chdir(folder)
  /** @type {unknown[]} */
  const errors = []
  try {
    await story(folder)
  } catch (error) {
    errors.push(error)
  }
  const more = await takeBack(folder, reader, mount, [system, disk])
  // Only now: a Ctrl-C also ends a program that has just been started, which can be seen before the Ctrl-C itself.
  if (signal.aborted) errors.length = 0
  for (const error of [...errors, ...more]) complain(error)
  const left = await whatIsLeft(folder)
  if (left.length > 0) complain(`still there: ${left.join(', ')}`)
  else if (process.exitCode) console.error('everything was taken back')
}

/** Ends the story before its next step; once more, it does nothing. @param {string} why @param {number} exitCode */
function interrupt(why, exitCode) {
  if (signal.aborted) return
  process.exitCode = exitCode
  console.error(why)
  interruption.abort(new Error(why))
}

// Until the end: a second Ctrl-C must not keep the demo from taking everything back.
for (const name of /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP'])) {
  process.on(name, () => interrupt(`interrupted by ${name}`, 128 + constants.signals[name]))
}
process.stdout.on('error', () => interrupt('nobody reads the output any more', 1))
process.stderr.on('error', () => {})

try {
  const obstacle = await whyImpossible()
  if (obstacle !== undefined) complain(obstacle)
  else if (!signal.aborted) await tell()
} catch (error) {
  complain(error)
}
