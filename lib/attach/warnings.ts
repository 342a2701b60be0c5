/** What is allowed and odd about an attachment, found out when it is made. */

import { constants } from 'node:os'
import { setImmediate } from 'node:timers/promises'
import { describeAlignment } from '../errors/evidence.ts'
import type { Warning } from '../common/warnings.ts'
import type { Handle } from '../handle/handle.ts'
import { binding } from '../kernel/binding.ts'
import { type Bound, GivenUp } from '../kernel/bounded.ts'
import { devicePath } from '../kernel/devnode.ts'
import { readDirectory, readDirectorySync, readFile, readFileSync, stat } from '../kernel/files.ts'
import { readMounts } from '../kernel/mountinfo.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { formatDevice, LO_FLAGS_DIRECT_IO } from '../kernel/uapi.ts'
import type { Backing } from './backing.ts'
import type { Settings } from './configure.ts'
import { askForAttachments } from './overlap.ts'

/**
 * Whether somebody else may have the file open for writing. The lease probe is granted although the device has the file:
 * that is the same open file. False also where it cannot be asked: of descriptors that were given, of block devices.
 */
export function isWrittenElsewhere({ fd, opened }: Backing, { readOnly }: Settings): boolean {
  if (!opened) return false
  const answer = readOnly ? binding().leaseProbeReadSync(fd) : binding().leaseProbeSync(fd)
  return answer === -constants.errno.EAGAIN
}

/** Of the window of the file, and of what was asked for and is not in effect. */
export function warnOfSettings(
  handle: Handle,
  backing: Backing,
  settings: Settings,
  oddities: readonly Warning[],
): void {
  for (const { code, message, hint } of oddities) handle.warnings.add(code, message, hint)
  warnOfTail(handle, backing, settings)
  if (settings.directIO === 'prefer') warnOfBuffering(handle)
}

/** A device has whole sectors, and is read in whole blocks. */
function warnOfTail(handle: Handle, { size }: Backing, { offset, sizeLimit }: Settings): void {
  const { warnings, descriptor } = handle
  if (offset >= size && offset > 0n) {
    warnings.add(
      'nothing-to-see',
      `the offset, ${offset}, is beyond the end of the file, which has ${size} bytes: the device shows nothing`,
    )
    return
  }
  const isLimited = sizeLimit > 0n && sizeLimit < size - offset
  const shown = isLimited ? sizeLimit : size - offset
  if (shown < 512n) {
    const what = isLimited ? 'the size limit' : offset > 0n ? 'what is left after the offset' : 'the file'
    const message = `${what} has ${shown} bytes, less than a sector of 512: the device shows nothing`
    warnings.add('nothing-to-see', message, isLimited ? undefined : WHOLE_SECTORS)
    return
  }
  const cut = shown % 512n
  if (cut > 0n) {
    const message = `the last ${cut} bytes of the ${isLimited ? 'window' : 'file'} are cut off: a device has whole sectors of 512 bytes`
    warnings.add('tail-cut', message, isLimited ? undefined : WHOLE_SECTORS)
  }
  // Where no block can be cut, there is no need to ask for their size.
  if ((shown - cut) % LARGEST_BLOCK === 0n) return
  const blockSize = binding().blkSszGetSync(descriptor)
  if (blockSize <= 512) return
  const unreadable = (shown - cut) % BigInt(blockSize)
  if (unreadable === 0n) return
  const message = `the last ${unreadable} bytes of the device cannot be read: they are less than a block of ${blockSize} bytes`
  warnings.add('tail-cut', message, 'a block size of 512 shows them; or make the file longer')
}

/** Logical blocks have at most so many bytes. */
const LARGEST_BLOCK = 65_536n

const WHOLE_SECTORS = 'truncate --size=%512 makes it whole sectors, with zeros'

function warnOfBuffering(handle: Handle): void {
  const flags = binding().loopGetFlagsSync(handle.descriptor)
  if (flags < 0 || (flags & LO_FLAGS_DIRECT_IO) !== 0) return
  const why = describeAlignment(handle.failure('LOOP_SET_DIRECT_IO', -1))
  handle.warnings.add(
    'direct-io-buffered',
    `the backing file takes no direct I/O as it is attached (${why}): it is buffered`,
    'a block size of 4096, if the image was made for it, and an offset that is a multiple of it may help',
  )
}

/** The disk of a partition, the partitions of a disk: they share bytes. */
export async function warnOfMounts(handle: Handle, { rdevice }: Backing): Promise<void> {
  if (rdevice === undefined) return
  const device = formatDevice(rdevice)
  const parts = sysfs.readSharingDevices(device)
  const mounts = await readMounts()
  if (typeof mounts === 'number') return
  for (const { device: mounted, mountPoint, fsType } of mounts) {
    const name = parts.get(mounted)
    if (name === undefined) continue
    const what =
      mounted === device ? 'the backing block device' : `${name}, which shares bytes with the backing block device,`
    handle.warnings.add(
      'backing-mounted',
      `${what} is mounted at ${mountPoint} (${fsType}): what is written at one place is not seen at the other`,
      `unmount ${mountPoint} first`,
    )
  }
}

export async function warnOfWriters(handle: Handle, backing: Backing, bound: Bound): Promise<void> {
  const { found } = await askForAttachments(backing, bound)
  const loops = found.filter(({ number, readOnly }) => number !== handle.number && !readOnly)
  const writers = loops.map(({ number }) => `${devicePath(number)} is attached to it`)
  for await (const { pid, command } of findWriters(backing)) writers.push(`process ${pid} (${command}) has it open`)
  if (writers.length === 0) return
  const message = `the backing file can be written elsewhere too: ${writers.join(', ')}`
  handle.warnings.add(
    'open-for-writing',
    message,
    'what is written there may not be seen through the device, and destroy what it has',
  )
}

const O_ACCMODE = 3

/** For the look at a file of another process, whose filesystem may be a silent one all the same. */
const LOOK: Bound = { left: 250 }

/** The processes that have the file open for writing, as far as this one may see. */
async function* findWriters({ fd, device, inode }: Backing): AsyncGenerator<{ pid: number; command: string }> {
  const entries = await readDirectory('/proc')
  if (typeof entries === 'number') return
  let lastPause = performance.now()
  for (const pid of entries.filter((entry) => /^\d+$/.test(entry)).map(Number)) {
    const descriptors = readDirectorySync(`/proc/${pid}/fdinfo`)
    if (typeof descriptors === 'number') continue
    let isWriter = false
    for (const other of descriptors) {
      const isOwn = pid === process.pid && Number(other) === fd
      isWriter ||= !isOwn && (await isOpenForWriting(pid, other, device, inode))
    }
    if (isWriter) {
      const command = await readFile(`/proc/${pid}/comm`)
      yield { pid, command: typeof command === 'number' ? '?' : command.toString().trimEnd() }
    }
    // procfs is read without the thread pool; a machine with many processes must not stall the event loop
    if (performance.now() - lastPause > 5) {
      await setImmediate()
      lastPause = performance.now()
    }
  }
}

/** fdinfo has the inode since 5.14; only where it is the wanted one the file is asked, of whichever filesystem it is. */
async function isOpenForWriting(pid: number, descriptor: string, device: bigint, inode: bigint): Promise<boolean> {
  const info = readFileSync(`/proc/${pid}/fdinfo/${descriptor}`)
  if (typeof info === 'number') return false
  const flags = /^flags:\s*([0-7]+)$/m.exec(info.toString())?.[1]
  if (flags === undefined || (Number.parseInt(flags, 8) & O_ACCMODE) === 0) return false
  const said = /^ino:\s*(\d+)$/m.exec(info.toString())?.[1]
  if (said !== undefined && BigInt(said) !== inode) return false
  try {
    const found = await stat(`/proc/${pid}/fd/${descriptor}`, LOOK)
    return typeof found !== 'number' && found.dev === device && found.ino === inode
  } catch (error) {
    if (error instanceof GivenUp) return false
    throw error
  }
}
