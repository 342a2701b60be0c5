/** The folder that is mounted on: looked up once, step by step, and then known by descriptors. */

import { constants } from 'node:os'
import type { Deadline } from '../common/deadline.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { binding } from '../kernel/binding.ts'
import { GivenUp, UNDOING, within } from '../kernel/bounded.ts'
import { closeSync, O_PATH, open, readLinkSync } from '../kernel/files.ts'
import { Sequence } from '../kernel/sequence.ts'
import { decodeMountStat, encodePath, type MountStat, newStat } from '../kernel/uapi.ts'

const { ENOENT } = constants.errno

// include/uapi/linux/fcntl.h
const AT_FDCWD = -100
const AT_REMOVEDIR = 0x200
const AT_SYMLINK_NOFOLLOW = 0x100
const AT_EMPTY_PATH = 0x1000
const AT_NO_AUTOMOUNT = 0x800
/** As far as the kernel knows it: a server that does not answer is not asked. */
const AT_STATX_DONT_SYNC = 0x4000
const { O_DIRECTORY, O_NOFOLLOW } = process.getBuiltinModule('node:fs').constants

const S_IFMT = 0o170_000
const S_IFDIR = 0o040_000
const S_IFLNK = 0o120_000

/** Links in a row, as the kernel allows them. */
const MAX_LINKS = 40
/** The text of a link is shorter than that. */
const LINK_BYTES = 4096

/** The place of a mount in the tree: its name in its parent folder. Known even when something is mounted on it. */
export interface Place {
  /** A descriptor of the parent folder (O_PATH), which keeps neither mount busy. */
  readonly parent: number
  readonly name: string
  /** What the kernel calls it, for messages and mountinfo. */
  readonly path: string
}

/** A target that is looked up: its place, and the folder itself. */
export interface Target extends Place {
  readonly fd: number
  /** Made on the way. */
  readonly made: boolean
}

/** What the kernel says of the file or the mount that the descriptor is for. */
export function statDescriptor(fd: number): MountStat | undefined {
  return statMount(fd, '', AT_EMPTY_PATH)
}

/** {@link statDescriptor}, with a number of the mount that is never given out again (kernel 6.8). */
export function statUnique(fd: number): MountStat | undefined {
  const bytes = newStat()
  const answer = binding().statxMountUniqueSync(fd, encodePath(''), AT_EMPTY_PATH | AT_STATX_DONT_SYNC, bytes)
  return answer < 0 ? undefined : decodeMountStat(bytes)
}

/** A place, and which mount is on top of it: its two numbers, as of {@link statDescriptor} and {@link statUnique}. */
export interface Looked {
  place: Place
  id: bigint | undefined
  unique: bigint | undefined
}

const LOOK_FLAGS = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC

/** Looks at a place of a mount, in one hop: what is in a folder can be for a server to tell. */
export async function lookAt(path: string, deadline: Deadline): Promise<Looked> {
  const [folder, name] = splitPath(path)
  const sequence = new Sequence()
  const parent = sequence.call('openat', AT_FDCWD, encodePath(folder), O_PATH | O_DIRECTORY)
  const [plain, unique] = [newStat(), newStat()]
  const steps = [
    sequence.try('statxMount', parent, encodePath(name), LOOK_FLAGS, plain),
    sequence.try('statxMountUnique', parent, encodePath(name), LOOK_FLAGS, unique),
  ]
  await sequence.run(deadline.bound, path)
  if (!parent.succeeded) throw cannotOpen(parent.answer ?? -ENOENT, path)
  const [id, forever] = [plain, unique].map((bytes, i) =>
    steps[i]?.succeeded ? decodeMountStat(bytes).mountId : undefined,
  )
  return { place: { parent: parent.fd, name, path }, id, unique: forever }
}

/** {@link lookAt}, at once. */
export function lookAtSync(path: string): Looked {
  const [folder, name] = splitPath(path)
  const parent = binding().openatSync(AT_FDCWD, encodePath(folder), O_PATH | O_DIRECTORY)
  if (parent < 0) throw cannotOpen(parent, path)
  const [plain, unique] = [newStat(), newStat()]
  const told = binding().statxMountSync(parent, encodePath(name), LOOK_FLAGS, plain)
  const toldUnique = binding().statxMountUniqueSync(parent, encodePath(name), LOOK_FLAGS, unique)
  return {
    place: { parent, name, path },
    id: told < 0 ? undefined : decodeMountStat(plain).mountId,
    unique: toldUnique < 0 ? undefined : decodeMountStat(unique).mountId,
  }
}

/** What the kernel says of the file that the path of procfs stands for. */
export function statMagicLink(path: string): MountStat | undefined {
  return statMount(-1, path, 0)
}

function statMount(folder: number, name: string, flags: number): MountStat | undefined {
  const bytes = newStat()
  const answer = binding().statxMountSync(folder, encodePath(name), flags | AT_STATX_DONT_SYNC, bytes)
  return answer < 0 ? undefined : decodeMountStat(bytes)
}

/**
 * Looks up the folder. A link at the end is followed only where nobody but root and the caller can have put it there.
 *
 * @throws `target`, `permission`, GivenUp
 */
export async function openTarget(target: string, make: boolean, deadline: Deadline): Promise<Target> {
  let path = await toAbsolute(target, deadline)
  for (let links = 0; links <= MAX_LINKS; links++) {
    let place = await openBoth(path, target, deadline)
    try {
      if (make && place.fd === -ENOENT) place = await makeFolder(place, target, deadline)
      const found = await asFolder(place, target, deadline)
      if (typeof found !== 'string') return found
      path = found
    } catch (error) {
      await undoTarget(place)
      closeTarget(place)
      throw error
    }
    closeTarget(place)
  }
  throw refusal('target', 'open', 'there are too many symbolic links', { path: target })
}

/** Removes the folder where it was made on the way. */
export async function undoTarget({ made, parent, name, path }: Target): Promise<void> {
  if (!made) return
  try {
    await within(UNDOING, path).unlinkat(parent, encodePath(name), AT_REMOVEDIR)
  } catch (error) {
    if (!(error instanceof GivenUp)) throw error
  }
}

export function closeTarget({ fd, parent }: Pick<Target, 'fd' | 'parent'>): void {
  close(fd)
  close(parent)
}

/** At once: descriptors that are for a path, or for a mount that has others, have nothing to wait for. */
export function close(fd: number): void {
  if (fd >= 0) closeSync(fd)
}

/** The place, and a descriptor of what is there, or the negative errno: in one hop, so that both can be given up. */
async function openBoth(path: string, target: string, deadline: Deadline): Promise<Target> {
  const [folder, name] = splitPath(path)
  const sequence = new Sequence()
  const parent = sequence.call('openat', AT_FDCWD, encodePath(folder), O_PATH | O_DIRECTORY)
  const entry = sequence.call('openat', parent, encodePath(name), O_PATH | O_NOFOLLOW)
  await sequence.run(deadline.bound, target)
  if (!parent.succeeded) throw cannotOpen(parent.answer ?? -ENOENT, target)
  return { parent: parent.fd, name, path, fd: entry.answer ?? -ENOENT, made: false }
}

/** Makes the folder at the place, where nothing is. */
async function makeFolder(place: Target, target: string, deadline: Deadline): Promise<Target> {
  const { parent, name } = place
  const sequence = new Sequence()
  const made = sequence.call('mkdirat', parent, encodePath(name), 0o755)
  const entry = sequence.call('openat', parent, encodePath(name), O_PATH | O_NOFOLLOW)
  await sequence.run(deadline.bound, target)
  if (!made.succeeded) throw explain({ call: 'mkdir', errno: made.answer ?? -ENOENT, path: target }, 'target')
  return { ...place, fd: entry.answer ?? -ENOENT, made: true }
}

/** The folder that is at the place, or the path that a link there leads to. */
async function asFolder(place: Target, target: string, deadline: Deadline): Promise<Target | string> {
  const { fd } = place
  if (fd < 0) throw cannotOpen(fd, target)
  const type = (statDescriptor(fd)?.mode ?? 0) & S_IFMT
  if (type === S_IFLNK) return followLink(place, target, deadline)
  if (type !== S_IFDIR) {
    throw refusal('target', 'open', 'it is not a folder, and a filesystem can only be mounted on a folder', {
      path: target,
    })
  }
  const told = readLinkSync(`/proc/self/fd/${fd}`)
  return { ...place, path: typeof told === 'string' ? told : place.path }
}

/** The path that it leads to. */
async function followLink({ parent, fd }: Target, target: string, deadline: Deadline): Promise<string> {
  const folder = statDescriptor(parent)
  const isTrusted = folder !== undefined && (folder.uid === 0 || folder.uid === process.geteuid?.())
  if (!isTrusted || (folder.mode & 0o022) !== 0) {
    throw refusal('target', 'open', 'is a symbolic link in a folder that others can write to', {
      path: target,
      hint: 'name the folder that it leads to',
    })
  }
  const here = readLinkSync(`/proc/self/fd/${parent}`)
  const bytes = Buffer.alloc(LINK_BYTES)
  const length = await within(deadline.bound, target).readLink(fd, bytes)
  if (length < 0) throw explain({ call: 'readlink', errno: length, path: target }, 'target')
  if (typeof here !== 'string') throw explain({ call: 'readlink', errno: here, path: target }, 'target')
  const link = bytes.toString('utf8', 0, length)
  const text = link.startsWith('/') ? link : `${here === '/' ? '' : here}/${link}`
  return withoutSlashes(text)
}

/** The folder that an absolute path leads to, and the name in it. */
function splitPath(path: string): [folder: string, name: string] {
  const slash = path.lastIndexOf('/')
  return [path.slice(0, slash) || '/', path.slice(slash + 1)]
}

/** Without what would name no entry of a folder at its end. */
async function toAbsolute(target: string, deadline: Deadline): Promise<string> {
  const text = withoutSlashes(target.startsWith('/') ? target : `${process.cwd()}/${target}`)
  const last = text.slice(text.lastIndexOf('/') + 1)
  if (last !== '.' && last !== '..' && last !== '') return text
  const fd = await open(text, O_PATH | O_DIRECTORY, 0, deadline.bound)
  if (fd < 0) throw cannotOpen(fd, target)
  const path = readLinkSync(`/proc/self/fd/${fd}`)
  close(fd)
  if (typeof path === 'string' && path !== '/') return path
  throw refusal('target', 'open', 'is the root of the tree, where nothing can be mounted or unmounted', {
    path: target,
  })
}

function withoutSlashes(path: string): string {
  return path.replace(/(?<=.)\/+$/, '')
}

function cannotOpen(errno: number, target: string): LoopError {
  return explain({ call: 'open', errno, path: target }, 'target')
}
