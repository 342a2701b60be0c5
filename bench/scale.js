/**
 * What many devices cost on one machine: the table of docs/scale.md. Run as root, after `npm run build`:
 *
 *     node bench/scale.js [--devices N] [--processes N] [--write]
 *
 * --write puts the table into the page. Other programs that use loop devices at the same time wait longer for theirs.
 */

import { readFileSync, writeFileSync } from 'node:fs'
import { release } from 'node:os'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { attach, find, list, watch } from 'loopctl'
import { complain } from '../examples/support.js'
import { time } from './measure.js'
import { toTable } from './report.js'
import { Worker } from './workers.js'
import { Workshop } from './workshop.js'

const PAGE = fileURLToPath(new URL('../docs/scale.md', import.meta.url))
const BEGIN = '<!-- measured: written by npm run bench:scale -- --write -->'
const END = '<!-- /measured -->'
const KiB = 1024

/** @param {number[]} samples nanoseconds @returns milliseconds */
function median(samples) {
  return (samples.toSorted((a, b) => a - b)[samples.length >> 1] ?? Number.NaN) / 1e6
}

/** Bytes that the kernel could give to programs. */
function available() {
  const [, kilobytes = ''] = /^MemAvailable: +(\d+) kB$/m.exec(readFileSync('/proc/meminfo', 'utf8')) ?? []
  return Number(kilobytes) * KiB
}

/** From LOOP_CONFIGURE to the event, with the detach. @param {string} file */
async function timeOfEvent(file) {
  const events = watch()
  let first = events.next()
  const samples = []
  try {
    for (let i = 0; i < 5; i++) {
      const start = performance.now()
      const device = await attach(file)
      for (;;) {
        const { value } = await first
        first = events.next()
        if (value?.type === 'attach' && value.number === device.number) break
      }
      samples.push((performance.now() - start) * 1e6)
      await device.detach()
    }
  } finally {
    await events.return?.()
    await first
  }
  return samples
}

/** @param {Workshop} workshop @param {number} most */
async function measureCrowd(workshop, most) {
  const sizes = [100, 1000, 10_000].filter((size) => size < most)
  const { files } = workshop.images('crowd', most)
  const newcomer = workshop.image(workshop.memory, 'newcomer')
  const worker = new Worker()
  /** @type {Record<string, string>[]} */
  const columns = []
  try {
    // Both are warm: V8 has compiled what is measured.
    await worker.ask('attach', [{ file: newcomer }])
    await worker.ask('detach')
    const atFirst = available()
    const [rssAtFirst = 0] = await worker.ask('memory')
    let held = 0
    for (const size of [...sizes, most]) {
      process.stderr.write(`${size} devices\n`)
      const count = size - held
      /** @type {number[]} */
      let numbers = []
      const [added = 0] = await time(1, async () => (numbers = await workshop.addDevices(count)))
      const wanted = numbers.map((number, i) => ({ number, file: files[held + i] ?? '' }))
      const [attached = 0] = await time(1, () => worker.ask('attach', wanted))
      held = size
      const [rss = 0] = await worker.ask('memory')
      const each = (/** @type {number} */ nanoseconds) => `${(nanoseconds / 1e6 / count).toFixed(2)} ms`
      const ms = (/** @type {number[]} */ samples) => `${Number(median(samples).toPrecision(3))} ms`
      const kilobytes = (/** @type {number} */ bytes) => `${Math.round(bytes / size / KiB)} KiB`
      columns.push({
        'devices attached': String(size),
        'make one more (LOOP_CTL_ADD)': each(added),
        'attach one to it': each(attached),
        'attach and detach, of any free device': ms(
          await time(10, async () => {
            const device = await attach(newcomer)
            await device.detach()
          }),
        ),
        '`list()`': ms(await time(3, () => list())),
        '`find(file)`': ms(await time(3, () => find(files[size - 1] ?? ''))),
        'until `watch()` tells of an attach': ms(await timeOfEvent(newcomer)),
      })
      // Of fewer, what other programs take and give meanwhile is as much.
      if (size === most) {
        const last = columns.at(-1) ?? {}
        last['memory of the kernel, a device'] = kilobytes(atFirst - available() - (rss - rssAtFirst))
        last['memory of the process, a device'] = kilobytes(rss - rssAtFirst)
      }
    }
    process.stderr.write('detach\n')
    const last = columns.at(-1)
    const [nanoseconds = 0] = await worker.ask('detach')
    if (last) last['detach all at once, a device'] = `${(nanoseconds / 1e6 / most).toFixed(2)} ms`
  } finally {
    await worker.end()
  }
  return columns
}

/** @param {Workshop} workshop @param {number} count */
async function measureProcesses(workshop, count) {
  process.stderr.write(`${count} processes\n`)
  const ROUNDS = 20
  const { files } = workshop.images('contended', count)
  await workshop.addDevices(count)
  const workers = files.map(() => new Worker())
  try {
    // They are all there, and have loaded everything.
    await Promise.all(workers.map((worker, i) => worker.ask('contend', { file: files[i] ?? '', rounds: 1 })))
    const start = performance.now()
    const all = await Promise.all(
      workers.map((worker, i) => worker.ask('contend', { file: files[i] ?? '', rounds: ROUNDS })),
    )
    const seconds = (performance.now() - start) / 1000
    const slowest = Math.max(...all.map(([, worst = 0]) => worst)) / 1e6
    return `${count} processes that attach and detach at the same time made ${Math.round((count * ROUNDS) / seconds)} attachments a second together; the slowest attach took ${Math.round(slowest)} ms, and none failed.`
  } finally {
    await Promise.all(workers.map((worker) => worker.end()))
  }
}

/** One column for each number of devices. @param {Record<string, string>[]} columns */
function describe(columns) {
  const names = [...new Set(columns.flatMap((column) => Object.keys(column)))]
  return toTable(
    names.map((name) => [name, ...columns.map((column) => column[name] ?? '')]),
    (column) => column > 0,
  )
}

const { values } = parseArgs({
  options: {
    devices: { type: 'string', default: '10000' },
    processes: { type: 'string', default: '64' },
    write: { type: 'boolean', default: false },
  },
})

const workshop = new Workshop()
try {
  if (process.getuid?.() !== 0) throw new Error('run as root: loop devices are made, attached and removed')
  await workshop.open()
  // Before there are thousands of free devices, among which each would look for the first.
  const processes = await measureProcesses(workshop, Number(values.processes))
  const columns = await measureCrowd(workshop, Number(values.devices))
  const text = [
    BEGIN,
    '',
    `Kernel ${release().split('-')[0]}, Node ${process.version}, files on tmpfs, no udev; ${new Date().toISOString().slice(0, 10)}.`,
    '',
    describe(columns),
    '',
    processes,
    '',
    END,
  ].join('\n')
  if (values.write) {
    const [before = '', rest = ''] = readFileSync(PAGE, 'utf8').split(BEGIN)
    writeFileSync(PAGE, before + text + (rest.split(END)[1] ?? ''))
  } else console.log(text)
} catch (error) {
  complain(error)
} finally {
  process.stderr.write('removing the devices\n')
  await workshop.close()
}
