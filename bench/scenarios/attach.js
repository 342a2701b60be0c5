/** One device: attached, looked at, detached. */

import { execFileSync } from 'node:child_process'
import { closeSync, mkdirSync, openSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { attach, mountImage } from 'loopctl'
import * as ioctl from 'loopctl/ioctl'
import { time } from '../measure.js'
import { Worker } from '../workers.js'

/** @typedef {import('../run.js').Bench} Bench */

const BATCH = 20
/** Programs that are started take longer, and single calls shorter. */
const FEW = 5
const MANY = 200

/** @param {number} control @param {string} file */
function attachSync(control, file) {
  const backing = openSync(file, 'r+')
  const device = openSync(`/dev/loop${ioctl.loopCtlGetFreeSync(control)}`, 'r+')
  ioctl.loopConfigureSync(device, { fd: backing, info: { flags: ioctl.LO_FLAGS_AUTOCLEAR } })
  closeSync(backing)
  ioctl.loopGetStatus64Sync(device)
  ioctl.loopClrFdSync(device)
  closeSync(device)
}

/** @param {string} file @param {string[]} options */
function losetup(file, ...options) {
  const device = execFileSync('losetup', [...options, '--find', '--show', file], { encoding: 'utf8' }).trim()
  execFileSync('losetup', ['--detach', device])
}

/** An attach, a status and a detach are a hop to a thread each: less than that and the careful calls it cannot be. */
const HOPS = 3
const limit = `C, careful, and ${HOPS} hops`

/** @param {Bench} bench */
export async function attachStatusDetach({ workshop, baseline, turns }) {
  const control = openSync('/dev/loop-control', 'r+')
  const resting = await attach(workshop.image(workshop.memory, 'resting'))
  /** A hop with a call that does nothing. */
  const hop = () => time(BATCH, () => ioctl.blkSszGet(resting.fd))
  try {
    for (const [folder, where, atMost] of /** @type {const} */ ([
      [workshop.memory, 'tmpfs', 2.5],
      [workshop.disk, 'ext4', 1.5],
    ])) {
      const file = workshop.image(folder, 'disk')
      await turns(
        `attach, status, detach; file on ${where}`,
        {
          'C, bare': () => baseline.ask('attach', BATCH, file),
          'C, careful': () => baseline.ask('careful', BATCH, file),
          'a hop': hop,
          [limit]: async () => {
            const hops = await hop()
            const careful = await baseline.ask('careful', BATCH, file)
            return careful.map((nanoseconds, i) => nanoseconds + HOPS * (hops[i] ?? 0))
          },
          'loopctl/ioctl, sync': () => time(BATCH, () => attachSync(control, file)),
          'loopctl': () =>
            time(BATCH, async () => {
              const device = await attach(file)
              await device.status()
              await device.detach()
            }),
          'losetup': () => time(FEW, () => losetup(file)),
        },
        [
          { of: 'loopctl/ioctl, sync', to: 'C, bare', atMost: 1.1 },
          { of: 'loopctl', to: 'C, careful', atMost },
          { of: 'loopctl', to: limit, atMost: 1.15 },
          { of: 'loopctl', to: 'C, bare' },
          { of: 'losetup', to: 'loopctl', atLeast: 20 },
        ],
      )
    }
  } finally {
    await resting.detach()
    closeSync(control)
  }
}

/** What V8 has to collect after it. @param {Bench} bench */
export async function garbage({ workshop, results, rounds }) {
  const worker = new Worker()
  try {
    const file = workshop.image(workshop.memory, 'garbage')
    const counted = await worker.ask('garbage', { file, rounds: rounds(1_000) })
    const row = results.row('garbage of attach, status, detach', [], 'bytes')
    for (const [i, who] of ['loopctl, on the heap', 'loopctl, outside of it'].entries()) {
      row.add(
        who,
        counted.filter((_, at) => at % 2 === i),
      )
    }
  } finally {
    await worker.end()
  }
}

/** From a file to its files and back. @param {Bench} bench */
export async function mountUnmount({ workshop, turns }) {
  const file = workshop.image(workshop.memory, 'filesystem', 8 << 20)
  execFileSync('mkfs.ext4', ['-q', file])
  const folder = join(workshop.memory, 'mounted')
  mkdirSync(folder)
  await turns(
    'mount, unmount; ext4 on tmpfs',
    {
      'loopctl': () =>
        time(FEW, async () => {
          const mount = await mountImage(file, folder)
          await mount.unmount()
        }),
      'loopctl, private': () =>
        time(FEW, async () => {
          const mount = await mountImage(file)
          await mount.unmount()
        }),
      'losetup, mount, umount, losetup': () =>
        time(FEW, () => {
          const device = execFileSync('losetup', ['--find', '--show', file], { encoding: 'utf8' }).trim()
          execFileSync('mount', [device, folder])
          execFileSync('umount', [folder])
          execFileSync('losetup', ['--detach', device])
        }),
    },
    [{ of: 'losetup, mount, umount, losetup', to: 'loopctl' }],
  )
}

/** @param {Bench} bench */
export async function attachWithOptions({ workshop, baseline, turns }) {
  const size = 1 << 20
  const file = workshop.image(workshop.memory, 'options', 4 * size)
  const partitioned = workshop.image(workshop.memory, 'partitioned', 4 * size)
  writePartitionTable(partitioned, size, size)
  /** @type {[what: string, file: string, words: number[], options: import('loopctl').AttachOptions, losetup: string[]][]} */
  const rows = [
    ['read-only', file, [1], { readOnly: true }, ['--read-only']],
    ['offset', file, [0, size], { offset: size }, ['--offset', `${size}`]],
    ['size limit', file, [0, 0, size], { sizeLimit: size }, ['--sizelimit', `${size}`]],
    ['block size', file, [0, 0, 0, 4096], { blockSize: 4096 }, ['--sector-size', '4096']],
    ["partscan: 'user'", partitioned, [0, 0, 0, 0, size, size], { partscan: 'user' }, ['--partscan']],
  ]
  for (const [what, image, words, options, flags] of rows) {
    await turns(
      `attach, detach; ${what}`,
      {
        'C, bare': () => baseline.ask('attach', BATCH, image, ...words),
        'loopctl': () =>
          time(BATCH, async () => {
            const device = await attach(image, options)
            await device.detach()
          }),
        'losetup': () => time(FEW, () => losetup(image, ...flags)),
      },
      [
        { of: 'loopctl', to: 'C, bare' },
        { of: 'losetup', to: 'loopctl', atLeast: 20 },
      ],
    )
  }
}

/**
 * An MBR of one partition.
 *
 * @param {string} file
 * @param {number} start
 * @param {number} length
 */
function writePartitionTable(file, start, length) {
  const sector = Buffer.alloc(512)
  sector.writeUInt8(0x83, 446 + 4)
  sector.writeUInt32LE(start / 512, 446 + 8)
  sector.writeUInt32LE(length / 512, 446 + 12)
  sector.writeUInt16LE(0xaa55, 510)
  const fd = openSync(file, 'r+')
  writeSync(fd, sector)
  closeSync(fd)
}

/** @param {Bench} bench */
export async function status({ workshop, baseline, turns }) {
  const device = await attach(workshop.image(workshop.memory, 'status'))
  try {
    await turns(
      'status',
      {
        'C, ioctl': () => baseline.ask('status', MANY, device.number, 0),
        'C, careful': () => baseline.ask('status', BATCH, device.number, 1),
        'loopctl/ioctl, sync': () => time(MANY, () => ioctl.loopGetStatus64Sync(device.fd)),
        'loopctl': () => time(BATCH, () => device.status()),
        'losetup': () => time(FEW, () => execFileSync('losetup', ['--list', device.path])),
      },
      [
        { of: 'loopctl/ioctl, sync', to: 'C, ioctl' },
        { of: 'loopctl', to: 'C, careful' },
        { of: 'losetup', to: 'loopctl' },
      ],
    )
  } finally {
    await device.detach()
  }
}
