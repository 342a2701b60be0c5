/** From a failed call to the LoopError that names its cause. */

import { ANY_CALL, CAUSES, type Role } from './causes.ts'
import { errnoDescription, errnoName, LoopError } from './errors.ts'
import { askStatus, type Failure, type Text } from './evidence.ts'
import { findHoldersSoon } from './holders.ts'

/** The LoopError for a call that the kernel refused. Reads what does not wait. */
export function explain(failure: Failure, role?: Role): LoopError {
  const { call, errno, path, backingFile, holders, effort } = failure
  const code = errnoName(errno)
  const candidates = [...(CAUSES[role ?? call]?.[code] ?? []), ...(ANY_CALL[code] ?? [])]
  const cause = candidates.find(({ when }) => when === undefined || when(failure))
  const detail = said(cause?.detail, failure) ?? errnoDescription(errno)
  const isIoctl = /^[A-Z]/.test(call)
  return new LoopError({
    reason: cause?.reason ?? 'unknown',
    errno,
    syscall: isIoctl ? 'ioctl' : call,
    ioctl: isIoctl ? call : undefined,
    path,
    backingFile,
    holders,
    detail: effort === undefined ? detail : `${detail} (${effort})`,
    hint: said(cause?.hint, failure),
  })
}

/** Failures whose cause LOOP_GET_STATUS64 helps to tell. */
const ASKED_FOR = new Set(['EBUSY', 'EINVAL'])

/** The failure, with what the device says of itself within 50 ms where that helps to tell the cause. */
export async function withStatus(failure: Failure): Promise<Failure> {
  if (failure.status !== undefined || !ASKED_FOR.has(errnoName(failure.errno))) return failure
  return { ...failure, status: await askStatus(failure) }
}

/** {@link explain}, after asking the device what it is and, where somebody uses it, looking who. */
export async function diagnose(failure: Failure, role?: Role): Promise<LoopError> {
  const known = await withStatus(failure)
  const error = explain(known, role)
  const { number, fd, holders } = failure
  if (error.reason !== 'in-use' || number === undefined || holders) return error
  const found = await findHoldersSoon(number, fd === undefined ? [] : [fd])
  return found.length > 0 ? explain({ ...known, holders: found }, role) : error
}

function said(text: Text | undefined, failure: Failure): string | undefined {
  return typeof text === 'function' ? text(failure) : text
}
