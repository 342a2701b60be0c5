/** The file that migrate() copies into: made beside the destination, named only when it is whole, removed when it is not. */

import { constants } from 'node:os'
import { basename, dirname } from 'node:path'
import { randomHex, sha256 } from '../common/digest.ts'
import { refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { binding } from '../kernel/binding.ts'
import * as files from '../kernel/files.ts'

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
export async function removeLeftovers(path: string): Promise<void> {
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
export class Draft {
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
