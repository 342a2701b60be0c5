/**
 * The file that migrate() copies into. It has no name until it is whole (O_TMPFILE), so nobody can plant, open, lock or
 * remove it by one; where the filesystem cannot do that, it has a random name beside the destination, and is known by
 * its inode. For its owner only until the device is backed by it.
 */

import { constants } from 'node:os'
import { randomHex } from '../common/crypto.ts'
import type { Deadline } from '../common/deadline.ts'
import { explain } from '../errors/explain.ts'
import { cleanUpAfter } from '../errors/given-up.ts'
import { type Bounded, within } from '../kernel/bounded.ts'
import { writeOut } from '../kernel/extents.ts'
import { closeSoon } from '../kernel/files.ts'
import * as folder from '../kernel/folder.ts'
import { readUmask } from '../kernel/process.ts'
import type { Stat } from '../kernel/uapi.ts'
import type { Owner } from './copy.ts'
import { assertNotOver } from './progress.ts'

const { EINVAL, EISDIR, ENOSYS, ENOTSUP } = constants.errno

/** Where there is no O_TMPFILE: older kernels take it for O_DIRECTORY. */
const NO_TMPFILE = new Set([-ENOTSUP, -EISDIR, -EINVAL, -ENOSYS])

const NAME_MAX = 255
const MARK = '.loopctl-'
const RANDOM_BYTES = 6

/** Milliseconds for what takes back a change that has failed. */
export const UNDOING = 1_000

/** A name beside the destination that nobody can know before: `.NAME.loopctl-RANDOM`. */
export function makeSideName(name: string): string {
  const room = NAME_MAX - `.${MARK}`.length - 2 * RANDOM_BYTES
  // In bytes, and no half character at the end
  const stem = new TextDecoder().decode(Buffer.from(name).subarray(0, room), { stream: true })
  return `.${stem}${MARK}${randomHex(RANDOM_BYTES)}`
}

/** Written to the medium at a time, in bytes: the signal is heard and progress shown in between. */
const SLICE = 64n << 20n
const MOST_SLICES = 256n

export class Draft {
  #fd: number
  /** For messages. */
  readonly path: string
  /** The name in the folder until it has that of the destination; undefined: it has none. */
  name: string | undefined
  readonly stat: Stat
  readonly #deadline: Deadline
  readonly #calls: Bounded

  private constructor(fd: number, path: string, name: string | undefined, stat: Stat, deadline: Deadline) {
    this.#fd = fd
    this.path = path
    this.name = name
    this.stat = stat
    this.#deadline = deadline
    this.#calls = within(deadline.bound, path)
  }

  /**
   * @param place the folder, and the name that the file is to have
   * @throws `no-such-file`, `permission`, `no-space`, `io`
   */
  static async create(place: { folder: number; name: string; path: string }, deadline: Deadline): Promise<Draft> {
    const calls = within(deadline.bound, place.path)
    let name: string | undefined
    let fd = await folder.makeNamelessFile(calls, place.folder)
    if (NO_TMPFILE.has(fd)) {
      name = makeSideName(place.name)
      fd = await folder.makeFile(calls, place.folder, name)
    }
    if (fd < 0) throw explain({ call: 'open', errno: fd, path: place.path }, 'create destination')
    try {
      const stat = await folder.statFile(calls, fd)
      if (typeof stat === 'number') {
        throw explain({ call: 'fstat', errno: stat, path: place.path }, 'create destination')
      }
      // Whoever finds it under its name before the device is backed by it finds it locked.
      folder.lockFile(fd)
      // Of the folder's default ACL: it would let others in as soon as the group may read. Mostly there is none.
      await folder.removeAcl(calls, fd)
      return new Draft(fd, place.path, name, stat, deadline)
    } catch (error) {
      const made = name
      await cleanUpAfter(error, async () => {
        deadline.renew(UNDOING)
        if (made !== undefined) await folder.unlinkName(calls, place.folder, made)
      })
      await closeSoon(fd)
      throw error
    }
  }

  get fd(): number {
    return this.#fd
  }

  /**
   * Goes on with another descriptor of it, opened by its name for reading. With the old one closed no other open file has
   * it, which a lease can tell: then no other loop device has it either. False: somebody else has locked it meanwhile.
   */
  async reopened(fd: number): Promise<boolean> {
    await closeSoon(this.#fd)
    this.#fd = fd
    return folder.lockFile(fd) !== -constants.errno.EAGAIN
  }

  /** fsync(2), in slices. */
  async flush(size: bigint, onSlice: (done: bigint) => void): Promise<void> {
    const slice = size / MOST_SLICES > SLICE ? size / MOST_SLICES : SLICE
    for (let at = 0n; at < size; at += slice) {
      assertNotOver(this.#deadline, this.path)
      // fsync(2) says what is wrong.
      if ((await writeOut(this.#calls, this.#fd, at, at + slice)) < 0) break
      if (at + slice < size) onSlice(at + slice)
    }
    const answer = await this.#calls.fsync(this.#fd)
    if (answer < 0) throw explain({ call: 'fsync', errno: answer, path: this.path }, 'create destination')
    onSlice(size)
  }

  /**
   * The owner, group and permissions of the source, as far as this process may give them: nobody but the owner may
   * write, and nobody may read who could not read the source. The device is backed by it, so nothing of this can fail it.
   */
  async takeOwner({ user, group, mode }: Owner): Promise<void> {
    const both = await this.#calls.fchown(this.#fd, user ?? -1, group)
    const keepsGroup = both === 0 || (await this.#calls.fchown(this.#fd, -1, group)) === 0
    const allowed = mode & 0o755 & ~readUmask()
    const others = allowed & 0o005
    await this.#calls.fchmod(this.#fd, keepsGroup ? allowed : allowed & (0o705 | (others << 3)))
    await this.#calls.fsync(this.#fd)
  }

  /** What is in the page cache is what was written, not what is on the medium: it is let go of. */
  async dropCache(): Promise<void> {
    await this.#calls.fadviseDontNeed(this.#fd)
  }

  async close(): Promise<void> {
    // A device that is backed by this descriptor would hold the lock for as long as it is attached.
    folder.unlockFile(this.#fd)
    await closeSoon(this.#fd)
  }
}
