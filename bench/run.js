/**
 * C, loopctl and losetup in turn, on devices of its own. Run as root, after `npm run build`:
 *
 *     node bench/run.js [--only NAME]... [--rounds N] [--devices N] [--json FILE]
 */

import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { availableParallelism, cpus, release } from 'node:os'
import { parseArgs } from 'node:util'
import { complain } from '../examples/support.js'
import { Baseline } from './baseline.js'
import { Results, takeTurns } from './measure.js'
import { toText } from './report.js'
import { attachStatusDetach, attachWithOptions, garbage, mountUnmount, status } from './scenarios/attach.js'
import { changeBackingFile, migrate } from './scenarios/change.js'
import { crowd } from './scenarios/crowd.js'
import { contention, detachMany, removeMany } from './scenarios/many.js'
import { start } from './scenarios/start.js'
import { Workshop } from './workshop.js'

const SCENARIOS = {
  // Before there are the devices of the others, which the command would look at.
  start,
  attach: attachStatusDetach,
  garbage,
  options: attachWithOptions,
  mount: mountUnmount,
  status,
  list: crowd,
  detach: detachMany,
  remove: removeMany,
  contention,
  change: changeBackingFile,
  migrate,
}

/**
 * What a scenario is given.
 *
 * @typedef {object} Bench
 * @property {Workshop} workshop
 * @property {Baseline} baseline
 * @property {Results} results
 * @property {number} devices as many as there may be at once
 * @property {AbortSignal} signal
 * @property {(share?: number) => number} rounds of one that takes long only a share of them
 * @property {(row: string, contestants: Parameters<typeof takeTurns>[0], comparisons?: import('./measure.js').Comparison[], share?: number) => Promise<void>} turns
 */

/** @typedef {{ machine: Record<string, string | number>, rounds: number, rows: import('./measure.js').Row[] }} Report */

/** @param {Workshop} workshop */
function describeMachine({ diskType }) {
  return {
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    cores: availableParallelism(),
    kernel: release().split('-')[0] ?? '',
    node: process.version,
    filesystems: `tmpfs, ${diskType}`,
    losetup: execFileSync('losetup', ['--version'], { encoding: 'utf8' }).replace('losetup from', '').trim(),
    date: new Date().toISOString().slice(0, 10),
  }
}

/** @param {readonly (keyof typeof SCENARIOS)[]} names @param {number} rounds @param {number} devices @param {AbortSignal} signal */
async function run(names, rounds, devices, signal) {
  const workshop = new Workshop()
  try {
    await workshop.open()
    const baseline = new Baseline(workshop.disk)
    try {
      const results = new Results()
      /** @type {Bench} */
      const bench = {
        workshop,
        baseline,
        results,
        devices,
        signal,
        rounds: (share = 1) => Math.max(1, Math.round(rounds * share)),
        turns: async (name, contestants, comparisons, share) => {
          const row = results.row(name, comparisons)
          // The order of the table is not that of the turns.
          for (const who of Object.keys(contestants)) row.add(who, [])
          await takeTurns(
            contestants,
            { rounds: bench.rounds(share), signal, warmUp: share === undefined ? 5 : 0 },
            row.add,
          )
        },
      }
      for (const name of names) {
        process.stderr.write(`${name}\n`)
        await SCENARIOS[name](bench)
      }
      return { machine: describeMachine(workshop), rounds, rows: results.summary() }
    } finally {
      baseline.end()
    }
  } finally {
    await workshop.close()
  }
}

const { values } = parseArgs({
  options: {
    only: { type: 'string', multiple: true, default: [] },
    rounds: { type: 'string', default: '10' },
    devices: { type: 'string', default: '1000' },
    json: { type: 'string' },
  },
})
const known = /** @type {(keyof typeof SCENARIOS)[]} */ (Object.keys(SCENARIOS))
const names = values.only.length === 0 ? known : known.filter((name) => values.only.includes(name))
const rounds = Number(values.rounds)
const devices = Number(values.devices)

const interrupted = new AbortController()
for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM'])) {
  process.on(signal, () => interrupted.abort(new Error('interrupted')))
}

try {
  if (process.getuid?.() !== 0) throw new Error('run as root: loop devices are made, attached and removed')
  const unknown = values.only.filter((name) => !known.some((scenario) => scenario === name))
  if (unknown.length > 0) throw new Error(`no such scenario: ${unknown.join(', ')}; there are ${known.join(', ')}`)
  if (!(rounds >= 1) || !(devices >= 2)) throw new Error('--rounds: at least 1; --devices: at least 2')
  const report = await run(names, rounds, devices, interrupted.signal)
  console.log(toText(report))
  if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify(report, undefined, 2)}\n`)
} catch (error) {
  complain(interrupted.signal.aborted ? interrupted.signal.reason : error)
  if (interrupted.signal.aborted) process.exitCode = 130
}
