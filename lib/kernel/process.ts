/** /proc/self: what this process may do. */

import { binding } from './binding.ts'
import { readFileSync, readLinkSync } from './files.ts'

export const CAP_DAC_OVERRIDE = 1n
export const CAP_SYS_ADMIN = 21n
export const CAP_MKNOD = 27n

export interface Privileges {
  uid: number
  /** A bit each, in effect; in a user namespace they count for what belongs to that. */
  capabilities: bigint
  /** Whether a seccomp filter looks at the system calls. */
  filtered: boolean
  /** Whether this is a user namespace other than the machine's: its root has no rights on devices. */
  inUserNamespace: boolean
}

/** What /proc does not tell is taken for not given. */
export function readPrivileges(): Privileges {
  const status = textOf('/proc/self/status')
  const capabilities = /^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1] ?? '0'
  const uids = readFileSync('/proc/self/uid_map')
  return {
    uid: process.geteuid?.() ?? -1,
    capabilities: BigInt(`0x${capabilities}`),
    filtered: /^Seccomp:\s*2$/m.test(status),
    // The machine's own maps every user to itself; without user namespaces there is no such file.
    inUserNamespace: typeof uids !== 'number' && uids.toString().trim().split(/\s+/).join(' ') !== '0 0 4294967295',
  }
}

export function hasCapability({ capabilities }: Privileges, capability: bigint): boolean {
  return ((capabilities >> capability) & 1n) === 1n
}

/** Whether CAP_SYS_ADMIN is in effect, and not only in a user namespace; false where it cannot be known. */
export function canAdministrate(privileges: Privileges = readPrivileges()): boolean {
  return hasCapability(privileges, CAP_SYS_ADMIN) && !privileges.inUserNamespace
}

/**
 * Ends the process when its other listeners of `exit` are done, by _exit(2): Node sets the terminal back to what it was
 * when it started, and what another program has set since would be lost.
 */
export function leaveTerminal(status: number): void {
  process.once('exit', () => binding().exitAtOnceSync(status))
}

function textOf(path: string): string {
  const text = readFileSync(path)
  return typeof text === 'number' ? '' : text.toString()
}

/** The mode bits that new files do not get. Asking for them with umask(2) would set them for a moment. */
export function readUmask(): number {
  const umask = /^Umask:\s*([0-7]+)$/m.exec(textOf('/proc/self/status'))?.[1]
  // Without /proc the strictest
  return umask === undefined ? 0o077 : Number.parseInt(umask, 8)
}

/** A path for messages about something that was given as a descriptor. */
export function pathOfDescriptor(fd: number): string {
  const target = readLinkSync(`/proc/self/fd/${fd}`)
  return typeof target === 'string' && target.startsWith('/') && !target.endsWith(' (deleted)')
    ? target
    : `descriptor ${fd}`
}
