/**
 * The purpose of LOOP_CHANGE_FD: a program runs from an image on a CD, the image is moved to the hard disk, and the CD is
 * ejected while the program goes on. Run as root:
 *
 *     node examples/installer/installer.js [squashfs|erofs|ext4|xfs]
 */

import { execFileSync } from 'node:child_process'
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  realpathSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { attach, mountImage } from 'loopctl'
import { complain, takeBack } from '../support.js'
import { makeFiles, Program } from './program.js'

const MiB = 1 << 20

/**
 * How an image is made of a folder, and mounted.
 *
 * @typedef {object} Filesystem
 * @property {string} tool
 * @property {string} package the Debian package that has the tool
 * @property {(source: string, image: string) => void} make
 * @property {string} [options] of mount
 * @property {boolean} swappable
 */

/** @type {Record<string, Filesystem>} */
const FILESYSTEMS = {
  squashfs: {
    tool: 'mksquashfs',
    package: 'squashfs-tools',
    make: (source, image) => run('mksquashfs', source, image, '-quiet', '-no-progress'),
    swappable: false,
  },
  erofs: {
    tool: 'mkfs.erofs',
    package: 'erofs-utils',
    make: (source, image) => run('mkfs.erofs', '--quiet', image, source),
    swappable: false,
  },
  // The kernel shuts these two down when the device they are mounted from is switched: they want a device below it.
  ext4: {
    tool: 'mkfs.ext4',
    package: 'e2fsprogs',
    make: (source, image) => {
      makeSparse(image, 96 * MiB)
      run('mkfs.ext4', '-q', '-d', source, image)
    },
    swappable: true,
  },
  xfs: {
    tool: 'mkfs.xfs',
    package: 'xfsprogs',
    make: (source, image) => {
      // mkfs.xfs makes none smaller; most of it is a hole.
      makeSparse(image, 300 * MiB)
      const prototype = `${image}.prototype`
      writeFileSync(prototype, describeForXfs(source))
      run('mkfs.xfs', '-q', '-p', prototype, image)
      rmSync(prototype)
    },
    // A device that cannot be written can have no log replayed.
    options: 'norecovery',
    swappable: true,
  },
}

/** @param {string} text */
const say = (text) => console.log(text)

/** @param {string} program @param {string[]} words */
function run(program, ...words) {
  execFileSync(program, words, { stdio: 'pipe' })
}

/** @param {string} program */
function has(program) {
  try {
    execFileSync(program, ['-V'], { stdio: 'ignore' })
    return true
  } catch (error) {
    return /** @type {NodeJS.ErrnoException} */ (error).code !== 'ENOENT'
  }
}

/** @param {string} path @param {number} bytes */
function makeSparse(path, bytes) {
  writeFileSync(path, '')
  truncateSync(path, bytes)
}

/** The prototype file of mkfs.xfs -p: the only way to fill an xfs without mounting it. @param {string} source */
function describeForXfs(source) {
  /** @param {string} folder @returns {string[]} */
  const inside = (folder) =>
    readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
      const path = join(folder, entry.name)
      return entry.isDirectory()
        ? [`${entry.name} d--755 0 0`, ...inside(path), '$']
        : [`${entry.name} ---644 0 0 ${path}`]
    })
  return ['/', '0 0', 'd--755 0 0', ...inside(source), '$', ''].join('\n')
}

/** The page cache must not be what the program reads from. */
function dropCaches() {
  writeFileSync('/proc/sys/vm/drop_caches', '3')
}

/**
 * @param {Filesystem} filesystem
 * @param {string} folder
 * @param {AbortSignal} signal
 * @param {Set<() => unknown>} undo
 */
async function install(filesystem, folder, signal, undo) {
  const [cd, root, disk] = [join(folder, 'cd'), join(folder, 'root'), join(folder, 'disk')]
  for (const path of [cd, root, disk]) mkdirSync(path)

  const cdImage = join(folder, 'cd.img')
  burn(filesystem, folder, cdImage)
  const drive = await mountImage(cdImage, cd, { readOnly: true, signal })
  const ejectDrive = () => drive.unmount()
  undo.add(ejectDrive)

  const image = join(cd, 'root.img')
  const device = await attach(image, { readOnly: true, swappable: filesystem.swappable, signal })
  undo.add(() => device.detach())
  const system = await device.mount(root, { options: filesystem.options, signal })
  undo.add(() => system.unmount())
  say(`${device.path} shows ${image}, ${(statSync(image).size / MiB).toFixed(1)} MiB, and is mounted`)

  const program = new Program(root)
  const stopProgram = () => program.stop()
  undo.add(stopProgram)
  await program.passesSince(0, 1, signal)
  say('the program runs from it, and has read every file')

  const destination = join(disk, 'root.img')
  say(`moving it to ${destination}:`)
  dropCaches()
  let phase = ''
  const { bytesCopied, seconds, method } = await device.migrate(destination, {
    signal,
    onProgress: (progress) => {
      if (progress.phase === phase) return
      phase = progress.phase
      say(`  ${phase}`)
    },
  })
  say(`copied ${(bytesCopied / MiB).toFixed(1)} MiB of data with ${method} in ${seconds.toFixed(1)} s`)

  // Whoever still had the CD open would make it fail.
  await ejectDrive()
  undo.delete(ejectDrive)
  rmSync(cdImage)
  dropCaches()
  const ejected = Date.now()
  say('ejected the CD, and destroyed it')

  await program.passesSince(ejected, 2, signal)
  undo.delete(stopProgram)
  await stopProgram()
  return `${program.passes} passes, ${program.errors} errors; the CD was ejected while the program ran`
}

/**
 * A CD with the image of the system on it: any filesystem of its own will do.
 *
 * @param {Filesystem} filesystem
 * @param {string} folder
 * @param {string} cdImage
 */
function burn(filesystem, folder, cdImage) {
  const [source, content] = [join(folder, 'source'), join(folder, 'content')]
  mkdirSync(content)
  makeFiles(source)
  filesystem.make(source, join(content, 'root.img'))
  makeSparse(cdImage, 700 * MiB)
  run('mkfs.ext4', '-q', '-d', content, cdImage)
  // The CD is the only place that has it.
  for (const path of [source, content]) rmSync(path, { recursive: true })
}

/** @param {Filesystem} filesystem */
async function main(filesystem) {
  const folder = realpathSync(
    mkdtempSync(join(process.env['LOOPCTL_EXAMPLE_FOLDER'] ?? tmpdir(), 'loopctl-installer-')),
  )
  const interrupted = new AbortController()
  for (const name of ['SIGINT', 'SIGTERM']) {
    process.once(name, () => interrupted.abort(new Error(`interrupted by ${name}`)))
  }
  /** @type {Set<() => unknown>} */
  const undo = new Set([() => rmSync(folder, { recursive: true })])
  let result = ''
  try {
    result = await install(filesystem, folder, interrupted.signal, undo)
  } catch (error) {
    complain(interrupted.signal.aborted ? interrupted.signal.reason : error)
  }
  await takeBack(undo)
  if (process.exitCode !== 1) say(result)
}

const name = process.argv[2] ?? 'squashfs'
const filesystem = FILESYSTEMS[name]
if (filesystem === undefined) {
  console.error(`usage: installer.js [${Object.keys(FILESYSTEMS).join('|')}]`)
  process.exitCode = 2
} else if (process.getuid?.() !== 0) {
  console.error('run it as root: it mounts')
  process.exitCode = 2
} else {
  // The CD is an ext4.
  const missing = [filesystem, /** @type {Filesystem} */ (FILESYSTEMS['ext4'])].find(({ tool }) => !has(tool))
  if (missing === undefined) await main(filesystem)
  else {
    console.error(`${missing.tool} is not installed: it is in the Debian package ${missing.package}`)
    process.exitCode = 2
  }
}
