/**
 * The place that a backing file is migrated to: a name in a folder that is opened once. Everything is named relative to
 * that descriptor, and what was found or made there is known by its inode, so others who may write to the folder can
 * make a migration fail and nothing else.
 */

import { constants } from 'node:os'
import { basename, dirname } from 'node:path'
import { type Backing, describeRegular } from '../attach/backing.ts'
import type { Deadline } from '../common/deadline.ts'
import { LoopError, refusal } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { type Bounded, within } from '../kernel/bounded.ts'
import { closeSoon } from '../kernel/files.ts'
import * as folder from '../kernel/folder.ts'
import type { LoopInfo64, Stat } from '../kernel/uapi.ts'
import { type Draft, makeSideName } from './draft.ts'
import { refuseAttachedOrSwap } from './overlap.ts'

const { EACCES, EAGAIN, EEXIST, EINVAL, ENOENT, ENOSYS } = constants.errno

/** renameat2(2) does not take these flags here. */
const NO_FLAGS = new Set([-EINVAL, -ENOSYS])

const ROLE = 'create destination'

/** A regular file that was at the destination, to be replaced: locked where it can be read, else `fd` is -1. */
export type Old = folder.OpenFile

interface Options {
  overwrite: boolean
  overlap: 'refuse' | 'allow'
  deadline: Deadline
}

async function nothing(): Promise<void> {}

function foreignLink(path: string, link: folder.ForeignLink): LoopError {
  return new LoopError({
    reason: 'permission',
    errno: -EACCES,
    syscall: 'open',
    path,
    detail: `the link ${link.path} on the way to it is of user ${link.user}, and not followed`,
    hint: 'name the folder by the path that the link leads to',
  })
}

export class Destination {
  readonly path: string
  readonly name: string
  readonly folder: number
  readonly #present: LoopInfo64
  readonly #options: Options
  readonly #calls: Bounded
  #old: Old | undefined
  /** What takes back what was done, the last first. */
  readonly #undo: (() => Promise<unknown>)[] = []
  /** What the file that is replaced is called until the switch has happened. */
  #oldName: string | undefined

  private constructor(path: string, fd: number, present: LoopInfo64, options: Options) {
    this.path = path
    this.name = basename(path)
    this.folder = fd
    this.#present = present
    this.#options = options
    this.#calls = within(options.deadline.bound, path)
  }

  /**
   * @param present what the device is backed by
   * @throws `no-such-file`, `destination-exists`, `not-a-file-or-block-device`, `contention`, `overlap`
   */
  static async open(path: string, present: LoopInfo64, options: Options): Promise<Destination> {
    const fd = await folder.openFolder(within(options.deadline.bound, path), dirname(path))
    if (typeof fd === 'object') throw foreignLink(path, fd)
    if (fd < 0) throw explain({ call: 'open', errno: fd, path: dirname(path) }, ROLE)
    const destination = new Destination(path, fd, present, options)
    try {
      await destination.#takeOld()
      return destination
    } catch (error) {
      await destination.close()
      throw error
    }
  }

  /** The file that is there is locked for as long as this is open. */
  async #takeOld(): Promise<void> {
    const { path, name } = this
    const there = await folder.statName(this.#calls, this.folder, name)
    if (there === -ENOENT) return
    if (typeof there === 'number') throw explain({ call: 'lstat', errno: there, path }, ROLE)
    if (folder.isSameFile(there, this.#present)) {
      throw refusal('destination-exists', 'lstat', 'is the file that the device is backed by', { path })
    }
    if (!this.#options.overwrite) {
      throw refusal('destination-exists', 'lstat', 'exists', { path, hint: 'overwrite: true replaces a file' })
    }
    if (!folder.isRegular(there)) throw this.#notReplaced(there)
    const opened = await folder.openRegularFile(this.#calls, name, this.folder)
    if (typeof opened === 'number') {
      if (opened === -EAGAIN || opened === -ENOENT || opened === -EINVAL) throw this.#contention()
      // Replacing it needs no right to read it, which locking does.
      this.#old = { fd: -1, stat: there }
    } else {
      this.#old = opened
      if (folder.lockFile(opened.fd) === -EAGAIN) throw this.#contention()
    }
    await this.refuseOldInUse()
  }

  /** @throws `overlap` where the file that is to be replaced is attached, or swapped to */
  async refuseOldInUse(): Promise<void> {
    if (this.#old === undefined || this.#options.overlap === 'allow') return
    await refuseAttachedOrSwap(this.path, this.#old, this.#options.deadline.bound)
  }

  #notReplaced(there: Stat): LoopError {
    const detail = `is ${folder.describeFileType(there)}, and is not replaced`
    return refusal('not-a-file-or-block-device', 'lstat', detail, { path: this.path })
  }

  #contention(): LoopError {
    return refusal('contention', 'flock', 'another migration to this place is under way, or its file is changing', {
      path: this.path,
    })
  }

  /**
   * Gives the whole copy its name, in exchange with a file that is to be replaced, and opens it by that name: from then
   * on the kernel tells it by this path. {@link takeBack} undoes it.
   *
   * @throws `destination-exists`, `contention`, `content-differs` where another file got there
   */
  async publish(draft: Draft): Promise<Backing> {
    if (this.#old === undefined) await this.#nameFirst(draft)
    else await this.#exchange(draft)
    await folder.flushFolder(this.#calls, this.folder)
    const opened = await folder.openRegularFile(this.#calls, this.name, this.folder)
    if (typeof opened === 'number' || !folder.isSameFile(opened.stat, draft.stat)) {
      if (typeof opened !== 'number') await closeSoon(opened.fd)
      throw refusal('content-differs', 'open', 'is another file than the copy', { path: this.path })
    }
    if (!(await draft.reopened(opened.fd))) throw this.#contention()
    // The draft closes it.
    return { ...describeRegular(opened.fd, opened.stat, this.path, false), close: nothing }
  }

  async #nameFirst(draft: Draft): Promise<void> {
    const answer = await this.#nameOnce(draft)
    if (answer === -EEXIST && this.#options.overwrite) {
      // It came while the copy was made.
      await this.#takeOld()
      if (this.#old !== undefined) return this.#exchange(draft)
      throw this.#contention()
    }
    if (answer < 0) throw explain({ call: 'rename', errno: answer, path: this.path }, ROLE)
  }

  /** Only where there is nothing of that name. */
  async #nameOnce(draft: Draft): Promise<number> {
    const { name } = draft
    this.#undo.push(() => this.#unlinkIf(this.name, draft.stat))
    if (name === undefined) return folder.linkFile(this.#calls, draft.fd, this.folder, this.name)
    let answer = await folder.renameToFree(this.#calls, this.folder, name, this.name)
    if (NO_FLAGS.has(answer)) {
      answer = await folder.linkFile(this.#calls, draft.fd, this.folder, this.name)
      // The second name goes with the draft.
      if (answer === 0 || answer === -EEXIST) return answer
      // No hard links either: a look has to do.
      const there = await folder.statName(this.#calls, this.folder, this.name)
      if (there !== -ENOENT) return typeof there === 'number' ? there : -EEXIST
      answer = await folder.renameName(this.#calls, this.folder, name, this.name)
    }
    if (answer === 0) draft.name = undefined
    return answer
  }

  async #exchange(draft: Draft): Promise<void> {
    const old = this.#old as Old
    const side = draft.name ?? makeSideName(this.name)
    if (draft.name === undefined) {
      // A file without a name can be exchanged with none.
      const linked = await folder.linkFile(this.#calls, draft.fd, this.folder, side)
      if (linked < 0) throw explain({ call: 'link', errno: linked, path: this.path }, ROLE)
      draft.name = side
    }
    const answer = await folder.exchangeNames(this.#calls, this.folder, side, this.name)
    if (NO_FLAGS.has(answer)) return this.#replace(draft, side)
    if (answer === -ENOENT) throw this.#contention()
    if (answer < 0) throw explain({ call: 'rename', errno: answer, path: this.path }, ROLE)
    draft.name = undefined
    this.#oldName = side
    this.#undo.push(async () => {
      if (await this.#isAt(this.name, draft.stat)) await folder.exchangeNames(this.#calls, this.folder, side, this.name)
      else await this.#nameAgain(side)
      await this.#unlinkIf(side, draft.stat)
    })
    if (!(await this.#isAt(side, old.stat))) throw this.#contention()
  }

  /** For filesystems that cannot exchange: what is replaced gets a second name first, or else another one. */
  async #replace(draft: Draft, side: string): Promise<void> {
    const old = this.#old as Old
    const kept = makeSideName(this.name)
    let answer = old.fd < 0 ? -ENOENT : await folder.linkFile(this.#calls, old.fd, this.folder, kept)
    if (answer < 0) answer = await folder.renameName(this.#calls, this.folder, this.name, kept)
    if (answer < 0) throw explain({ call: 'rename', errno: answer, path: this.path }, ROLE)
    this.#oldName = kept
    this.#undo.push(async () => {
      if (await this.#isAt(this.name, draft.stat)) await folder.renameName(this.#calls, this.folder, kept, this.name)
      else await this.#nameAgain(kept)
      // Where it has its own name still, this is a second one.
      if (await this.#isAt(this.name, old.stat)) await this.#unlinkIf(kept, old.stat)
    })
    if (!(await this.#isAt(kept, old.stat))) throw this.#contention()
    const there = await folder.statName(this.#calls, this.folder, this.name)
    if (typeof there !== 'number' && !folder.isSameFile(there, old.stat)) throw this.#contention()
    answer = await folder.renameName(this.#calls, this.folder, side, this.name)
    if (answer < 0) throw explain({ call: 'rename', errno: answer, path: this.path }, ROLE)
    draft.name = undefined
  }

  /** Gives a file the destination's name again, unless another file has got it: that one is not ours to move. */
  async #nameAgain(kept: string): Promise<void> {
    const answer = await folder.renameToFree(this.#calls, this.folder, kept, this.name)
    if (NO_FLAGS.has(answer) && (await folder.statName(this.#calls, this.folder, this.name)) === -ENOENT) {
      await folder.renameName(this.#calls, this.folder, kept, this.name)
    }
  }

  /** As if nothing had been published. */
  async takeBack(): Promise<void> {
    for (const undo of this.#undo.splice(0).toReversed()) await undo()
    this.#oldName = undefined
  }

  /** The switch has happened: what was replaced is needed no more. */
  async settle(): Promise<void> {
    this.#undo.length = 0
    if (this.#oldName !== undefined && this.#old) await this.#unlinkIf(this.#oldName, this.#old.stat)
    await folder.flushFolder(this.#calls, this.folder)
  }

  /** Removes what the draft is called beside the destination, where it is that. */
  async discard(draft: Draft): Promise<void> {
    try {
      if (draft.name !== undefined) await this.#unlinkIf(draft.name, draft.stat)
    } finally {
      await draft.close()
    }
  }

  async #isAt(name: string, wanted: Stat): Promise<boolean> {
    const there = await folder.statName(this.#calls, this.folder, name)
    return typeof there !== 'number' && folder.isSameFile(there, wanted)
  }

  async #unlinkIf(name: string, wanted: Stat): Promise<void> {
    if (await this.#isAt(name, wanted)) await folder.unlinkName(this.#calls, this.folder, name)
  }

  async close(): Promise<void> {
    if (this.#old !== undefined) await closeSoon(this.#old.fd)
    await closeSoon(this.folder)
  }
}
