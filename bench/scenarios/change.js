/** The backing file under a device: another one, or elsewhere. */

import { execFileSync } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { closeSync, openSync, rmSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { attach } from 'loopctl'
import { loopChangeFdSync } from 'loopctl/ioctl'
import { time } from '../measure.js'

/** @typedef {import('../run.js').Bench} Bench */

const BATCH = 4

/** @param {Bench} bench */
export async function changeBackingFile({ workshop, baseline, turns }) {
  const files = /** @type {const} */ ([
    workshop.image(workshop.memory, 'one'),
    workshop.image(workshop.memory, 'other'),
  ])
  const file = (/** @type {number} */ i) => (i % 2 === 0 ? files[1] : files[0])
  const device = await attach(files[0], { readOnly: true })
  try {
    // loopctl would take what others change for somebody else's device.
    const raw = await attach(files[0], { readOnly: true })
    try {
      await turns(
        'changeBackingFile',
        {
          'C': () => baseline.ask('change', BATCH, raw.number, file(0), file(1)),
          'loopctl/ioctl, sync': () =>
            time(BATCH, (i) => {
              const fd = openSync(file(i), 'r')
              loopChangeFdSync(raw.fd, fd)
              closeSync(fd)
            }),
          'loopctl': () => time(BATCH, (i) => device.changeBackingFile(file(i))),
        },
        [
          { of: 'loopctl/ioctl, sync', to: 'C' },
          { of: 'loopctl', to: 'C' },
        ],
      )
    } finally {
      // Its handle no longer knows it; autoclear detaches it.
      await raw.close()
    }
  } finally {
    await device.detach()
  }
}

const MiB = 2 ** 20

/** Files to be moved: data evenly spread over `size` in pieces, the rest are holes. */
const IMAGES = [
  { name: '256 MiB of data', size: 256 * MiB, pieces: 64, piece: 4 * MiB },
  { name: '200 MiB of data in 2 GiB', size: 2048 * MiB, pieces: 50, piece: 4 * MiB },
]

/** Pieces of random bytes. @param {string} path @param {(typeof IMAGES)[number]} image */
function fill(path, { size, pieces, piece }) {
  const fd = openSync(path, 'r+')
  const bytes = randomFillSync(Buffer.alloc(piece))
  for (let i = 0; i < pieces; i++) writeSync(fd, bytes, 0, piece, i * Math.floor(size / pieces))
  closeSync(fd)
  execFileSync('sync', ['-f', path])
}

/** @param {Bench} bench */
export async function migrate(bench) {
  for (const image of IMAGES) await migrateImage(bench, image)
}

/** @param {Bench} bench @param {(typeof IMAGES)[number]} kind */
async function migrateImage({ workshop, turns }, kind) {
  const image = workshop.image(workshop.disk, 'image', kind.size)
  fill(image, kind)
  const copy = join(workshop.disk, 'copy')
  const device = await attach(image, { readOnly: true })
  const copyAndSync = () => {
    execFileSync('cp', ['--sparse=auto', image, copy])
    execFileSync('sync', [copy])
  }
  /** @param {() => unknown} work */
  const measure = (work) => async () => {
    const samples = await time(1, work)
    await device.changeBackingFile(image)
    rmSync(copy)
    execFileSync('sync', ['-f', workshop.disk])
    return samples
  }
  try {
    await turns(
      `migrate, ${kind.name}, on ext4`,
      {
        'cp, sync': measure(copyAndSync),
        'cp, sync, cmp': measure(() => {
          copyAndSync()
          // Out of the page cache, as migrate has it.
          execFileSync('dd', [`of=${copy}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0'], { stdio: 'ignore' })
          execFileSync('cmp', [device.path, copy])
        }),
        'migrate, verify: false': measure(() => device.migrate(copy, { verify: false })),
        'migrate': measure(() => device.migrate(copy)),
      },
      [
        { of: 'cp, sync', to: 'migrate, verify: false', atLeast: 0.9 },
        { of: 'cp, sync, cmp', to: 'migrate', atLeast: 0.9 },
      ],
      0.4,
    )
  } finally {
    await device.detach()
    rmSync(image)
  }
}
