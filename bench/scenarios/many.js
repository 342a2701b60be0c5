/** Many devices at once, and many processes. */

import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { takeTurns, time } from '../measure.js'
import { Worker } from '../workers.js'

/** @typedef {import('../run.js').Bench} Bench */

const run = promisify(execFile)

/** @param {(worker: Worker) => Promise<void>} work */
async function withWorker(work) {
  const worker = new Worker()
  try {
    await work(worker)
  } finally {
    await worker.end()
  }
}

/** @param {Bench} bench */
export async function detachMany({ workshop, baseline, devices, turns }) {
  const count = Math.min(64, devices)
  const { files, prefix } = workshop.images('detached', count)
  await workshop.addDevices(count)
  const wanted = files.map((file) => ({ file }))
  await withWorker((worker) =>
    turns(
      `detach of ${count} at once`,
      {
        'C, one after another': () => baseline.ask('detach-many', count, prefix),
        'loopctl': async () => {
          await worker.ask('attach', wanted)
          return worker.ask('detach')
        },
        'losetup': async () => {
          /** @type {string[]} */
          const attached = []
          for (const file of files) attached.push((await run('losetup', ['--find', '--show', file])).stdout.trim())
          return time(1, () => run('losetup', ['--detach', ...attached]))
        },
      },
      [
        { of: 'loopctl', to: 'C, one after another' },
        { of: 'losetup', to: 'loopctl' },
      ],
      0.4,
    ),
  )
}

/** @param {Bench} bench */
export async function removeMany({ workshop, baseline, devices, turns }) {
  const count = Math.min(64, devices)
  const measure = async (/** @type {(numbers: number[]) => Promise<number[]>} */ remove) => {
    const numbers = await workshop.addDevices(count)
    const samples = await remove(numbers)
    workshop.forget(numbers)
    return samples
  }
  await withWorker((worker) =>
    turns(
      `remove of ${count} at once`,
      {
        'C, one after another': () => measure((numbers) => baseline.ask('remove', ...numbers)),
        'loopctl': () => measure((numbers) => worker.ask('remove', numbers)),
      },
      [{ of: 'loopctl', to: 'C, one after another' }],
      0.3,
    ),
  )
}

/** @param {Bench} bench */
export async function contention({ workshop, baseline, results, devices, rounds, signal }) {
  const count = Math.min(32, devices)
  const ATTACHES = 20
  /** losetup is slower: as many as it takes to see how much. */
  const FEW = 4
  const { files, prefix } = workshop.images('contended', count)
  await workshop.addDevices(count)
  const workers = files.map(() => new Worker())
  try {
    const title = `${count} processes attach at once`
    const perSecond = results.row(`${title}: attaches per second`, [{ of: 'loopctl', to: 'losetup' }], '/s')
    const slowest = results.row(`${title}: slowest attach`, [{ of: 'losetup', to: 'loopctl' }])
    const retries = results.row(`${title}: retries for each 1000 attaches`, [], 'times')
    const contestants = {
      'C, bare': () => baseline.ask('contend', count, prefix, ATTACHES, 0),
      'C, under the lock': () => baseline.ask('contend', count, prefix, ATTACHES, 1),
      'loopctl': () =>
        together(count * ATTACHES, () =>
          Promise.all(workers.map((worker, i) => worker.ask('contend', { file: files[i] ?? '', rounds: ATTACHES }))),
        ),
      'losetup': () => together(count * FEW, () => Promise.all(files.map((file) => attachByLosetup(file, FEW)))),
    }
    await takeTurns(
      contestants,
      { rounds: rounds(0.3), signal, warmUp: 0 },
      (who, [attaches = 0, tries = 0, worst = 0]) => {
        const each = who === 'losetup' ? FEW : ATTACHES
        perSecond.add(who, [attaches])
        slowest.add(who, [worst])
        // How often losetup tried is not to be seen.
        if (who !== 'losetup') retries.add(who, [(tries * 1000) / (count * each)])
      },
    )
  } finally {
    await Promise.all(workers.map((worker) => worker.end()))
  }
}

/**
 * Attaches a second, retries, the slowest.
 *
 * @param {number} attaches
 * @param {() => Promise<number[][]>} work of each process retries, and its slowest
 */
async function together(attaches, work) {
  const start = performance.now()
  const all = await work()
  const seconds = (performance.now() - start) / 1000
  const retries = all.reduce((sum, [own = 0]) => sum + own, 0)
  return [attaches / seconds, retries, Math.max(...all.map(([, slowest = 0]) => slowest))]
}

/** @param {string} file @param {number} rounds */
async function attachByLosetup(file, rounds) {
  let slowest = 0
  for (let round = 0; round < rounds; round++) {
    const start = performance.now()
    const { stdout } = await run('losetup', ['--find', '--show', file])
    slowest = Math.max(slowest, performance.now() - start)
    await run('losetup', ['--detach', stdout.trim()])
  }
  return [0, slowest * 1e6]
}
