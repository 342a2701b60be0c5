/** A new image: a sparse file, or one whose blocks are reserved. */

import { constants } from 'node:os'
import { type Bytes, checkBoolean, checkBytes, checkOptions, wrongType, wrongValue } from '../common/arguments.ts'
import { CHANGING, checkDeadline, type Deadline, type Wait } from '../common/deadline.ts'
import { randomHex } from '../common/crypto.ts'
import { assertSupported, LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { fromCaller } from '../errors/from-caller.ts'
import { explained } from '../errors/given-up.ts'
import { type Bound, GivenUp, UNDOING, within } from '../kernel/bounded.ts'
import * as files from '../kernel/files.ts'

const { EEXIST, EINTR, EOPNOTSUPP, EPERM } = constants.errno

export interface CreateImageOptions extends Wait {
  /**
   * Reserves the blocks now, so that a full disk is an error here (`no-space`), and not lost writes in a mounted
   * filesystem later. fallocate(2). Default false: the file is sparse.
   */
  allocate?: boolean | undefined
  /** Replaces a file that exists, in one step; programs that have the old file open keep it. Default false. */
  overwrite?: boolean | undefined
}

/**
 * Makes an image of `size` bytes, which read as zeros. Its mode is 0600. No partial file ever appears at `path`, and a
 * failure leaves nothing behind.
 *
 * @throws LoopError `destination-exists`, `no-such-file` (the folder), `no-space`, `permission`, `timeout`,
 *   `unsupported-kernel` (the filesystem cannot reserve blocks)
 *
 * @example
 * ```ts
 * await createImage('new.img', 1 << 30)
 * ```
 */
export async function createImage(path: string, size: Bytes, options?: CreateImageOptions): Promise<void> {
  const given = checkOptions(options, ['allocate', 'overwrite', 'signal', 'timeout'])
  if (typeof path !== 'string') throw wrongType('path', 'a string', path)
  if (path === '') throw wrongValue('path', 'must not be empty')
  if (path.includes('\0')) throw wrongValue('path', 'must not contain a zero byte')
  const bytes = checkBytes('size', size)
  const allocate = given.allocate === undefined ? false : checkBoolean('allocate', given.allocate)
  const overwrite = given.overwrite === undefined ? false : checkBoolean('overwrite', given.overwrite)
  const deadline = checkDeadline(given, CHANGING)
  assertSupported()
  deadline.throwIfAborted()
  return await fromCaller(explained(() => create(path, bytes, { allocate, overwrite }, deadline), path))
}

async function create(
  path: string,
  bytes: bigint,
  { allocate, overwrite }: { allocate: boolean; overwrite: boolean },
  deadline: Deadline,
): Promise<void> {
  const { bound } = deadline
  const before = await files.lstat(path, bound)
  if (typeof before !== 'number') assertReplaceable(path, before.isFile(), overwrite)
  // Beside it: a file that is not whole never has the name.
  const slash = path.lastIndexOf('/')
  const draft = `${path.slice(0, slash + 1)}.${path.slice(slash + 1)}.loopctl-${randomHex(6)}`
  const fd = await files.open(draft, files.O_RDWR | files.O_CREAT | files.O_EXCL, 0o600, bound)
  if (fd < 0) throw explain({ call: 'open', errno: fd, path }, 'create destination')
  try {
    await resize(fd, path, bytes, bound)
    for (const [at, length] of allocate ? piecesOf(bytes) : []) await reserve(fd, path, at, length, bound)
    deadline.throwIfAborted()
    await name(draft, path, overwrite, bound)
  } catch (error) {
    await remove(draft)
    throw error
  } finally {
    await files.close(fd)
  }
}

/** Where the folder does not answer it is left behind: its name says whose it is. */
async function remove(draft: string): Promise<void> {
  try {
    await files.unlink(draft, UNDOING)
  } catch (error) {
    if (!(error instanceof GivenUp)) throw error
  }
}

function assertReplaceable(path: string, isFile: boolean, overwrite: boolean): void {
  if (!overwrite) throw destinationExists(path)
  if (isFile) return
  throw refusal('not-a-file-or-block-device', 'stat', 'is there, and no regular file', { path })
}

function destinationExists(path: string): LoopError {
  return refusal('destination-exists', 'open', 'there is a file of that name', {
    path,
    hint: 'take another name, or overwrite: true',
  })
}

async function resize(fd: number, path: string, size: bigint, bound: Bound): Promise<void> {
  const answer = await files.truncate(fd, Number(size), bound)
  if (answer < 0) throw explain({ call: 'ftruncate', errno: answer, path }, 'create destination')
}

/** A call that cannot be cut short should be none that takes long. */
const PIECE = 1n << 30n

function piecesOf(size: bigint): [at: bigint, length: bigint][] {
  return Array.from({ length: Number((size + PIECE - 1n) / PIECE) }, (_, i) => {
    const at = BigInt(i) * PIECE
    return [at, size - at < PIECE ? size - at : PIECE]
  })
}

async function reserve(fd: number, path: string, at: bigint, length: bigint, bound: Bound): Promise<void> {
  let answer = -EINTR
  while (answer === -EINTR) answer = await within(bound, path).fallocate(fd, 0, at, length)
  if (answer < 0) throw explain({ call: 'fallocate', errno: answer, path }, 'create destination')
}

/** Without `overwrite` by link(2), which replaces nothing. */
async function name(draft: string, path: string, overwrite: boolean, bound: Bound): Promise<void> {
  if (overwrite) return replace(draft, path, bound)
  const linked = await files.link(draft, path, bound)
  if (linked === -EEXIST) throw destinationExists(path)
  if (linked >= 0) return remove(draft)
  if (linked !== -EPERM && linked !== -EOPNOTSUPP) {
    throw explain({ call: 'link', errno: linked, path }, 'create destination')
  }
  // FAT has no links: an empty file takes the name first.
  const taken = await files.open(path, files.O_WRONLY | files.O_CREAT | files.O_EXCL, 0o600, bound)
  if (taken === -EEXIST) throw destinationExists(path)
  if (taken < 0) throw explain({ call: 'open', errno: taken, path }, 'create destination')
  await files.close(taken)
  try {
    await replace(draft, path, bound)
  } catch (error) {
    if (!LoopError.is(error, 'timeout')) await remove(path)
    throw error
  }
}

/** @throws `timeout` where it is not known which of the two files has the name, or is about to have it */
async function replace(draft: string, path: string, bound: Bound): Promise<void> {
  let renamed: number
  try {
    // The signal is not heard from here on.
    renamed = await files.rename(draft, path, { left: bound.left })
  } catch (error) {
    if (!(error instanceof GivenUp) || !error.hasBegun) throw error
    throw refusal('timeout', 'rename', 'its folder did not answer in time: the old file can be there, or the new one', {
      path,
      hint: 'see which it is when the folder answers again',
      cause: error,
    })
  }
  if (renamed < 0) throw explain({ call: 'rename', errno: renamed, path }, 'create destination')
}
