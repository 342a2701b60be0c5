import type { AttachOptions } from './attach/options.ts'
import { attachPlainOrStack } from './attach/stack.ts'
import { changeBackingFile, type ChangeOptions } from './change/change.ts'
import { grow, type GrowOptions } from './change/grow.ts'
import { migrate, type MigrateOptions, type MigrateResult } from './change/migrate.ts'
import {
  flush,
  refreshCapacity,
  setBlockSize,
  setDirectIO,
  setStatus,
  type SetStatusOptions,
  type StatusChange,
} from './change/settings.ts'
import type { BackingFile, Bytes } from './common/arguments.ts'
import { CHANGING, checkWait, LOOKING, type Wait } from './common/deadline.ts'
import type { Warning } from './common/warnings.ts'
import type { DetachResult } from './detach/detach.ts'
import { release } from './detach/release.ts'
import { findHolders, type Holder } from './errors/holders.ts'
import { type DeviceLock, lockDevice, lockOf } from './handle/device-lock.ts'
import type { Handle } from './handle/handle.ts'
import type { LoopRef } from './handle/identity.ts'
import { type DeviceRef, openHandle, type OpenOptions } from './handle/open.ts'
import {
  detachUnmounting,
  type DetachUnmountingOptions,
  detachUnmountingSync,
  disposeUnmounting,
  disposeUnmountingSync,
} from './mount/detach-unmounting.ts'
import { mount } from './mount/make.ts'
import type { Mount } from './mount/mount.ts'
import type { MountOptions } from './mount/options.ts'
import { type LoopStatus, readStatus } from './observe/status.ts'
import { listPartitions, type Partition, type RescanOptions, rescanPartitions } from './partitions/partitions.ts'

let create: (handle: Handle) => LoopDevice

/**
 * A loop device in use: made by {@link attach}, which owns the attachment, or by {@link open}, which does not.
 *
 * Operations of one device run one after another. After detach, release or close every method rejects with reason
 * `closed`. Where the device was taken over by another attachment meanwhile, they reject with `replaced` and touch
 * nothing.
 */
export class LoopDevice implements AsyncDisposable, Disposable {
  readonly #handle: Handle

  static {
    create = (handle) => new LoopDevice(handle)
  }

  private constructor(handle: Handle) {
    this.#handle = handle
  }

  /** The N of /dev/loopN. */
  get number(): number {
    return this.#handle.number
  }

  /** `/dev/loopN`. */
  get path(): string {
    return this.#handle.path
  }

  /** A descriptor of the device, open for reading; -1 once closed. It stays the handle's: do not close it. */
  get fd(): number {
    return this.#handle.fd
  }

  /** Plain JSON that names this attachment; give it to {@link open}, also in another process. */
  get ref(): LoopRef {
    return this.#handle.ref
  }

  /** Attached by this handle, and so detached when it is disposed. */
  get owned(): boolean {
    return this.#handle.owned
  }

  /** What is allowed and odd about this device or its image, as far as this handle has seen it; never thrown. */
  get warnings(): readonly Warning[] {
    return this.#handle.warnings.list
  }

  /**
   * What is in effect now: LOOP_GET_STATUS64 and sysfs.
   *
   * @throws LoopError `not-attached`, `replaced`, `closed`
   */
  status(options?: Wait): Promise<LoopStatus> {
    return readStatus(this.#handle, options)
  }

  /**
   * Changes what is named and keeps every other bit: LOOP_SET_STATUS64. It works on a mounted device too, and freezes
   * its queue for some 20 ms.
   *
   * @throws LoopError `not-attached`, `replaced`, `permission`, `dirty-cache` (kernels up to 5.17), `closed`
   */
  setStatus(change: StatusChange, options?: SetStatusOptions): Promise<void> {
    return setStatus(this.#handle, change, options)
  }

  /**
   * Changes the backing file of a read-only device under its users: LOOP_CHANGE_FD. The new file has to show exactly
   * as many bytes after offset and size limit; that they are the same bytes is checked with `verify: true`. The
   * direct I/O setting stays. Of a stack (`swappable`) the lower device is changed. `replaced` where another process
   * changed offset, size limit, size or file of the device meanwhile.
   *
   * @throws LoopError `not-read-only`, `size-mismatch`, `content-differs`, `overlap`, `would-shut-down-filesystem` (mounted
   *   with another filesystem than squashfs or erofs, and not `force`), `no-such-file`, `not-a-file-or-block-device`, `backed-by-itself`, `backing-loop-not-attached`,
   *   `not-attached`, `replaced`, `closed`
   */
  changeBackingFile(file: BackingFile, options?: ChangeOptions): Promise<void> {
    return changeBackingFile(this.#handle, file, options)
  }

  /**
   * Moves the backing file to another place under the running system: copies what the device shows, flushes, verifies,
   * switches (LOOP_CHANGE_FD), so that the medium of the old file can be unmounted and ejected. The new file has the
   * device's window at the same offset; what lies outside of it is a hole. Under its final name there is never but a
   * whole copy. Aborted, failed or killed at any moment, the device is backed by one complete file.
   *
   * The copy has no name until it is whole (O_TMPFILE, where the filesystem can), and mode 0600 until the device is backed
   * by it; then the source's mode without the write bits of group and others and those of the umask, and its owner and
   * group where this process may set them. The owner of a file on a read-only filesystem is not taken over: he could not
   * write to it. Extended attributes and ACLs are not copied. The folder is opened once, links on the way to it are
   * followed only where root or this user made them, and a link in the place of the file is refused.
   *
   * With `overwrite` the file that is there stays whole, and locked (flock), until the switch has happened; a kill in that
   * moment can leave it, or the copy, as `.NAME.loopctl-XXXX` beside the destination. Nothing ever removes that by its
   * name.
   *
   * @throws LoopError `not-read-only`, `destination-exists`, `contention` (another migration to the same place),
   *   `no-space`, `content-differs`, `overlap`, `would-shut-down-filesystem`, `no-such-file`, `permission`, `timeout`,
   *   `io`, `not-attached`, `replaced`, `closed`
   */
  migrate(destination: string, options?: MigrateOptions): Promise<MigrateResult> {
    return migrate(this.#handle, destination, options)
  }

  /**
   * Takes over the size of a backing file that grew or shrank: LOOP_SET_CAPACITY. Resolves to the new size in bytes.
   *
   * @throws LoopError `not-attached`, `replaced`, `permission`, `closed`
   */
  refreshCapacity(options?: Wait): Promise<number> {
    return refreshCapacity(this.#handle, options)
  }

  /**
   * Makes the device larger: its backing file, which is opened by its path and has to be the same one, the size limit
   * where there is one, and the device (LOOP_SET_CAPACITY or LOOP_SET_STATUS64); also under a mount. With
   * `partition: 'last'` the last partition grows to the new end: of a GPT the backup is written first, then the primary,
   * so that a kill leaves a valid table, then the kernel is told (BLKPG). Nothing is ever made smaller. Resolves to the
   * new size in bytes; `size` is a multiple of 512.
   *
   * @throws LoopError `size-mismatch` (smaller than now, or backed by a block device), `backing-not-writable` (a
   *   read-only device), `in-use` (a shared one), `overlap`, `replaced`, `no-space`, `no-such-file`,
   *   `bad-partition-table`, `permission`, `not-attached`, `closed`
   */
  grow(size: Bytes, options?: GrowOptions): Promise<number> {
    return grow(this.#handle, size, options)
  }

  /**
   * LOOP_SET_DIRECT_IO, kernel 4.10 and later.
   *
   * @throws LoopError `direct-io-unavailable`, `not-attached`, `replaced`, `permission`, `closed`
   */
  setDirectIO(enabled: boolean, options?: Wait): Promise<void> {
    return setDirectIO(this.#handle, enabled, options)
  }

  /**
   * LOOP_SET_BLOCK_SIZE, kernel 4.14 and later: a power of two from 512 to the page size, or to 65 536 on newer
   * kernels. Refused while the device is mounted or held otherwise, also by kernels that would let it pass.
   *
   * @throws LoopError `block-size`, `in-use`, `not-attached`, `replaced`, `permission`, `closed`
   */
  setBlockSize(bytes: number, options?: Wait): Promise<void> {
    return setBlockSize(this.#handle, bytes, options)
  }

  /**
   * The partitions that the kernel knows, by number, with what the partition table on the device (GPT or MBR) says of
   * each: sysfs, and the table itself. None where nobody has looked for them: {@link rescanPartitions}.
   *
   * @throws LoopError `bad-partition-table` where the kernel knows none, `not-attached`, `replaced`, `closed`
   */
  partitions(options?: Wait): Promise<Partition[]> {
    return listPartitions(this.#handle, options)
  }

  /**
   * Looks for partitions again, and resolves to them when each has its node in /dev, made where need be, and their set
   * is stable. `mode: 'kernel'` is BLKRRPART; `mode: 'user'` reads the table here and tells the kernel with BLKPG, for
   * kernels that have no parser of the table, and leaves partitions alone that stay the same.
   *
   * @throws LoopError `partscan-off`, `bad-partition-table`, `in-use`, `node-missing`, `permission`, `not-attached`,
   *   `replaced`, `closed`
   */
  rescanPartitions(options?: RescanOptions): Promise<Partition[]> {
    return rescanPartitions(this.#handle, options)
  }

  /**
   * Mounts the filesystem that is on the device, or on a `partition` of it, which is told to the kernel (BLKPG) and gets
   * its node where it has none. Which filesystem it is, its superblock tells; nothing else is run, and no table read.
   * `nosuid` and `nodev` are in effect unless `options: 'suid,dev'` lifts them.
   *
   * Without a target (`null`) the mount is private: it is in no mount table, nobody finds it, its files are under
   * `mount.path` for this process and its children, and it goes with the process. getcwd(3) fails in it.
   *
   * The mount API of kernel 5.8 and later: fsopen(2), fsconfig(2), fsmount(2), move_mount(2). CAP_SYS_ADMIN.
   *
   * @throws LoopError `unknown-filesystem`, `filesystem-refused` with what the filesystem says, `target`,
   *   `no-such-partition`, `in-use`, `permission`, `replaced`, `not-attached`, `timeout`, `closed`
   */
  mount(target: string | null, options?: MountOptions): Promise<Mount> {
    return mount(this.#handle, target, options)
  }

  /**
   * Locks the device against udev, so that sfdisk and mkfs are not disturbed by its looking: flock(2) with LOCK_EX on
   * this handle's own descriptor, which systemd calls BLOCK_DEVICE_LOCKING. Where the handle has the lock already, the
   * same one. It ends with `lock.release()`, which has udev look, and with detach, release and close.
   *
   * Programs that take this lock themselves (systemd-repart, `sfdisk --lock`) would wait for this one for ever.
   * Milliseconds of `timeout`: 10 000 by default.
   *
   * @throws LoopError `timeout` where another process keeps it, `closed`
   */
  async lock(options?: Wait): Promise<DeviceLock> {
    return lockDevice(this.#handle, checkWait(options, CHANGING))
  }

  /**
   * Everybody who uses the device or a partition of it, as far as this process may see; this handle not counted. Mounts
   * of other mount namespaces are named by a process there (`pid`), filesystems that were unmounted lazily by the
   * processes that are still in them (`unmounted`). From /proc, sysfs and the mount tables; no filesystem is asked.
   */
  holders(options?: Wait): Promise<Holder[]> {
    const deadline = checkWait(options, LOOKING)
    return this.#handle.run(() => findHolders(this.#handle.number, [this.#handle.fd], deadline.bound), deadline)
  }

  /**
   * Everything written to the device is in the backing file, and on its medium: fsync(2).
   *
   * @throws LoopError `io`, `no-space`, `closed`
   */
  flush(options?: Wait): Promise<void> {
    return flush(this.#handle, options)
  }

  /**
   * Detaches, and closes the handle. Resolves to `'detached'` only when the device has let go of its file. Where
   * somebody else uses it, rejects with `in-use` and the holders, and leaves the attachment as it was; `lazy: true`
   * hands it to the kernel instead, which detaches it when the last user is done: `'deferred'`.
   *
   * `unmount: true` unmounts first what is mounted from it, the deepest first; what is held elsewhere stays.
   *
   * LOOP_CLR_FD, after fsync(2); verified with LOOP_GET_STATUS64 on an exclusive descriptor.
   *
   * @throws LoopError `in-use`, `not-attached`, `detaching`, `replaced`, `permission`, `io`, `closed`
   */
  detach(options?: DetachUnmountingOptions): Promise<DetachResult> {
    return detachUnmounting(this.#handle, options)
  }

  /**
   * {@link detach} with `lazy: true` for process exit handlers. It waits for no user of the device, and for the kernel and
   * the file's filesystem for at most 1 000 ms, after which what was written last counts as lost (warning `data-lost`).
   * With an operation in flight, or a call that does not come back, it answers `'deferred'`, and the device goes when that
   * has ended.
   */
  detachSync(): DetachResult {
    return detachUnmountingSync(this.#handle)
  }

  /**
   * Lets the attachment outlive this process: takes autoclear off (LOOP_SET_STATUS64), also under a mount, and closes
   * the handle. Resolves to the device's path.
   *
   * @throws LoopError `not-attached`, `replaced`, `permission`, `closed`
   */
  async release(options?: Wait): Promise<string> {
    // Nobody else would tell udev to look.
    await lockOf(this.#handle)?.release()
    return release(this.#handle, options)
  }

  /**
   * Lets go of the descriptor after the operations in flight. Idempotent. The attachment stays as it is; with
   * autoclear on (the default of {@link attach}) the kernel detaches it when nobody else has it open.
   */
  async close(options?: Wait): Promise<void> {
    return this.#handle.close(checkWait(options, CHANGING))
  }

  /**
   * Unmounts what was mounted through it; then, owned: detaches, lazily where somebody holds it for longer than 100 ms;
   * opened: closes.
   */
  [Symbol.asyncDispose](): Promise<void> {
    return disposeUnmounting(this.#handle)
  }

  /** As `Symbol.asyncDispose`, by {@link detachSync}: it waits for the kernel for at most 1 000 ms, and for nobody else. */
  [Symbol.dispose](): void {
    disposeUnmountingSync(this.#handle)
  }
}

/**
 * Attaches a file to a loop device: finds or makes a free one, sets it up in one LOOP_CONFIGURE (kernel 5.8; before
 * that LOOP_SET_FD and LOOP_SET_STATUS64), reads back what is in effect, and tries again where another process was
 * faster. With `autoclear`, the default, nothing is left behind however this process ends.
 *
 * A descriptor that is given stays the caller's, and has to stay open until this resolves.
 *
 * @throws LoopError `no-such-file`, `not-a-file-or-block-device`, `backing-not-writable`, `permission`,
 *   `no-loop-driver`, `already-attached` (the number that was asked for), `detaching`, `in-use`, `contention`,
 *   `overlap`, `direct-io-unavailable`, `backed-by-itself`, `backing-loop-not-attached`, `node-missing`, `resources`,
 *   `unsupported-platform`
 */
export async function attach(file: BackingFile, options?: AttachOptions): Promise<LoopDevice> {
  return create(await attachPlainOrStack(file, options))
}

/**
 * A handle of a device that somebody else attached, or of a free one. With a reference that carries a disk sequence
 * number it is that very attachment, or an error.
 *
 * @throws LoopError `no-such-device`, `node-missing`, `replaced`, `detaching`, `permission`, `unsupported-platform`
 */
export async function open(device: DeviceRef, options?: OpenOptions): Promise<LoopDevice> {
  return create(await openHandle(device, options))
}
