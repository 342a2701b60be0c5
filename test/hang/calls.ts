/** Every function of the public API, called on a device, or a file, of a filesystem that does not answer. */

import { closeSync, openSync } from 'node:fs'
import {
  attach,
  type AttachOptions,
  createImage,
  doctor,
  find,
  list,
  LoopControl,
  type LoopDevice,
  type LoopErrorReason,
  mountImage,
  open,
  readPartitionTable,
  type Wait,
  watch,
  withDevice,
} from '../../lib/index.ts'

/** What a call has to work with, made while the server still answers. */
export interface Scene {
  /** Attached to a file of the server, 1 MiB. */
  device: LoopDevice
  /** Another file of the server, as long, not attached. */
  served: string
  /** A file of another filesystem, as long, not attached. */
  healthy: string
  /** Paths where there is nothing: beside the other file, and on the server. */
  free: string
  servedFree: string
}

/**
 * How it ends. `waits`: it needs the server, and is given up on. `half`: it waits for the server half of its time, and then
 * does without, so that a signal comes first. `done`: it succeeds. Else the reason of its error.
 */
type Ends = 'waits' | 'half' | 'done' | 'ends' | LoopErrorReason

export interface Call {
  /** As users write it: `find` or `LoopDevice.status`; after a colon what is special about it. */
  name: string
  /** Of the scene's device. */
  options?: AttachOptions
  /** It takes no `timeout`. */
  signalOnly?: true
  /** It takes neither that nor a signal, and tries many things. */
  takesLong?: true
  call: (scene: Scene, wait: Wait) => Promise<unknown>
  stopped: Ends
  /** Also where every request is answered with an error. */
  killed: Exclude<Ends, 'half'>
}

/** Calls with a control device of their own. */
async function withControl<T>(use: (control: LoopControl) => Promise<T>): Promise<T> {
  await using control = await LoopControl.open()
  return await use(control)
}

async function withDescriptor<T>(path: string, use: (fd: number) => Promise<T>): Promise<T> {
  const fd = openSync(path, 'r+')
  try {
    return await use(fd)
  } finally {
    closeSync(fd)
  }
}

async function detached(attaching: Promise<LoopDevice>): Promise<void> {
  const device = await attaching
  await device.detach()
}

const READ_ONLY: AttachOptions = { readOnly: true }

export const CALLS: readonly Call[] = [
  {
    name: 'attach: a file of the server',
    call: ({ served }, wait) => detached(attach(served, wait)),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'attach: a file of another filesystem',
    call: ({ healthy }, wait) => detached(attach(healthy, wait)),
    stopped: 'done',
    killed: 'done',
  },
  {
    name: 'attach: a descriptor, which wants a look at all devices',
    call: ({ healthy }, wait) => withDescriptor(healthy, (fd) => detached(attach(fd, wait))),
    stopped: 'ends',
    killed: 'ends',
  },
  {
    name: 'attach: reuse',
    call: ({ healthy }, wait) => detached(attach(healthy, { ...wait, overlap: 'reuse' })),
    stopped: 'done',
    killed: 'done',
  },
  {
    name: 'attach: swappable',
    call: ({ served }, wait) => detached(attach(served, { ...wait, ...READ_ONLY, swappable: true })),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'withDevice',
    call: ({ served }, wait) => withDevice(served, wait, ({ path }) => path),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'open',
    call: async ({ device }, wait) => {
      const opened = await open(device.number, wait)
      await opened.close()
    },
    stopped: 'half',
    killed: 'done',
  },
  {
    name: 'open: a link on the server',
    call: ({ servedFree }, wait) => open(servedFree, wait),
    stopped: 'waits',
    killed: 'no-such-device',
  },
  { name: 'list', call: (_, wait) => list(wait), stopped: 'done', killed: 'done' },
  { name: 'list: all', call: (_, wait) => list({ ...wait, all: true }), stopped: 'done', killed: 'done' },
  {
    name: 'find: a file of the server',
    call: ({ served }, wait) => find(served, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'find: a file of another filesystem',
    call: ({ healthy }, wait) => find(healthy, wait),
    stopped: 'ends',
    killed: 'ends',
  },
  {
    name: 'find: a descriptor',
    call: ({ healthy }, wait) => withDescriptor(healthy, (fd) => find(fd, wait)),
    stopped: 'ends',
    killed: 'ends',
  },
  {
    name: 'find: a reference, which the silent device may have',
    call: (_, wait) => find({ reference: 'loopctl:hang' }, wait),
    stopped: 'ends',
    killed: 'ends',
  },
  {
    name: 'find: unconfirmed',
    call: (_, wait) => find({ reference: 'loopctl:hang' }, { ...wait, unconfirmed: true }),
    stopped: 'ends',
    killed: 'ends',
  },
  {
    name: 'find: a mount point on the server',
    call: ({ servedFree }, wait) => find({ mountPoint: servedFree }, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'readPartitionTable',
    call: ({ served }, wait) => readPartitionTable(served, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'createImage',
    call: ({ servedFree }, wait) => createImage(servedFree, 1 << 20, wait),
    stopped: 'waits',
    killed: 'io',
  },
  { name: 'mountImage', call: ({ served }, wait) => mountImage(served, null, wait), stopped: 'waits', killed: 'io' },
  {
    name: 'watch',
    signalOnly: true,
    call: async (_, { signal }) => {
      for await (const { type } of watch({ signal })) if (type === 'resync') return
    },
    stopped: 'waits',
    killed: 'waits',
  },
  { name: 'doctor', takesLong: true, call: () => doctor(), stopped: 'done', killed: 'done' },
  {
    name: 'LoopControl.open',
    call: async (_, wait) => {
      const control = await LoopControl.open(wait)
      await control.close()
    },
    stopped: 'done',
    killed: 'done',
  },
  {
    name: 'LoopControl.add',
    call: (_, wait) =>
      withControl(async (control) => {
        await control.remove(await control.add(undefined, wait))
      }),
    stopped: 'done',
    killed: 'done',
  },
  {
    name: 'LoopControl.remove',
    call: ({ device }, wait) => withControl((control) => control.remove(device.number, wait)),
    stopped: 'in-use',
    killed: 'in-use',
  },
  {
    name: 'LoopControl.getFree',
    call: (_, wait) => withControl((control) => control.getFree(wait)),
    stopped: 'done',
    killed: 'done',
  },
  {
    name: 'LoopControl.close',
    call: (_, wait) => withControl((control) => control.close(wait)),
    stopped: 'done',
    killed: 'done',
  },
  { name: 'LoopDevice.status', call: ({ device }, wait) => device.status(wait), stopped: 'half', killed: 'done' },
  {
    name: 'LoopDevice.setStatus',
    call: ({ device }, wait) => device.setStatus({ reference: 'x' }, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.changeBackingFile: to a file of the server',
    options: READ_ONLY,
    call: ({ device, served }, wait) => device.changeBackingFile(served, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.changeBackingFile: to a file of another filesystem',
    options: READ_ONLY,
    call: ({ device, healthy }, wait) => device.changeBackingFile(healthy, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.migrate',
    options: READ_ONLY,
    call: ({ device, free }, wait) => device.migrate(free, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.grow',
    call: ({ device }, wait) => device.grow(2 << 20, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.refreshCapacity',
    call: ({ device }, wait) => device.refreshCapacity(wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.setDirectIO',
    call: ({ device }, wait) => device.setDirectIO(true, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.setBlockSize',
    call: ({ device }, wait) => device.setBlockSize(4096, wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.partitions',
    call: ({ device }, wait) => device.partitions(wait),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.rescanPartitions: kernel',
    options: { partscan: true },
    call: ({ device }, wait) => device.rescanPartitions({ ...wait, mode: 'kernel' }),
    stopped: 'waits',
    killed: 'io',
  },
  {
    name: 'LoopDevice.rescanPartitions: user',
    call: ({ device }, wait) => device.rescanPartitions({ ...wait, mode: 'user' }),
    stopped: 'waits',
    killed: 'io',
  },
  { name: 'LoopDevice.mount', call: ({ device }, wait) => device.mount(null, wait), stopped: 'waits', killed: 'io' },
  {
    name: 'LoopDevice.lock',
    call: async ({ device }, wait) => {
      const lock = await device.lock(wait)
      await lock.release()
    },
    stopped: 'done',
    killed: 'done',
  },
  { name: 'LoopDevice.holders', call: ({ device }, wait) => device.holders(wait), stopped: 'done', killed: 'done' },
  { name: 'LoopDevice.flush', call: ({ device }, wait) => device.flush(wait), stopped: 'waits', killed: 'io' },
  { name: 'LoopDevice.detach', call: ({ device }, wait) => device.detach(wait), stopped: 'waits', killed: 'done' },
  {
    name: 'LoopDevice.detach: lazy',
    call: ({ device }, wait) => device.detach({ ...wait, lazy: true }),
    stopped: 'waits',
    killed: 'done',
  },
  {
    name: 'LoopDevice.detach: force',
    call: ({ device }, wait) => device.detach({ ...wait, force: true }),
    stopped: 'waits',
    killed: 'done',
  },
  {
    name: 'LoopDevice.detach: unmount',
    call: ({ device }, wait) => device.detach({ ...wait, unmount: true }),
    stopped: 'waits',
    killed: 'done',
  },
  {
    name: 'LoopDevice.release',
    call: ({ device }, wait) => device.release(wait),
    stopped: 'waits',
    killed: 'done',
  },
  { name: 'LoopDevice.close', call: ({ device }, wait) => device.close(wait), stopped: 'done', killed: 'done' },
]

/** The functions of the API, by the names of the calls. */
export const FUNCTIONS: ReadonlySet<string> = new Set(CALLS.map(({ name }) => name.split(':', 1)[0] ?? name))
