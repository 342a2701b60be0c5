/** What tells one attachment of a device from the device's next one. */

import { formatDevice, type LoopInfo64 } from '../kernel/uapi.ts'

/** Plain JSON that identifies one attachment of a device. Give it to {@link open}, also in another process. */
export interface LoopRef {
  number: number
  /** The disk sequence number (kernel 5.15 and later): another attachment of the same device has another one. */
  diskSeq?: number
  /**
   * Device, inode and offset of the backing file. They identify the attachment if the kernel is not known to change the
   * disk sequence number at every attach (before 6.5).
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
