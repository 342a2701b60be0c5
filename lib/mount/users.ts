/** Who keeps a mount busy: processes with files of it, mounts in it, loop devices and swap on files of it. */

import { setImmediate } from 'node:timers/promises'
import { describeOwn, type Holder } from '../errors/holders.ts'
import { readDirectory, readDirectorySync, readFile, readFileSync } from '../kernel/files.ts'
import { readMounts } from '../kernel/mountinfo.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { statMagicLink } from './target.ts'

/** A mount as its users are found by. */
export interface Used {
  /** The device, for the answer. */
  source: string
  /** As mountinfo and statx have it. */
  id: bigint
}

/** One that has a place in the tree. */
interface InTree extends Used {
  target: string
}

/** Everybody, as far as this process may see; this process too. */
export async function findUsers(used: InTree): Promise<Holder[]> {
  const entries = await readDirectory('/proc')
  const pids = typeof entries === 'number' ? [] : entries.filter((entry) => /^\d+$/.test(entry)).map(Number)
  return [...(await mountsIn(used)), ...(await filesIn(used)), ...(await processesOf(used, pids, []))]
}

/** This process and those that it started, without asking all others, which takes long where they are many. */
export function findUsersInFamily(used: Used, ownDescriptors: readonly number[]): Promise<Holder[]> {
  return processesOf(used, [process.pid, ...descendantsOf(process.pid)], ownDescriptors)
}

/** None where the kernel does not tell (CONFIG_PROC_CHILDREN). */
function descendantsOf(pid: number): number[] {
  const threads = readDirectorySync(`/proc/${pid}/task`)
  if (typeof threads === 'number') return []
  const children = threads.flatMap((thread) => {
    const text = readFileSync(`/proc/${pid}/task/${thread}/children`)
    return typeof text === 'number' ? [] : text.toString().split(' ').filter(Boolean).map(Number)
  })
  return children.flatMap((child) => [child, ...descendantsOf(child)])
}

/** Whether one of them does not pass by itself. */
export function areLasting(users: readonly Holder[]): boolean {
  return users.some(({ kind }) => kind !== 'process')
}

/** One line for a message. */
export function describeUsers(users: readonly Holder[]): string {
  if (users.length === 0) return 'it is busy, and by what cannot be seen from here'
  return users.map(describeUser).join(', ')
}

function describeUser(user: Holder): string {
  switch (user.kind) {
    case 'mount':
      return `${user.mountPoint} is mounted in it (${user.fsType})`
    case 'swap':
      return 'a file of it is used for swap'
    case 'loop':
      return `${user.path} is attached to a file of it`
    case 'process':
      return user.descriptors === undefined
        ? `process ${user.pid} (${user.command}) uses it`
        : `process ${user.pid} (${user.command}), which is this one, has a file of it open as ${describeOwn(user.descriptors)}`
    default:
      return 'it is in use'
  }
}

/** What to do about the first of them. */
export function adviseUsers([user]: readonly Holder[]): string {
  const otherwise = 'or unmount with lazy: true, and the kernel does it when the last user is done'
  switch (user?.kind) {
    case 'mount':
      return `unmount ${user.mountPoint} first; ${otherwise}`
    case 'loop':
      return `detach ${user.path} first; ${otherwise}`
    case 'process':
      return user.descriptors === undefined
        ? `wait for process ${user.pid} (${user.command}), or end it; ${otherwise}`
        : `close ${describeOwn(user.descriptors)} of process ${user.pid}, which is this one; ${otherwise}`
    default:
      return `look for its user in other mount and process namespaces; ${otherwise}`
  }
}

async function mountsIn({ source, target }: InTree): Promise<Holder[]> {
  const mounts = await readMounts()
  if (typeof mounts === 'number') return []
  return mounts
    .filter(({ mountPoint }) => mountPoint.startsWith(`${target}/`))
    .map(({ mountPoint, fsType }) => ({ device: source, kind: 'mount', mountPoint, fsType }))
}

async function filesIn({ source, target }: InTree): Promise<Holder[]> {
  const users: Holder[] = []
  const swaps = await readFile('/proc/swaps')
  if (
    typeof swaps !== 'number' &&
    swaps
      .toString()
      .split('\n')
      .some((line) => line.startsWith(`${target}/`))
  ) {
    users.push({ device: source, kind: 'swap' })
  }
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') return users
  for (const number of numbers) {
    const file = await sysfs.readBackingFile(number)
    if (file?.startsWith(`${target}/`)) users.push({ device: source, kind: 'loop', number, path: `/dev/loop${number}` })
  }
  return users
}

/** Milliseconds in which procfs is read at one go: the event loop is not to be held up. */
const SLICE = 5

async function processesOf(
  { source, id }: Used,
  pids: readonly number[],
  ownDescriptors: readonly number[],
): Promise<Holder[]> {
  const users: Holder[] = []
  let lastPause = performance.now()
  for (const pid of pids) {
    const used = uses(pid, id, pid === process.pid ? ownDescriptors : [])
    if (used !== undefined) {
      const command = await readFile(`/proc/${pid}/comm`)
      users.push({
        device: source,
        kind: 'process',
        pid,
        command: typeof command === 'number' ? '?' : command.toString().trimEnd(),
        ...(pid === process.pid && used.length > 0 && { descriptors: used }),
      })
    }
    if (performance.now() - lastPause > SLICE) {
      await setImmediate()
      lastPause = performance.now()
    }
  }
  return users
}

/**
 * The descriptors with which a process uses the mount, none where it only is there; undefined: it does not use it. By the
 * number of the mount that the kernel says of each file: their paths tell less, and could lead to a dead server.
 */
function uses(pid: number, id: bigint, ownDescriptors: readonly number[]): number[] | undefined {
  const folder = `/proc/${pid}`
  const isOn = (link: string) => statMagicLink(`${folder}/${link}`)?.mountId === id
  const isThere = ['cwd', 'root', 'exe'].some(isOn)
  const descriptors = readDirectorySync(`${folder}/fd`)
  const all = typeof descriptors === 'number' ? [] : descriptors.map(Number)
  const open = all.filter((fd) => !ownDescriptors.includes(fd) && isOn(`fd/${fd}`))
  return isThere || open.length > 0 ? open : undefined
}
