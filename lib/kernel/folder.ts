/**
 * Files relative to an open folder: whoever may rename and link in the folders above cannot lead a name elsewhere
 * between two calls. Answers are a value, or the negative errno.
 */

import { constants } from 'node:os'
import { binding } from './binding.ts'
import { O_CREAT, O_EXCL, O_NONBLOCK, O_PATH, O_RDONLY, O_RDWR } from './files.ts'
import { decodeStat, encodePath, little, newStat, type Stat } from './uapi.ts'

const { O_DIRECTORY, O_NOFOLLOW } = process.getBuiltinModule('node:fs').constants
/** Not in node:fs; __O_TMPFILE is the same on all of Linux's architectures. */
const O_TMPFILE = 0o20000000 | O_DIRECTORY

const AT_FDCWD = -100
const AT_SYMLINK_NOFOLLOW = 0x100
const AT_STATX_DONT_SYNC = 0x4000

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
export async function openFolder(path: string): Promise<number | ForeignLink> {
  const words = wordsOf(path)
  let links = 0
  let folder = await binding().openAt(AT_FDCWD, encodePath('/'), O_PATH | O_DIRECTORY)
  for (let at = 0; folder >= 0 && at < words.length; at++) {
    const word = words[at] ?? ''
    const next = await binding().openAt(folder, encodePath(word), O_PATH | O_NOFOLLOW)
    const stat = next < 0 ? next : await statFile(next)
    if (typeof stat === 'number' || (stat.mode & TYPE) !== LINK) {
      await closeFile(folder)
      folder = next
      continue
    }
    const [target, answer] = await readLink(next, folder, word)
    await closeFile(next)
    const isForeign = stat.user !== 0 && stat.user !== process.geteuid?.()
    if (isForeign || answer < 0 || ++links > MOST_LINKS) {
      await closeFile(folder)
      if (isForeign) return { path: `/${words.slice(0, at + 1).join('/')}`, user: stat.user }
      return answer < 0 ? answer : -constants.errno.ELOOP
    }
    if (target === undefined) {
      await closeFile(folder)
      folder = answer
      continue
    }
    if (target.startsWith('/')) {
      await closeFile(folder)
      folder = await binding().openAt(AT_FDCWD, encodePath('/'), O_PATH | O_DIRECTORY)
    }
    words.splice(at + 1, 0, ...wordsOf(target))
  }
  return folder < 0 ? folder : asFolder(folder)
}

function wordsOf(path: string): string[] {
  return path.split('/').filter((word) => word !== '' && word !== '.')
}

/** The text of a link; in /proc, where the text is not what it leads to, the folder itself as the answer. */
async function readLink(link: number, folder: number, name: string): Promise<[text: string | undefined, number]> {
  const filesystem = await statFilesystem(link)
  if (typeof filesystem !== 'number' && filesystem.type === PROC_SUPER_MAGIC) {
    return [undefined, await binding().openAt(folder, encodePath(name), O_PATH | O_DIRECTORY)]
  }
  const bytes = new Uint8Array(LINK_SIZE)
  const length = await binding().readLink(link, bytes)
  return [Buffer.from(bytes.subarray(0, Math.max(length, 0))).toString(), length]
}

const PROC_SUPER_MAGIC = 0x9fa0n
const LINK_SIZE = 4096

/** ENOTDIR where it is none. */
async function asFolder(fd: number): Promise<number> {
  const stat = await statFile(fd)
  if (typeof stat !== 'number' && (stat.mode & TYPE) === FOLDER) return fd
  await closeFile(fd)
  return typeof stat === 'number' ? stat : -constants.errno.ENOTDIR
}

/** Names in the folder are on its medium: fsync(2) of it. */
export async function flushFolder(folder: number): Promise<number> {
  const fd = await binding().openAt(folder, encodePath('.'), O_RDONLY | O_DIRECTORY)
  if (fd < 0) return fd
  const answer = await binding().fsync(fd)
  await closeFile(fd)
  return answer
}

/** For descriptors that were opened here. */
export function closeFile(fd: number): Promise<number> {
  return binding().close(fd)
}

async function statWith(call: (stat: Uint8Array) => Promise<number>): Promise<Stat | number> {
  const bytes = newStat()
  const answer = await call(bytes)
  return answer < 0 ? answer : decodeStat(bytes)
}

export function statFile(fd: number): Promise<Stat | number> {
  return statWith((bytes) => binding().statx(fd, bytes))
}

/** A link is not followed. */
export function statName(folder: number, name: string): Promise<Stat | number> {
  return statWith((bytes) => binding().statxAt(folder, encodePath(name), AT_SYMLINK_NOFOLLOW, bytes))
}

/** What the kernel has at hand of it: no server is asked. Links are followed. */
export function statCached(path: string): Promise<Stat | number> {
  return statWith((bytes) => binding().statxAt(AT_FDCWD, encodePath(path), AT_STATX_DONT_SYNC, bytes))
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
export async function openRegularFile(name: string, folder?: number): Promise<OpenFile | number> {
  const follow = folder === undefined ? 0 : O_NOFOLLOW
  const place = await binding().openAt(folder ?? AT_FDCWD, encodePath(name), O_PATH | follow)
  if (place < 0) return place
  try {
    const stat = await statFile(place)
    if (typeof stat === 'number') return stat
    if (!isRegular(stat)) return -constants.errno.EINVAL
    const fd = await binding().reopenFile(place, O_RDONLY | O_NONBLOCK)
    if (fd < 0) return fd
    // It may go to the kernel.
    binding().fcntlSetFlSync(fd, 0)
    return { fd, stat }
  } finally {
    await closeFile(place)
  }
}

/** A file without a name (O_TMPFILE), for its owner only. EOPNOTSUPP or EISDIR where the filesystem cannot. */
export function makeNamelessFile(folder: number): Promise<number> {
  return binding().openAt(folder, encodePath('.'), O_TMPFILE | O_RDWR)
}

/** A new file, for its owner only. EEXIST where there is anything of that name, a link too. */
export function makeFile(folder: number, name: string): Promise<number> {
  return binding().openAt(folder, encodePath(name), O_CREAT | O_EXCL | O_NOFOLLOW | O_RDWR)
}

/** A (first or further) name for an open file. EEXIST where there is anything of that name. */
export async function linkFile(fd: number, folder: number, name: string): Promise<number> {
  const answer = await binding().linkFile(fd, folder, encodePath(name))
  // Without CAP_DAC_READ_SEARCH
  return answer === -constants.errno.ENOENT ? binding().linkProcFile(fd, folder, encodePath(name)) : answer
}

/** Replaces what has the new name. */
export function renameName(folder: number, from: string, to: string): Promise<number> {
  return binding().renameAt(folder, encodePath(from), encodePath(to), 0)
}

/** EEXIST where the new name is taken; EINVAL where the filesystem cannot tell at once. */
export function renameToFree(folder: number, from: string, to: string): Promise<number> {
  return binding().renameAt(folder, encodePath(from), encodePath(to), RENAME_NOREPLACE)
}

/** Two names change places at once. EINVAL where the filesystem cannot. */
export function exchangeNames(folder: number, one: string, other: string): Promise<number> {
  return binding().renameAt(folder, encodePath(one), encodePath(other), RENAME_EXCHANGE)
}

export function unlinkName(folder: number, name: string): Promise<number> {
  return binding().unlinkAt(folder, encodePath(name))
}

/** flock(2), exclusively and without waiting: EAGAIN where another open file has the lock. */
export function lockFile(fd: number): number {
  return binding().flockSync(fd, LOCK_EX_NB)
}

export function unlockFile(fd: number): void {
  binding().flockSync(fd, LOCK_UN)
}

/** A POSIX ACL that the file has from its folder's default ACL. */
export function removeAcl(fd: number): Promise<number> {
  return binding().fremovexattr(fd, encodePath('system.posix_acl_access'))
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

export async function statFilesystem(fd: number): Promise<FilesystemState | number> {
  const bytes = new Uint8Array(STATFS_SIZE)
  const answer = await binding().fstatfs(fd, bytes)
  if (answer < 0) return answer
  const data = new DataView(bytes.buffer)
  const [type = 0n, flags = 0n, blockSize = 0n, blocks = 0n, free = 0n, available = 0n] = Array.from(
    { length: STATFS_SIZE / 8 },
    (_, i) => data.getBigUint64(8 * i, little),
  )
  const usable = process.geteuid?.() === 0 ? free : available
  return { type, readOnly: (flags & ST_RDONLY) !== 0n, room: blocks === 0n ? undefined : usable * blockSize }
}
