/** What tells one attachment of a device from the device's next one. */

import { formatDevice, type LoopInfo64 } from '../kernel/uapi.ts'

/** Plain JSON that names one attachment of a device; to be given to `open()`, also in another process. */
export interface LoopRef {
  number: number
  /** The disk sequence number, kernel 5.15 and later: tells this attachment from the device's next one. */
  diskSeq?: number
  /**
   * Device, inode and offset of the backing file, where the kernel is not known to move the disk sequence number at
   * every attach (before 6.5): then they tell.
   */
  backing?: string
}

/** What an attachment is known by besides the disk sequence number, which kernels before 6.5 do not move. */
export type Backing = Pick<LoopInfo64, 'device' | 'inode' | 'offset' | 'rdevice'>

export function nameOf({ device, inode, offset }: Backing): string {
  return `${formatDevice(device)} ${inode} ${offset}`
}

export function describeRef(diskSeq: number | undefined, backing: string | undefined): string {
  return [diskSeq === undefined ? [] : `disk sequence number ${diskSeq}`, backing ?? []].flat().join(', ') || 'free'
}
