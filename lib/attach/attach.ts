/** From a file to an attached device: everything checked before, verified after, undone when it fails. */

import { type BackingFile, checkBackingFile, checkBlockSize } from '../common/arguments.ts'
import { checkDeadline } from '../common/deadline.ts'
import { type Phase, runPhases } from '../common/phases.ts'
import { assertSupported } from '../errors/errors.ts'
import { explainGivenUp } from '../errors/given-up.ts'
import type { Handle } from '../handle/handle.ts'
import { pageSize } from '../kernel/features.ts'
import { pathOfDescriptor } from '../kernel/process.ts'
import { Attaching } from './attaching.ts'
import { FreeDevice } from './device.ts'
import { type AttachOptions, checkWanted } from './options.ts'
import { BackingPhase, ReleaseBackingPhase, WindowPhase } from './phases/backing.ts'
import { ConfigurePhase, DevicePhase, VerifyPhase } from './phases/device.ts'
import { HandlePhase, PartitionsPhase } from './phases/handle.ts'
import { ControlPhase, LockPhase, UnlockPhase } from './phases/lock.ts'
import { GuardPhase, LookPhase } from './phases/overlap.ts'
import { TurnPhase } from './phases/turn.ts'
import { WarningsPhase } from './phases/warnings.ts'
import { Refusals } from './refusals.ts'

/**
 * Attaches `file` to a device and returns the handle that owns it.
 *
 * @param given checked by checkOptions()
 * @param avoid a number that is not to be taken, since it is meant for another attach
 * @throws TypeError, RangeError, LoopError, or the signal's reason
 */
export async function attachFile(file: BackingFile, given: AttachOptions, avoid?: number): Promise<Handle> {
  const argument = checkBackingFile(file)
  const wanted = checkWanted(given)
  const deadline = checkDeadline(given, 10_000)
  assertSupported()
  // K1, 6.11 and later: one that the kernel refuses leaves the device half configured.
  if (typeof wanted.blockSize === 'number') checkBlockSize('blockSize', wanted.blockSize, pageSize())

  const work = new Attaching(argument, wanted, deadline)
  const turn = new TurnPhase(work)
  const asked = 'path' in argument ? argument.path.toString() : undefined
  try {
    await runPhases([turn, ...phasesOf(work, turn, avoid)], deadline, asked)
  } catch (error) {
    throw explainGivenUp(error, asked ?? ('fd' in argument ? pathOfDescriptor(argument.fd) : undefined))
  } finally {
    turn.end()
  }
  if (work.handle === undefined) throw new TypeError('the attach ended without a handle')
  return work.handle
}

/** After the turn, in their order. Undone in reverse: what is attached is detached before its device and its file are let go of. */
function phasesOf(work: Attaching, turn: TurnPhase, avoid: number | undefined): Phase[] {
  const { wanted, settings, deadline } = work
  const { number, createNode } = wanted
  const refusals = new Refusals(number, deadline)
  const free = new FreeDevice(
    { number, avoid, partscan: settings.partscan, createNode, bound: deadline.bound },
    refusals,
  )
  const lock = new LockPhase(work)
  const device = new DevicePhase(work, free, refusals, lock)
  return [
    new BackingPhase(work),
    new WindowPhase(work),
    new LookPhase(work),
    new ControlPhase(work),
    lock,
    device,
    new ConfigurePhase(work, refusals, device),
    new UnlockPhase(work, lock, turn),
    new GuardPhase(work),
    new VerifyPhase(work),
    new HandlePhase(work, free),
    new WarningsPhase(work),
    new ReleaseBackingPhase(work),
    new PartitionsPhase(work, free),
  ]
}
