/** Places where something is missing: what a command is to be put behind, and a copy of the package to run there. */

import { execFileSync, spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdtempSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))

export const AS_NOBODY = ['setpriv', '--reuid', '65534', '--regid', '65534', '--clear-groups']
export const USER_NAMESPACE = ['unshare', '--user', '--map-root-user']

/**
 * For the begin of a mount namespace, which has all mounts of the one before: a filesystem that another test unmounts stays
 * mounted in there, and keeps its loop device in use. So those of the tests are let go of.
 */
export const LET_GO = `for point in $(sed -n 's|^/dev/loop[^ ]* \\([^ ]*/loopctl-[^ ]*\\) .*|\\1|p' /proc/self/mounts)
do umount -l "$point" || :; done 2>/dev/null`

/** Behind this a command has a mount namespace of its own, without the filesystems of other tests. */
export const MOUNT_NAMESPACE = [
  'unshare',
  '--mount',
  '--propagation',
  'private',
  'sh',
  '-euc',
  `${LET_GO}; exec "$@"`,
  'sh',
]

/** In a mount namespace of its own, after the script; `$dev` is an empty folder of the test's. */
export function privately(script: string, ...then: string[]): (dev: string) => string[] {
  const lines = `dev=$1; shift; ${script}; exec "$@"`
  return (dev) => [...MOUNT_NAMESPACE, 'sh', '-euc', lines, 'sh', dev, ...then]
}

/** As a container has it: only the nodes that it was given. A device may go while it is copied. */
export const OWN_DEV =
  'mount -t tmpfs none "$dev"; { cp -a /dev/null /dev/zero /dev/urandom /dev/loop* "$dev"/ 2>&1 || :; } >/dev/null'

/** The built package where everybody can read it: the checkout may be in somebody's home. */
export function copyForNobody(...more: string[]): string {
  const copy = mkdtempSync(join(tmpdir(), 'loopctl-copy-'))
  for (const part of ['package.json', 'dist', 'build/Release', 'prebuilds', 'node_modules/node-gyp-build', ...more]) {
    if (existsSync(join(ROOT, part))) cpSync(join(ROOT, part), join(copy, part), { recursive: true, dereference: true })
  }
  execFileSync('chmod', ['-R', 'a+rX', copy])
  return copy
}

/** Systems can keep ordinary users from making user namespaces. */
export function isForbidden(enter: (dev: string) => string[]): boolean {
  if (!enter('').includes('--user')) return false
  return spawnSync('env', [...AS_NOBODY, ...USER_NAMESPACE, 'true']).status !== 0
}
