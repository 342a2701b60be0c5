/** What is allowed and odd about the attachment, said with its handle. */

import { constants } from 'node:os'
import type { Phase } from '../../common/phases.ts'
import type { Sequence } from '../../kernel/sequence.ts'
import type { Attaching } from '../attaching.ts'
import type { Backing } from '../backing.ts'
import { isWrittenElsewhere, warnOfMounts, warnOfSettings, warnOfWriters } from '../warnings.ts'

const AGAIN = -constants.errno.EAGAIN

/** Before the backing file is let go of. It fails no attach. */
export class WarningsPhase implements Phase {
  readonly #work: Attaching
  #isDone = false
  /** What it was, also where it is closed already. */
  #backing: Backing | undefined
  #isWritten: boolean | undefined

  constructor(work: Attaching) {
    this.#work = work
  }

  get isDone(): boolean {
    return this.#isDone
  }

  /** In the usual case nobody else has the file, a regular one, open: GuardPhase has seen it, or it is asked here. */
  plan(sequence: Sequence): (() => void) | undefined {
    const work = this.#work
    const { argument, settings, wanted, backing } = work
    if (!('path' in argument) || backing?.rdevice !== undefined || settings.directIO !== false) return undefined
    const isLookedAt = wanted.overlap !== 'allow'
    // What is to be found out about the others wants the file open.
    if (isLookedAt && work.isUnshared === false) return undefined
    const probed = isLookedAt ? undefined : sequence.try(settings.readOnly ? 'leaseProbeRead' : 'leaseProbe', work.file)
    return () => {
      this.#backing = work.backing
      if (probed?.answer !== undefined) this.#isWritten = probed.answer === AGAIN
      if (isLookedAt && !work.isUnshared) return
      if (work.handle === undefined || work.backing === undefined || this.#isWritten === true) return
      warnOfSettings(work.handle, work.backing, settings, work.oddities)
      this.#isDone = true
    }
  }

  async byHand(): Promise<void> {
    const { handle, settings, oddities, isUnshared } = this.#work
    const backing = this.#work.backing ?? this.#backing
    this.#isDone = true
    if (handle === undefined || backing === undefined) return
    warnOfSettings(handle, backing, settings, oddities)
    // Whoever shares an attachment shares what its owner was told of the file.
    if (!handle.owned) return
    await warnOfMounts(handle, backing)
    const isWritten = this.#isWritten ?? (!isUnshared && isWrittenElsewhere(backing, settings))
    if (isWritten) await warnOfWriters(handle, backing, this.#work.deadline.bound)
  }
}
