/** The kernel's uevents of loop devices, and whether it sends them here at all. */

import { binding } from './binding.ts'
import { close, O_RDONLY, open } from './files.ts'
import { decodeU64, newU64 } from './uapi.ts'

/** What the kernel says of a whole loop device. */
export interface Uevent {
  action: string
  number: number
  /** The medium is another one: a device says so when it is detached. */
  mediaChange: boolean
  /** Of the medium that it is about: a detach still has that of what was attached. Since 5.15. */
  diskSeq?: number
}

/** `ACTION@DEVPATH`, then `KEY=VALUE`, each ended by a NUL; undefined where it is of no whole loop device. */
export function parseUevent(message: Buffer): Uevent | undefined {
  // The most are of something else: those cost no more than this.
  if (!message.includes('DEVNAME=loop')) return undefined
  const fields = new Map(
    message
      .toString()
      .split('\0')
      .slice(1)
      .map((line) => {
        const equals = line.indexOf('=')
        return [line.slice(0, equals), line.slice(equals + 1)] as const
      }),
  )
  const number = /^loop(\d+)$/.exec(fields.get('DEVNAME') ?? '')?.[1]
  const action = fields.get('ACTION')
  if (number === undefined || action === undefined || fields.get('SUBSYSTEM') !== 'block') return undefined
  const diskSeq = fields.get('DISKSEQ')
  return {
    action,
    number: Number(number),
    mediaChange: fields.get('DISK_MEDIA_CHANGE') === '1',
    ...(diskSeq !== undefined && { diskSeq: Number(diskSeq) }),
  }
}

/**
 * Subscribes, at once. `onMessage` gets each uevent of a loop device, or a negative errno: -ENOBUFS where some were
 * lost, any other where no more will come. Keeps no process alive. The answer ends it, or is the negative errno.
 */
export function subscribe(onMessage: (message: Uevent | number) => void): (() => void) | number {
  const { ueventOpenSync, ueventCloseSync } = binding()
  const socket = ueventOpenSync((message) => {
    const uevent = typeof message === 'number' ? message : parseUevent(message)
    if (uevent !== undefined) onMessage(uevent)
  })
  return typeof socket === 'number' ? socket : () => void ueventCloseSync(socket)
}

/** Inode of the initial user namespace, on every kernel. */
const INITIAL_USER_NAMESPACE = 0xefff_fffdn

/**
 * Whether uevents come here: since 4.18 only to network namespaces of the initial user namespace. Where the owner is
 * not to be known, it is one further out: yes.
 */
export async function areUeventsSentHere(): Promise<boolean> {
  const network = await open('/proc/self/ns/net', O_RDONLY)
  if (network < 0) return true
  const inode = newU64()
  const answer = binding().nsGetUserNsSync(network, inode)
  await close(network)
  return answer < 0 || decodeU64(inode) === INITIAL_USER_NAMESPACE
}
