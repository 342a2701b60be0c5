/** `loopctl status`: everything about one device, in words. */

import type { LoopStatus } from '../observe/status.ts'
import { fileOf } from './columns.ts'
import { humanSize, printable } from './text.ts'

/** A line for each of its properties, aligned. */
export function describeStatus(status: LoopStatus): string {
  const lines = linesOf(status).map(([name, text]) => [`${name}:`, text] as const)
  const width = Math.max(...lines.map(([name]) => name.length))
  return lines.map(([name, text]) => `${name.padEnd(width)}  ${printable(text)}\n`).join('')
}

function linesOf(status: LoopStatus): [name: string, text: string][] {
  const { path, device, diskSeq, sizeLimit, reference, backingDevice, backingInode, lower, unanswered } = status
  const unknown = unanswered === undefined ? undefined : `not known: ${unanswered}`
  const lines: [string, string | undefined][] = [
    ['device', `${path} (${device})`],
    ['disk sequence number', diskSeq === undefined ? undefined : String(diskSeq)],
    ['backing file', fileOf(status)],
    ['file identity', unknown ?? `inode ${backingInode} of filesystem ${backingDevice}`],
    ['lower device', lower === undefined ? undefined : `/dev/loop${lower}`],
    ['swappable', status.swappable ? 'yes, change and migrate work under a mounted ext4 or xfs' : 'no'],
    ['reference', unknown ?? (reference === '' ? 'none' : (reference ?? 'none'))],
    ['size', bytes(status.size)],
    ['offset', bytes(status.offset)],
    ['size limit', sizeLimit === 0 ? 'none, the device ends with the file' : bytes(sizeLimit)],
    ['logical block size', bytes(status.blockSize)],
    ['access', status.readOnly ? 'read-only' : 'read and write'],
    [
      'autoclear',
      status.autoclear ? 'on, the kernel detaches it when its last user closes it' : 'off, it stays attached',
    ],
    ['partition scan', status.partscan ? 'on, the kernel looks for partitions' : 'off'],
    ['direct I/O', status.directIO ? 'on, the file is read and written past the page cache' : 'off'],
  ]
  return lines.flatMap(([name, text]) => (text === undefined ? [] : [[name, text]]))
}

function bytes(count: number): string {
  return count < 1024 ? `${count} bytes` : `${count} bytes (${humanSize(count)})`
}
