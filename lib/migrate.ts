/**
 * The installer's story in one call: copy the image to another place, flush, verify, switch the device over. At every
 * moment the device is backed by one complete file, and under the destination's name there is nothing or a whole copy.
 */

import { constants } from 'node:os'
import { basename, dirname, isAbsolute } from 'node:path'
import { checkBoolean, checkFunction, checkOptions, wrongType, wrongValue } from './arguments.ts'
import { openBacking } from './backing.ts'
import {
  type ChangeOptions,
  letGo,
  openPresent,
  type Progress,
  readChangeable,
  refuseOverlap,
  reporter,
  switchBackingFile,
} from './change.ts'
import { compareContents } from './compare.ts'
import { type CopyMethod, type CopyResult, copyWindow, findComparable, type Source } from './copy.ts'
import { checkDeadline, type Deadline } from './deadline.ts'
import { randomHex, sha256 } from './digest.ts'
import { refusal } from './errors.ts'
import { guardFilesystem } from './guard.ts'
import type { Handle } from './handle.ts'
import { binding } from './kernel/binding.ts'
import * as files from './kernel/files.ts'
import { readBackingFile } from './kernel/sysfs.ts'
import type { LoopInfo64 } from './kernel/uapi.ts'
import type { BackingIdentity } from './overlap.ts'
import { explain } from './reasons.ts'
import { onBackingDevice } from './stack.ts'
import { readSize } from './status.ts'

export interface MigrateOptions extends ChangeOptions {
  /** Read the copy back from its medium and compare it with the present backing file. Default true. */
  verify?: boolean | undefined
  /** Keep holes. Default true. */
  sparse?: boolean | undefined
  /** Replace a file that is there. Default false. */
  overwrite?: boolean | undefined
}

export interface MigrateResult {
  /** The new backing file, by the kernel's path of it. */
  destination: string
  /** Bytes of data that were copied, or shared. */
  bytesCopied: number
  /** Bytes of holes that were kept. */
  bytesSparse: number
  seconds: number
  method: CopyMethod
  /** The copy was read back and compared. */
  verified: boolean
}

/** The options, checked and complete. */
interface Plan {
  path: string
  verify: boolean
  sparse: boolean
  overwrite: boolean
  force: boolean
  onProgress: ((progress: Progress) => void) | undefined
}

export async function migrate(handle: Handle, destination: string, options?: MigrateOptions): Promise<MigrateResult> {
  const given = checkOptions(options, ['verify', 'sparse', 'overwrite', 'force', 'onProgress', 'signal'])
  const plan = checkPlan(destination, given)
  const deadline = checkDeadline({ signal: given.signal }, Number.POSITIVE_INFINITY)
  return handle.run(async () => {
    deadline.throwIfAborted()
    await handle.readInfo()
    return onBackingDevice(handle, (target) => migrateDevice(target, plan, deadline))
  })
}

function checkPlan(destination: unknown, given: MigrateOptions): Plan {
  if (typeof destination !== 'string') throw wrongType('destination', 'a string', destination)
  if (destination === '' || destination.endsWith('/')) throw wrongValue('destination', 'must name a file')
  if (destination.includes('\0')) throw wrongValue('destination', 'must not contain a zero byte')
  const { verify, sparse, overwrite, force, onProgress } = given
  return {
    // Not normalised: `link/..` is where the link leads.
    path: isAbsolute(destination) ? destination : `${process.cwd()}/${destination}`,
    verify: verify === undefined ? true : checkBoolean('verify', verify),
    sparse: sparse === undefined ? true : checkBoolean('sparse', sparse),
    overwrite: overwrite === undefined ? false : checkBoolean('overwrite', overwrite),
    force: force === undefined ? false : checkBoolean('force', force),
    onProgress: onProgress === undefined ? undefined : checkFunction('onProgress', onProgress),
  }
}

async function migrateDevice(target: Handle, plan: Plan, deadline: Deadline): Promise<MigrateResult> {
  const start = performance.now()
  const info = await readChangeable(target)
  // Looked at now, so that nothing is copied in vain, and once more at the switch.
  if (!plan.force) await letGo(await guardFilesystem(target))
  await refuseOverlap(target, ownBacking(info), info)
  await removeLeftovers(plan.path)
  await checkDestination(plan, info)

  const source = await openPresent(target, info)
  let result: CopyResult
  try {
    const draft = await Draft.create(plan.path, source.mode)
    try {
      result = await fill(draft, source, target, info, plan, deadline)
      await publishAndSwitch(draft, source, target, plan)
    } finally {
      await draft.discard()
    }
  } finally {
    await source.close()
  }
  const destination = (await readBackingFile(target.number)) ?? plan.path
  return { destination, ...result, seconds: (performance.now() - start) / 1000, verified: plan.verify }
}

/** What the device is backed by now, for the question who else has it attached. */
function ownBacking({ device, inode, rdevice }: LoopInfo64): BackingIdentity {
  return {
    path: 'the present backing file',
    device,
    inode,
    rdevice: rdevice === 0n ? undefined : rdevice,
    opened: false,
    fd: -1,
  }
}

async function checkDestination({ path, overwrite }: Plan, info: LoopInfo64): Promise<void> {
  const stat = await files.lstat(path)
  if (typeof stat === 'number') {
    if (stat === -constants.errno.ENOENT) return
    throw explain({ call: 'lstat', errno: stat, path }, 'create destination')
  }
  if (stat.dev === info.device && stat.ino === info.inode) {
    throw refusal('destination-exists', 'lstat', 'is the file that the device is backed by', { path })
  }
  if (!overwrite) {
    throw refusal('destination-exists', 'lstat', 'exists', { path, hint: 'overwrite: true replaces a file' })
  }
  if (stat.isFile()) return
  const type = stat.isSymbolicLink() ? 'a symbolic link' : stat.isDirectory() ? 'a directory' : 'not a regular file'
  throw refusal('not-a-file-or-block-device', 'lstat', `is ${type}, and is not replaced`, { path })
}

const NAME_MAX = 255
const MARK = '.loopctl-'
const ORIGINAL = 'was-'
const RANDOM_BYTES = 6

/** What the names of drafts for this place begin with; for a name that leaves no room for more, its hash. */
function draftPrefix(path: string): string {
  const name = basename(path)
  const room = NAME_MAX - `.${MARK}${ORIGINAL}`.length - 2 * RANDOM_BYTES
  const stem = Buffer.byteLength(name) <= room ? name : sha256(name)
  return `.${stem}${MARK}`
}

/** A name beside the destination: of a draft, or (`was-`) of a file that is replaced, kept until the switch is done. */
function sidePath(path: string, mark: '' | typeof ORIGINAL): string {
  return `${dirname(path)}/${draftPrefix(path)}${mark}${randomHex(RANDOM_BYTES)}`
}

/**
 * What killed migrations to this place left: drafts, and kept originals. A living one holds a lock on its draft.
 *
 * @throws `contention` where another is under way
 */
async function removeLeftovers(path: string): Promise<void> {
  const folder = dirname(path)
  const names = await files.readDirectory(folder)
  if (typeof names === 'number') throw explain({ call: 'scandir', errno: names, path: folder }, 'create destination')
  const prefix = draftPrefix(path)
  const leftovers = names
    .filter((name) => name.startsWith(prefix) && /^(?:was-)?[0-9a-f]{12}$/.test(name.slice(prefix.length)))
    .map((name) => `${folder}/${name}`)
  for (const leftover of leftovers) {
    const fd = await files.open(leftover, files.O_RDONLY | files.O_NONBLOCK)
    if (fd < 0) continue
    const locked = binding().flockSync(fd, LOCK_EX | LOCK_NB)
    await files.close(fd)
    if (locked === -constants.errno.EAGAIN)
      throw refusal('contention', 'flock', 'another migration to this place is under way', { path })
  }
  for (const leftover of leftovers) {
    // Killed between the two renames of a filesystem without hard links: it is the only copy.
    const isLost = leftover.includes(`${prefix}${ORIGINAL}`) && (await files.lstat(path)) === -constants.errno.ENOENT
    await (isLost ? files.rename(leftover, path) : files.unlink(leftover))
  }
}

const LOCK_EX = 2
const LOCK_NB = 4

/** The copy, under a name of its own beside the destination until it is whole. */
class Draft {
  readonly path: string
  readonly destination: string
  readonly #fd: number
  #named = true
  /** What is replaced, under a name of its own until the switch has succeeded. */
  #original: string | undefined

  private constructor(path: string, destination: string, fd: number) {
    this.path = path
    this.destination = destination
    this.#fd = fd
  }

  static async create(destination: string, mode: number): Promise<Draft> {
    for (;;) {
      const path = sidePath(destination, '')
      const fd = await files.open(path, files.O_CREAT | files.O_EXCL | files.O_RDWR, 0o600)
      if (fd < 0) throw explain({ call: 'open', errno: fd, path }, 'create destination')
      const draft = new Draft(path, destination, fd)
      binding().flockSync(fd, LOCK_EX | LOCK_NB)
      // Before it was locked, another migration could take it for a dead one's.
      if ((await files.lstat(path)) === -constants.errno.ENOENT) {
        await draft.discard()
        continue
      }
      const changed = await files.changeMode(fd, mode)
      if (changed === 0) return draft
      await draft.discard()
      throw explain({ call: 'fchmod', errno: changed, path }, 'create destination')
    }
  }

  get fd(): number {
    return this.#fd
  }

  async flush(): Promise<void> {
    const answer = await files.fsync(this.#fd)
    if (answer < 0) throw explain({ call: 'fsync', errno: answer, path: this.path }, 'create destination')
  }

  /** Gives it the destination's name; {@link takeBack} undoes that. */
  async publish(overwrite: boolean): Promise<void> {
    if (overwrite) await this.#keepOriginal()
    const answer = overwrite ? await files.rename(this.path, this.destination) : await this.#nameOnce()
    if (answer < 0) {
      await this.#restore()
      throw explain({ call: 'rename', errno: answer, path: this.destination }, 'create destination')
    }
    this.#named = false
    await flushFolder(this.destination)
  }

  /** Only the copy itself is taken away: whoever put another file there keeps it. */
  async takeBack(): Promise<void> {
    const [copy, there] = [await files.fstat(this.fd), await files.lstat(this.destination)]
    if (typeof copy === 'number' || typeof there === 'number' || copy.ino !== there.ino || copy.dev !== there.dev)
      return
    if (this.#original === undefined) await files.unlink(this.destination)
    else await this.#restore()
  }

  async #restore(): Promise<void> {
    if (this.#original === undefined) return
    const restored = await files.rename(this.#original, this.destination)
    // Of two names of one file neither replaces the other.
    if (restored === 0) await files.unlink(this.#original)
    this.#original = undefined
  }

  /** Atomically, and only where there is nothing of that name. */
  async #nameOnce(): Promise<number> {
    const linked = await files.link(this.path, this.destination)
    if (linked === 0) {
      await files.unlink(this.path)
      return 0
    }
    if (linked === -constants.errno.EEXIST) return linked
    // No hard links on this filesystem: a look has to do.
    const there = await files.lstat(this.destination)
    if (typeof there !== 'number') return -constants.errno.EEXIST
    return files.rename(this.path, this.destination)
  }

  /** So that it can be put back. Where there are no hard links, its name is free for a moment. */
  async #keepOriginal(): Promise<void> {
    const path = sidePath(this.destination, ORIGINAL)
    const linked = await files.link(this.destination, path)
    if (linked === -constants.errno.ENOENT) return
    const kept = linked === 0 ? 0 : await files.rename(this.destination, path)
    if (kept < 0) throw explain({ call: 'rename', errno: kept, path: this.destination }, 'create destination')
    this.#original = path
  }

  /** Removes what has no name of its own to keep. */
  async discard(): Promise<void> {
    if (this.#named) await files.unlink(this.path)
    if (this.#original !== undefined) await files.unlink(this.#original)
    await files.close(this.#fd)
  }
}

async function flushFolder(path: string): Promise<void> {
  const fd = await files.open(dirname(path), files.O_RDONLY)
  if (fd < 0) return
  await files.fsync(fd)
  await files.close(fd)
}

async function fill(
  draft: Draft,
  source: Source,
  target: Handle,
  info: LoopInfo64,
  plan: Plan,
  deadline: Deadline,
): Promise<CopyResult> {
  const size = readSize(target)
  const report = reporter(size, plan.onProgress)
  const window = { start: info.offset, size, sparse: plan.sparse }
  const result = await copyWindow(source, draft, window, deadline, (done) => report('copy', done))
  report('flush', 0n)
  await draft.flush()
  report('flush', size)
  deadline.throwIfAborted()
  if (plan.verify) {
    // What is in the page cache is what was written, not what is on the medium.
    await binding().fadviseDontNeed(draft.fd)
    const copy = { fd: draft.fd, path: draft.path, start: info.offset }
    const extents = await findComparable(source, draft.fd, window)
    await compareContents(source, copy, extents, deadline, (done) => report('verify', done))
    report('verify', size)
  }
  deadline.throwIfAborted()
  report('switch', size)
  return result
}

/** From here on only a failure goes back. The draft's lock is held to the end: the original is still needed. */
async function publishAndSwitch(
  draft: Draft,
  source: Source,
  target: Handle,
  { overwrite, force }: Plan,
): Promise<void> {
  const copy = await files.fstat(draft.fd)
  if (typeof copy === 'number') throw explain({ call: 'fstat', errno: copy, path: draft.path })
  await draft.publish(overwrite)
  try {
    // Read-only, so that the filesystem of the copy can be remounted so.
    const backing = await openBacking({ path: draft.destination }, true, checkDeadline({}, 1_000))
    try {
      if (backing.inode !== copy.ino || backing.device !== copy.dev) {
        throw refusal('content-differs', 'open', 'is another file than the copy', { path: draft.destination })
      }
      await switchBackingFile(target, backing, source, force)
    } finally {
      await backing.close()
    }
  } catch (error) {
    await draft.takeBack()
    throw error
  }
}
