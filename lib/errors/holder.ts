/** One user of a device, and how to say who it is and what to do about it. */

/** One user of a device. `device` is what it uses: `/dev/loop7`, or a partition, `/dev/loop7p1`. */
export type Holder = { device: string } & (
  | {
      kind: 'mount'
      mountPoint: string
      fsType: string
      /**
       * Only for a mount in another mount namespace, such as a container's: a process in that namespace (for a
       * container, its first process). `mountPoint` is then a path in that namespace.
       */
      pid?: number
      command?: string
    }
  | { kind: 'swap' }
  | { kind: 'device-mapper' | 'md' | 'block'; name: string; path: string }
  | { kind: 'loop'; number: number; path: string }
  | {
      /** A process that has the device open. It can be this process, with another handle. */
      kind: 'process'
      pid: number
      command: string
      /** Only for this process: its descriptors of the device, such as the `fd` of another handle. */
      descriptors?: number[]
      /** The process uses files of a filesystem of the device that was unmounted lazily (`umount -l`). */
      unmounted?: true
    }
  /** The device is busy, but its user cannot be seen: it is in another mount or pid namespace. */
  | { kind: 'unknown' }
)

/** One line for a message: `mounted at /mnt (ext4), open in process 17 (cat)`. */
export function describeHolders(holders: readonly Holder[]): string {
  return holders.map(describeHolder).join(', ')
}

/** What to do about the first of them: `unmount /mnt first`. */
export function adviseHolders([holder]: readonly Holder[]): string {
  switch (holder?.kind) {
    case 'mount':
      if (holder.pid === undefined) return `unmount ${holder.mountPoint} first: it is still mounted there`
      return `unmount it first in the mount namespace of process ${holder.pid}: nsenter -t ${holder.pid} -m umount ${quote(holder.mountPoint)}`
    case 'swap':
      return `swapoff ${holder.device} first`
    case 'loop':
      return `detach ${holder.path} first`
    case 'process':
      if (holder.descriptors !== undefined)
        return `close ${describeOwn(holder.descriptors)} of process ${holder.pid}, which is this one`
      return holder.unmounted
        ? `end process ${holder.pid} (${holder.command}) first, or wait for it to leave the filesystem`
        : `wait for process ${holder.pid} (${holder.command}) to close it, or end it`
    case 'device-mapper':
      return `dmsetup remove ${holder.name} first`
    case 'md':
      return `mdadm --stop ${holder.path} first`
    case 'block':
      return `take ${holder.path} down first`
    default:
      return 'look for it in other containers: another mount or process namespace holds it'
  }
}

/** As one word of a shell. */
function quote(path: string): string {
  return /^[\w./@:+-]+$/.test(path) ? path : `'${path.replaceAll("'", String.raw`'\''`)}'`
}

/** `descriptor 21`, `descriptors 21 and 22`. */
export function describeOwn(descriptors: readonly number[]): string {
  return `descriptor${descriptors.length === 1 ? '' : 's'} ${descriptors.join(' and ')}`
}

function describeHolder(holder: Holder): string {
  switch (holder.kind) {
    case 'mount': {
      const where = `${holder.device} is mounted at ${holder.mountPoint} (${holder.fsType})`
      return holder.pid === undefined
        ? where
        : `${where} in the mount namespace of process ${holder.pid} (${holder.command})`
    }
    case 'swap':
      return `${holder.device} is used for swap`
    case 'loop':
      return `${holder.path} is attached to ${holder.device}`
    case 'process':
      if (holder.descriptors !== undefined) {
        return `process ${holder.pid} (${holder.command}), which is this one, has ${holder.device} open as ${describeOwn(holder.descriptors)}`
      }
      return holder.unmounted
        ? `process ${holder.pid} (${holder.command}) is still in a filesystem of ${holder.device} that was unmounted lazily`
        : `process ${holder.pid} (${holder.command}) has ${holder.device} open`
    case 'unknown':
      return `${holder.device} is in use, by what cannot be seen from here`
    default:
      return `${holder.path} is built on ${holder.device}`
  }
}
