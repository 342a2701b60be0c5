/**
 * Files relative to an open folder: whoever may rename and link in the folders above cannot lead a name elsewhere
 * between two calls. Answers are a value, or the negative errno.
 */

import { constants } from 'node:os'
import { binding } from './binding.ts'
import { type Bound, type Bounded, within } from './bounded.ts'
import { closeSoon, O_NONBLOCK, O_PATH, O_RDONLY, O_RDWR } from './files.ts'
import { decodeStat, encodePath, little, newStat, type Stat } from './uapi.ts'

const { O_DIRECTORY, O_NOFOLLOW } = process.getBuiltinModule('node:fs').constants
/** Not in node:fs; __O_TMPFILE is the same on all of Linux's architectures. */
const O_TMPFILE = 0o20000000 | O_DIRECTORY

export const AT_FDCWD = -100
const AT_SYMLINK_NOFOLLOW = 0x100
export const AT_STATX_DONT_SYNC = 0x4000

const RENAME_NOREPLACE = 1
const RENAME_EXCHANGE = 2

const TYPE = 0o170000
const REGULAR = 0o100000
const LINK = 0o120000
const FOLDER = 0o040000
const BLOCK_DEVICE = 0o060000

const LOCK_EX_NB = 6
const LOCK_UN = 8

export function isRegular({ mode }: Stat): boolean {
  return (mode & TYPE) === REGULAR
}

export function isBlockDevice({ mode }: Stat): boolean {
  return (mode & TYPE) === BLOCK_DEVICE
}

/** `a symbolic link`, `a directory`. */
export function describeFileType({ mode }: Stat): string {
  const type = mode & TYPE
  if (type === REGULAR) return 'a regular file'
  return type === LINK ? 'a symbolic link' : type === FOLDER ? 'a directory' : 'not a regular file'
}

/** By device and inode. */
export function isSameFile(a: Pick<Stat, 'device' | 'inode'>, b: Pick<Stat, 'device' | 'inode'>): boolean {
  return a.device === b.device && a.inode === b.inode
}

/** A symbolic link that was not followed. */
export interface ForeignLink {
  path: string
  user: number
}

/** As many as the kernel follows. */
const MOST_LINKS = 40

/**
 * The folder at an absolute path as a place for names: it is not opened for reading. Links on the way to it are followed
 * only where root or this user made them: another's could lead to where he may not write himself.
 */
export async function openFolder(calls: Bounded, path: string): Promise<number | ForeignLink> {
  const walk = new Walk(calls, path)
  try {
    return await walk.run()
  } catch (error) {
    await walk.close()
    throw error
  }
}

class Walk {
  readonly #calls: Bounded
  readonly #words: string[]
  #links = 0
  /** Where it has come to. */
  #folder = -1
  /** What has the next word as its name. */
  #next = -1

  constructor(calls: Bounded, path: string) {
    this.#calls = calls
    this.#words = wordsOf(path)
  }

  async run(): Promise<number | ForeignLink> {
    this.#folder = await this.#open(AT_FDCWD, '/', O_DIRECTORY)
    for (let at = 0; this.#folder >= 0 && at < this.#words.length; at++) {
      const word = this.#words[at] ?? ''
      this.#next = await this.#open(this.#folder, word, O_NOFOLLOW)
      const stat = this.#next < 0 ? this.#next : await statFile(this.#calls, this.#next)
      if (typeof stat === 'number' || (stat.mode & TYPE) !== LINK) await this.#moveTo(this.#next)
      else if (isForeign(stat)) {
        await this.close()
        return { path: `/${this.#words.slice(0, at + 1).join('/')}`, user: stat.user }
      } else await this.#follow(word, at)
    }
    return this.#folder < 0 ? this.#folder : this.#asFolder()
  }

  #open(folder: number, name: string, flags: number): Promise<number> {
    return this.#calls.openat(folder, encodePath(name), O_PATH | flags)
  }

  /** A descriptor, or why there is none. */
  async #moveTo(folder: number): Promise<void> {
    const before = this.#folder
    this.#folder = folder
    if (this.#next === folder) this.#next = -1
    await closeSoon(before)
  }

  /** The link that is next. */
  async #follow(word: string, at: number): Promise<void> {
    const [target, answer] = await this.#readLink(word)
    await closeSoon(this.#next)
    this.#next = -1
    if (answer < 0 || ++this.#links > MOST_LINKS) {
      if (target === undefined && answer >= 0) await closeSoon(answer)
      await this.#moveTo(answer < 0 ? answer : -constants.errno.ELOOP)
    } else if (target === undefined) {
      await this.#moveTo(answer)
    } else {
      if (target.startsWith('/')) await this.#moveTo(await this.#open(AT_FDCWD, '/', O_DIRECTORY))
      this.#words.splice(at + 1, 0, ...wordsOf(target))
    }
  }

  /** The text of a link; in /proc, where the text is not what it leads to, the folder itself as the answer. */
  async #readLink(name: string): Promise<[text: string | undefined, number]> {
    const filesystem = await statFilesystem(this.#calls, this.#next)
    if (typeof filesystem !== 'number' && filesystem.type === PROC_SUPER_MAGIC) {
      return [undefined, await this.#open(this.#folder, name, O_DIRECTORY)]
    }
    const bytes = new Uint8Array(LINK_SIZE)
    const length = await this.#calls.readLink(this.#next, bytes)
    return [Buffer.from(bytes.subarray(0, Math.max(length, 0))).toString(), length]
  }

  /** ENOTDIR where it is none. */
  async #asFolder(): Promise<number> {
    const stat = await statFile(this.#calls, this.#folder)
    if (typeof stat !== 'number' && (stat.mode & TYPE) === FOLDER) return this.#folder
    await this.close()
    return typeof stat === 'number' ? stat : -constants.errno.ENOTDIR
  }

  async close(): Promise<void> {
    for (const fd of [this.#next, this.#folder]) await closeSoon(fd)
  }
}

const PROC_SUPER_MAGIC = 0x9fa0n
const LINK_SIZE = 4096

function isForeign({ user }: Stat): boolean {
  return user !== 0 && user !== process.geteuid?.()
}

function wordsOf(path: string): string[] {
  return path.split('/').filter((word) => word !== '' && word !== '.')
}

/** Names in the folder are on its medium: fsync(2) of it. */
export async function flushFolder(calls: Bounded, folder: number): Promise<number> {
  const fd = await calls.openat(folder, encodePath('.'), O_RDONLY | O_DIRECTORY)
  if (fd < 0) return fd
  try {
    return await calls.fsync(fd)
  } finally {
    await closeSoon(fd)
  }
}

async function statWith(call: (stat: Uint8Array) => Promise<number>): Promise<Stat | number> {
  const bytes = newStat()
  const answer = await call(bytes)
  return answer < 0 ? answer : decodeStat(bytes)
}

export function statFile(calls: Bounded, fd: number): Promise<Stat | number> {
  return statWith((bytes) => calls.statx(fd, bytes))
}

/** A link is not followed. */
export function statName(calls: Bounded, folder: number, name: string): Promise<Stat | number> {
  return statWith((bytes) => calls.statxMount(folder, encodePath(name), AT_SYMLINK_NOFOLLOW, bytes))
}

/** What the kernel has at hand of it: no server is asked. Links are followed. */
export function statCached(path: string, bound?: Bound): Promise<Stat | number> {
  return statWith((bytes) => within(bound).statxMount(AT_FDCWD, encodePath(path), AT_STATX_DONT_SYNC, bytes))
}

/** A file and what it is. */
export interface OpenFile {
  fd: number
  stat: Stat
}

/**
 * Opens a regular file for reading. What is at the path or name is looked at before it is opened, by a descriptor
 * (O_PATH) that is then the one that is opened: nothing else than a regular file is, whoever puts whatever there
 * meanwhile. Links are followed for a path, not for a name in a folder. EINVAL: it is none.
 */
export async function openRegularFile(calls: Bounded, name: string, folder?: number): Promise<OpenFile | number> {
  const follow = folder === undefined ? 0 : O_NOFOLLOW
  const place = await calls.openat(folder ?? AT_FDCWD, encodePath(name), O_PATH | follow)
  if (place < 0) return place
  try {
    const stat = await statFile(calls, place)
    if (typeof stat === 'number') return stat
    if (!isRegular(stat)) return -constants.errno.EINVAL
    const fd = await calls.reopenFile(place, O_RDONLY | O_NONBLOCK)
    if (fd < 0) return fd
    // It may go to the kernel.
    binding().fcntlSetFlSync(fd, 0)
    return { fd, stat }
  } finally {
    await closeSoon(place)
  }
}

/** A file without a name (O_TMPFILE), for its owner only. EOPNOTSUPP or EISDIR where the filesystem cannot. */
export function makeNamelessFile(calls: Bounded, folder: number): Promise<number> {
  return calls.openat(folder, encodePath('.'), O_TMPFILE | O_RDWR)
}

/** A new file, for its owner only. EEXIST where there is anything of that name, a link too. */
export function makeFile(calls: Bounded, folder: number, name: string): Promise<number> {
  return calls.createat(folder, encodePath(name), O_NOFOLLOW | O_RDWR)
}

/** A (first or further) name for an open file. EEXIST where there is anything of that name. */
export async function linkFile(calls: Bounded, fd: number, folder: number, name: string): Promise<number> {
  const answer = await calls.linkFile(fd, folder, encodePath(name))
  // Without CAP_DAC_READ_SEARCH
  return answer === -constants.errno.ENOENT ? calls.linkProcFile(fd, folder, encodePath(name)) : answer
}

/** Replaces what has the new name. */
export function renameName(calls: Bounded, folder: number, from: string, to: string): Promise<number> {
  return calls.renameat2(folder, encodePath(from), encodePath(to), 0)
}

/** EEXIST where the new name is taken; EINVAL where the filesystem cannot tell at once. */
export function renameToFree(calls: Bounded, folder: number, from: string, to: string): Promise<number> {
  return calls.renameat2(folder, encodePath(from), encodePath(to), RENAME_NOREPLACE)
}

/** Two names change places at once. EINVAL where the filesystem cannot. */
export function exchangeNames(calls: Bounded, folder: number, one: string, other: string): Promise<number> {
  return calls.renameat2(folder, encodePath(one), encodePath(other), RENAME_EXCHANGE)
}

export function unlinkName(calls: Bounded, folder: number, name: string): Promise<number> {
  return calls.unlinkat(folder, encodePath(name), 0)
}

/** flock(2), exclusively and without waiting: EAGAIN where another open file has the lock. */
export function lockFile(fd: number): number {
  return binding().flockSync(fd, LOCK_EX_NB)
}

export function unlockFile(fd: number): void {
  binding().flockSync(fd, LOCK_UN)
}

/** A POSIX ACL that the file has from its folder's default ACL. */
export function removeAcl(calls: Bounded, fd: number): Promise<number> {
  return calls.fremovexattr(fd, encodePath('system.posix_acl_access'))
}

const STATFS_SIZE = 48
const ST_RDONLY = 1n

export interface FilesystemState {
  /** Its magic number. */
  type: bigint
  readOnly: boolean
  /** Bytes that this user may still write; undefined where the filesystem does not tell (ramfs). */
  room: bigint | undefined
}

export async function statFilesystem(calls: Bounded, fd: number): Promise<FilesystemState | number> {
  const bytes = new Uint8Array(STATFS_SIZE)
  const answer = await calls.fstatfs(fd, bytes)
  if (answer < 0) return answer
  const data = new DataView(bytes.buffer)
  const [type = 0n, flags = 0n, blockSize = 0n, blocks = 0n, free = 0n, available = 0n] = Array.from(
    { length: STATFS_SIZE / 8 },
    (_, i) => data.getBigUint64(8 * i, little),
  )
  const usable = process.geteuid?.() === 0 ? free : available
  return { type, readOnly: (flags & ST_RDONLY) !== 0n, room: blocks === 0n ? undefined : usable * blockSize }
}
