/** /proc/self/status: what this process may do. */

import { readFileSync } from './files.ts'

const CAP_SYS_ADMIN = 21n

/** Whether CAP_SYS_ADMIN is in effect; false where it cannot be known. */
export function canAdministrate(): boolean {
  const status = readFileSync('/proc/self/status')
  if (typeof status === 'number') return false
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(status.toString())?.[1]
  return effective !== undefined && ((BigInt(`0x${effective}`) >> CAP_SYS_ADMIN) & 1n) === 1n
}
