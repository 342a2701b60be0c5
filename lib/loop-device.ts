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
import { fromCaller } from './errors/from-caller.ts'
import { findHolders, type Holder } from './errors/holders.ts'
import { type DeviceLock, lockDevice } from './handle/device-lock.ts'
import type { Handle } from './handle/handle.ts'
import type { LoopRef } from './handle/identity.ts'
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

/** @internal */
export function createDevice(handle: Handle): LoopDevice {
  return create(handle)
}

/**
 * A handle of a loop device. {@link attach} returns one that owns the attachment, {@link open} one that does not.
 *
 * Operations on one handle run one after another. After detach, release or close every method rejects with reason
 * `closed`. If another process has detached the device and attached it anew, methods reject with `replaced` and do not
 * touch the device.
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

  /** A descriptor of the device, open for reading; -1 after the handle was closed. Do not close it yourself. */
  get fd(): number {
    return this.#handle.fd
  }

  /** Plain JSON that names this attachment; give it to {@link open}, also in another process. */
  get ref(): LoopRef {
    return this.#handle.ref
  }

  /** Whether this handle attached the device. If so, disposing the handle detaches the device. */
  get owned(): boolean {
    return this.#handle.owned
  }

  /** The warnings about this device and its image that this handle has found so far. */
  get warnings(): readonly Warning[] {
    return this.#handle.warnings.list
  }

  /**
   * The settings that are in effect now, from LOOP_GET_STATUS64 and sysfs.
   *
   * @throws LoopError `not-attached`, `replaced`, `closed`
   */
  status(options?: Wait): Promise<LoopStatus> {
    return fromCaller(readStatus(this.#handle, options))
  }

  /**
   * Changes the settings that you give; settings that you leave out stay as they are. It works on a mounted device too,
   * and freezes the device's queue for some 20 ms. LOOP_SET_STATUS64.
   *
   * @throws LoopError `not-attached`, `replaced`, `permission`, `dirty-cache` (kernels up to 5.17), `closed`
   */
  setStatus(change: StatusChange, options?: SetStatusOptions): Promise<void> {
    return fromCaller(setStatus(this.#handle, change, options))
  }

  /**
   * Changes the backing file of a read-only device while it is in use: LOOP_CHANGE_FD. With the device's offset and
   * size limit, the new file has to show exactly as many bytes as the present one. `verify: true` checks that they are
   * the same bytes. The direct I/O setting stays. With `swappable`, the lower of the two devices is changed.
   *
   * @throws LoopError `not-read-only`, `size-mismatch`, `content-differs`, `overlap`, `would-shut-down-filesystem` (a
   *   filesystem other than squashfs or erofs is mounted, without `force`), `no-such-file`,
   *   `not-a-file-or-block-device`, `backed-by-itself`, `backing-loop-not-attached`, `not-attached`, `replaced`,
   *   `closed`
   */
  changeBackingFile(file: BackingFile, options?: ChangeOptions): Promise<void> {
    return fromCaller(changeBackingFile(this.#handle, file, options))
  }

  /**
   * Moves the backing file to another place while the device is in use: copies what the device shows, flushes and
   * verifies the copy, and switches the device to it (LOOP_CHANGE_FD). The copy has the bytes that the device shows at
   * the same offset, and holes around them. No partial file ever appears at the destination. If the migration fails, is
   * aborted or is killed, the device is backed by one complete file.
   *
   * The copy has mode 0600 until the device is backed by it; then it gets the mode (without the write bits of group and
   * others), owner and group of the source, as far as this process may set them. Extended attributes and ACLs are not
   * copied. Links on the way to the destination are followed only if root or this user made them. With `overwrite`, and
   * on filesystems without O_TMPFILE, a kill can leave a file `.NAME.loopctl-XXXX` beside the destination.
   *
   * @throws LoopError `not-read-only`, `destination-exists`, `contention` (another migration to the same place),
   *   `no-space`, `content-differs`, `overlap`, `would-shut-down-filesystem`, `no-such-file`, `permission`, `timeout`,
   *   `io`, `not-attached`, `replaced`, `closed`
   */
  migrate(destination: string, options?: MigrateOptions): Promise<MigrateResult> {
    return fromCaller(migrate(this.#handle, destination, options))
  }

  /**
   * Gives the device the size of its backing file again, after the file grew or shrank: LOOP_SET_CAPACITY. Resolves to
   * the new size in bytes.
   *
   * @throws LoopError `not-attached`, `replaced`, `permission`, `closed`
   */
  refreshCapacity(options?: Wait): Promise<number> {
    return fromCaller(refreshCapacity(this.#handle, options))
  }

  /**
   * Makes the backing file, the size limit (if there is one) and the device larger, even while the device is mounted:
   * LOOP_SET_CAPACITY or LOOP_SET_STATUS64. loopctl opens the file by its path, which must still lead to the same file.
   * `size` is a multiple of 512. Resolves to the new size in bytes. Nothing is ever made smaller.
   *
   * With `partition: 'last'` the last partition grows to the new end, in the table and in the kernel (BLKPG). The
   * backup of a GPT is written before the primary, so that a kill in between leaves a valid table.
   *
   * @throws LoopError `size-mismatch` (smaller than now, or backed by a block device), `backing-not-writable` (a
   *   read-only device), `in-use` (a handle from `overlap: 'reuse'`), `overlap`, `replaced`, `no-space`,
   *   `no-such-file`, `bad-partition-table`, `permission`, `not-attached`, `closed`
   */
  grow(size: Bytes, options?: GrowOptions): Promise<number> {
    return fromCaller(grow(this.#handle, size, options))
  }

  /**
   * Turns direct I/O on or off: with it, the kernel bypasses the page cache of the backing file. LOOP_SET_DIRECT_IO,
   * kernel 4.10 and later.
   *
   * @throws LoopError `direct-io-unavailable`, `not-attached`, `replaced`, `permission`, `closed`
   */
  setDirectIO(enabled: boolean, options?: Wait): Promise<void> {
    return fromCaller(setDirectIO(this.#handle, enabled, options))
  }

  /**
   * Sets the logical block size: a power of two from 512 to the page size, or to 65 536 on newer kernels. Rejects with
   * `in-use` while the device is mounted or otherwise in use, even on kernels that would allow the change.
   * LOOP_SET_BLOCK_SIZE, kernel 4.14 and later.
   *
   * @throws LoopError `block-size`, `in-use`, `not-attached`, `replaced`, `permission`, `closed`
   */
  setBlockSize(bytes: number, options?: Wait): Promise<void> {
    return fromCaller(setBlockSize(this.#handle, bytes, options))
  }

  /**
   * The partitions that the kernel knows (from sysfs), ordered by number, with what the partition table on the device
   * (GPT or MBR) says about each. Empty if nobody has looked for partitions yet: see {@link rescanPartitions}.
   *
   * @throws LoopError `bad-partition-table` if the kernel knows no partitions, `not-attached`, `replaced`, `closed`
   */
  partitions(options?: Wait): Promise<Partition[]> {
    return fromCaller(listPartitions(this.#handle, options))
  }

  /**
   * Looks for partitions again. Resolves to the partitions when each has its node in /dev (loopctl makes missing nodes)
   * and their set is stable. `mode: 'kernel'` uses BLKRRPART. With `mode: 'user'`, loopctl reads the table and adds the
   * partitions with BLKPG, for kernels that have no parser for the table; partitions that stay the same are not
   * touched.
   *
   * @throws LoopError `partscan-off`, `bad-partition-table`, `in-use`, `node-missing`, `permission`, `not-attached`,
   *   `replaced`, `closed`
   */
  rescanPartitions(options?: RescanOptions): Promise<Partition[]> {
    return fromCaller(rescanPartitions(this.#handle, options))
  }

  /**
   * Mounts the filesystem that is on the device, or on a `partition` of it. If the kernel does not have the partition
   * or /dev has no node of it, loopctl adds both (BLKPG, mknod(2)). loopctl recognises the filesystem by its
   * superblock; it runs no mount helper and does not read /etc/fstab. `nosuid` and `nodev` are in effect, unless
   * `options` has `'suid,dev'`.
   *
   * Without a target (`null`) the mount is private: it is in no mount table, and other programs do not find it. Its
   * files are under `mount.path` for this process and its children, and it is unmounted when the process ends.
   * getcwd(3) fails in it.
   *
   * Uses the mount API of kernel 5.8 and later: fsopen(2), fsconfig(2), fsmount(2), move_mount(2). Needs CAP_SYS_ADMIN.
   *
   * @throws LoopError `unknown-filesystem`, `filesystem-refused` with what the filesystem says, `target`,
   *   `no-such-partition`, `in-use`, `permission`, `replaced`, `not-attached`, `timeout`, `closed`
   */
  mount(target: string | null, options?: MountOptions): Promise<Mount> {
    return fromCaller(mount(this.#handle, target, options))
  }

  /**
   * Locks the device, so that udev does not open it and disturb sfdisk or mkfs: flock(2) with LOCK_EX on this handle's
   * own descriptor, which systemd calls BLOCK_DEVICE_LOCKING. If the handle has the lock already, resolves to that
   * lock. The lock ends with `lock.release()`, which lets udev look at the device, and with detach, release and close.
   *
   * While you hold the lock, programs that take it themselves (systemd-repart, `sfdisk --lock`) wait for ever.
   *
   * @throws LoopError `timeout` if another process keeps the lock, `closed`
   */
  async lock(options?: Wait): Promise<DeviceLock> {
    return await fromCaller(lockDevice(this.#handle, checkWait(options, CHANGING)))
  }

  /**
   * Everybody who uses the device or a partition of it, as far as this process may see, except this handle. A mount in
   * another mount namespace is listed with a process of that namespace (`pid`). A filesystem that was unmounted lazily
   * is listed as the processes that still use it (`unmounted`). The search does not wait for any filesystem.
   */
  async holders(options?: Wait): Promise<Holder[]> {
    const deadline = checkWait(options, LOOKING)
    return await fromCaller(
      this.#handle.run(() => findHolders(this.#handle.number, [this.#handle.fd], deadline.bound), deadline),
    )
  }

  /**
   * Flushes everything that was written to the device to the backing file and its medium: fsync(2).
   *
   * @throws LoopError `io`, `no-space`, `closed`
   */
  flush(options?: Wait): Promise<void> {
    return fromCaller(flush(this.#handle, options))
  }

  /**
   * Detaches the device, and closes the handle. Resolves to `'detached'` only when the device is free. If the device is
   * in use, rejects with `in-use` and the holders, and the device stays attached. With `lazy: true`, the call resolves
   * to `'deferred'` in that case, and the kernel detaches the device when its last user has closed it.
   *
   * `unmount: true` first unmounts what is mounted from the device, the deepest first. A mount that is in use stays.
   *
   * Calls fsync(2) and LOOP_CLR_FD, and verifies with LOOP_GET_STATUS64 on an exclusive descriptor.
   *
   * @throws LoopError `in-use`, `not-attached`, `detaching`, `replaced`, `permission`, `io`, `closed`
   */
  detach(options?: DetachUnmountingOptions): Promise<DetachResult> {
    return fromCaller(detachUnmounting(this.#handle, options))
  }

  /**
   * {@link detach} with `lazy: true`, for process exit handlers. It does not wait for users of the device. It waits at
   * most 1 000 ms for the kernel and the file's filesystem; after that, what was written last counts as lost (warning
   * `data-lost`). If another operation is running, or a system call does not return, it returns `'deferred'`, and the
   * device is detached when that operation or call has ended.
   */
  detachSync(): DetachResult {
    return detachUnmountingSync(this.#handle)
  }

  /**
   * Leaves the device attached when this process ends: turns autoclear off (LOOP_SET_STATUS64), also while the device
   * is mounted, and closes the handle. Resolves to the device's path.
   *
   * @throws LoopError `not-attached`, `replaced`, `permission`, `closed`
   */
  async release(options?: Wait): Promise<string> {
    return await fromCaller(release(this.#handle, options))
  }

  /**
   * Closes the handle's descriptor when the running operations have ended. Idempotent. It does not detach the device;
   * but with autoclear (the default of {@link attach}) the kernel detaches the device when nobody else has it open.
   */
  async close(options?: Wait): Promise<void> {
    return await fromCaller(this.#handle.close(checkWait(options, CHANGING)))
  }

  /**
   * Unmounts what was mounted through this handle. Then detaches the device if the handle owns it (lazily if somebody
   * holds it for longer than 100 ms), and otherwise closes the handle.
   */
  [Symbol.asyncDispose](): Promise<void> {
    return fromCaller(disposeUnmounting(this.#handle))
  }

  /**
   * Does the same as `Symbol.asyncDispose`, with {@link detachSync}: waits at most 1 000 ms for the kernel, and not for
   * other users of the device.
   */
  [Symbol.dispose](): void {
    disposeUnmountingSync(this.#handle)
  }
}
