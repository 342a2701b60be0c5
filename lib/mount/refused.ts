/** Why a filesystem refused to be mounted: its own words where it has any, else what its superblock shows. */

import { constants } from 'node:os'
import type { Failure } from '../errors/causes.ts'
import { errnoDescription, LoopError, refusal } from '../errors/errors.ts'
import { diagnose, explain } from '../errors/explain.ts'
import { binding } from '../kernel/binding.ts'
import { faultOf, needsRecovery } from './detect.ts'
import type { Signature } from './superblocks.ts'

const { EACCES, EBUSY, EIO, ENODEV, ENOMEM, EPERM, EROFS } = constants.errno

/** Options with which a filesystem leaves its journal alone. */
const WITHOUT_RECOVERY: Readonly<Record<string, string>> = {
  ext3: 'noload',
  ext4: 'noload',
  xfs: 'norecovery',
  btrfs: 'rescue=nologreplay',
}

/** What the caller was about to mount. */
export interface Attempt {
  fsType: string
  /** The node that is mounted. */
  source: string
  /** Of the whole device. */
  number: number
  /** The handle's own descriptor, which does not count as a holder. */
  fd: number
  beginning: Buffer
}

/** The messages that wait in the filesystem context, errors before warnings, without the kernel's letter in front. */
export function readMessages(context: number): string[] {
  const messages: string[] = []
  const bytes = Buffer.alloc(4096)
  // The kernel keeps no more than eight.
  for (let i = 0; i < 8; i++) {
    const length = binding().fsMessageSync(context, bytes)
    if (length <= 0) break
    messages.push(bytes.toString('utf8', 0, length).trimEnd())
  }
  return messages
    .toSorted((a, b) => Number(b.startsWith('e ')) - Number(a.startsWith('e ')))
    .map((message) => message.replace(/^[ewi] /, ''))
}

/** The error for an option that the kernel did not take. */
export function refusedOption(attempt: Attempt, option: string, errno: number, messages: string[]): LoopError {
  if (errno === -EPERM || errno === -ENOMEM) return explain(failureOf('fsconfig', attempt, errno))
  const said = messages.length > 0 ? messages.join('; ') : errnoDescription(errno)
  return refused('fsconfig', attempt, errno, `${said} (option ${option})`)
}

/** The error for a filesystem that the kernel does not have. */
export function refusedType(attempt: Attempt, errno: number): LoopError {
  if (errno !== -ENODEV) return explain(failureOf('fsopen', attempt, errno))
  const detail = `this kernel has no filesystem ${attempt.fsType}`
  return refused(
    'fsopen',
    attempt,
    errno,
    detail,
    `load its module, modprobe ${attempt.fsType}, or take another kernel`,
  )
}

/** The error for a superblock that the kernel did not take. */
export async function refusedSuperblock(attempt: Attempt, errno: number, messages: string[]): Promise<LoopError> {
  const { fsType, beginning } = attempt
  if (errno === -EBUSY) return diagnose(failureOf('open', attempt, errno), 'open device')
  if (errno === -EPERM || errno === -ENOMEM) return explain(failureOf('fsconfig', attempt, errno))
  // That the device could not be opened, as 6.1 says of one that is read-only, is less than the errno says.
  const said = messages.filter((message) => !message.endsWith("Can't open blockdev"))
  if (said.length > 0) return refused('fsconfig', attempt, errno, said.join('; '))
  if (errno === -EROFS && (needsRecovery(fsType, beginning) || fsType in WITHOUT_RECOVERY)) {
    const option = WITHOUT_RECOVERY[fsType] ?? 'norecovery'
    return refused(
      'fsconfig',
      attempt,
      errno,
      'its journal has to be replayed, and the device is read-only',
      `mount it from a writable device, or without its journal: options: '${option}'`,
    )
  }
  if (errno === -EACCES) {
    return refused('fsconfig', attempt, errno, 'the device is read-only', 'mount it with readOnly: true')
  }
  const fault = faultOf(fsType, beginning)
  if (fault === undefined && errno === -EIO) return explain(failureOf('fsconfig', attempt, errno))
  const detail = fault ?? errnoDescription(errno)
  return refused('fsconfig', attempt, errno, detail, `the kernel log says more: dmesg | grep -i ${fsType}`)
}

/**
 * The error for a device on which no filesystem is known, or what is not mounted, or several.
 *
 * @param others what else there is: `but a partition table: ...`
 */
export function refuseUnknown(source: string, found: readonly Signature[], others: string | undefined): LoopError {
  const [first, second] = found
  if (first !== undefined && second === undefined) {
    return unknown(source, `there is ${first.title} on it, which is not mounted`, first.hint)
  }
  if (first !== undefined) {
    const titles = found.map(({ title }) => title).join(' and ')
    return unknown(source, `there are superblocks of ${titles} on it`, 'name the right one with fsType')
  }
  return others === undefined
    ? unknown(source, 'there is no filesystem on it that is known', 'name it with fsType, or make one with mkfs')
    : unknown(source, `there is no filesystem on it, ${others}`, 'name the partition')
}

function unknown(path: string, detail: string, hint: string | undefined): LoopError {
  return refusal('unknown-filesystem', 'read', detail, { path, hint })
}

function refused(call: string, { fsType, source }: Attempt, errno: number, detail: string, hint?: string): LoopError {
  return new LoopError({
    reason: 'filesystem-refused',
    errno,
    syscall: call,
    path: source,
    detail: detail.startsWith(`${fsType}: `) ? detail : `${fsType}: ${detail}`,
    hint,
  })
}

function failureOf(call: string, { source, number, fd }: Attempt, errno: number): Failure {
  return { call, errno, path: source, number, fd }
}
