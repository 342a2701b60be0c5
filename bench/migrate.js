/** migrate against cp, in turn, on a sparse image: 2 GiB with 200 MiB of data. Run as root. `--json` for a machine. */

import { execFileSync } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { closeSync, mkdtempSync, openSync, rmSync, statSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { attach } from 'loopctl'

const SIZE = 2 * 2 ** 30
const PIECES = 50
const PIECE = 4 * 2 ** 20
const ROUNDS = 8

/** @param {string} path */
function makeImage(path) {
  writeFileSync(path, '')
  truncateSync(path, SIZE)
  const fd = openSync(path, 'r+')
  const piece = randomFillSync(Buffer.alloc(PIECE))
  for (let i = 0; i < PIECES; i++) writeSync(fd, piece, 0, PIECE, i * Math.floor(SIZE / PIECES))
  closeSync(fd)
  execFileSync('sync', ['-f', path])
}

/** @param {() => unknown} work */
async function seconds(work) {
  const start = performance.now()
  await work()
  return (performance.now() - start) / 1000
}

/** @param {number[]} values */
function median(values) {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN
}

const folder = mkdtempSync(join(tmpdir(), 'loopctl-bench-'))
try {
  const image = join(folder, 'image')
  makeImage(image)
  const names = /** @type {const} */ (['cp, sync', 'cp, sync, cmp', 'migrate, not verified', 'migrate'])
  /** @type {Record<string, number[]>} */
  const times = Object.fromEntries(names.map((name) => [name, []]))
  let holes = 0
  const device = await attach(image, { readOnly: true })
  /** @type {Record<string, (copy: string) => unknown>} */
  const contestants = {
    'cp, sync': (copy) => {
      execFileSync('cp', ['--sparse=auto', image, copy])
      execFileSync('sync', [copy])
    },
    'cp, sync, cmp': (copy) => {
      execFileSync('cp', ['--sparse=auto', image, copy])
      execFileSync('sync', [copy])
      // out of the page cache, as migrate has it
      execFileSync('dd', [`of=${copy}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0'], { stdio: 'ignore' })
      execFileSync('cmp', [device.path, copy])
    },
    'migrate, not verified': (copy) => device.migrate(copy, { verify: false }),
    'migrate': (copy) => device.migrate(copy),
  }
  const copy = join(folder, 'copy')
  for (let round = 0; round < ROUNDS; round++) {
    // Each comes first, second, ... in turn: a disk that has just been written to is slower.
    for (let i = 0; i < names.length; i++) {
      const name = names[(round + i) % names.length] ?? 'migrate'
      times[name]?.push(await seconds(() => contestants[name]?.(copy)))
      if (name === 'migrate') holes = SIZE - statSync(copy).blocks * 512
      await device.changeBackingFile(image)
      rmSync(copy)
      execFileSync('sync', ['-f', folder])
    }
  }
  await device.detach()

  const medians = Object.fromEntries(names.map((name) => [name, median(times[name] ?? [])]))
  const speeds = {
    'migrate, not verified, against cp and sync': ratio(medians['cp, sync'], medians['migrate, not verified']),
    'migrate against cp, sync and cmp': ratio(medians['cp, sync, cmp'], medians['migrate']),
  }
  if (process.argv.includes('--json')) console.log(JSON.stringify({ rounds: ROUNDS, medians, speeds, holes }))
  else {
    for (const name of names) console.log(`${name.padEnd(24)} ${medians[name]?.toFixed(3)} s (median of ${ROUNDS})`)
    for (const [name, speed] of Object.entries(speeds)) console.log(`${name}: ${speed.toFixed(2)} x the speed`)
    console.log(`holes kept: ${holes} of ${SIZE - PIECES * PIECE} bytes`)
  }
} finally {
  rmSync(folder, { recursive: true, force: true })
}

/** @param {number | undefined} theirs @param {number | undefined} ours */
function ratio(theirs, ours) {
  return (theirs ?? Number.NaN) / (ours ?? Number.NaN)
}
