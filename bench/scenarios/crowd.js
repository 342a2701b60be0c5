/** What it costs that there are many: list, find, attach, and the memory of who holds them. */

import { execFileSync } from 'node:child_process'
import { attach, find, list } from 'loopctl'
import { time } from '../measure.js'
import { Worker } from '../workers.js'

/** @param {import('../run.js').Bench} bench */
export async function crowd({ workshop, baseline, results, devices, turns }) {
  const sizes = [...new Set([10, 100, 1000].map((size) => Math.min(size, devices)))]
  const most = Math.max(...sizes)
  const { files } = workshop.images('crowd', most)
  const file = workshop.image(workshop.memory, 'newcomer')
  const attachOne = (/** @type {string} */ where) =>
    turns(
      `attach, detach; among ${most} attached`,
      {
        [`C, ${where}`]: () => baseline.ask('attach', 10, file),
        [`loopctl, ${where}`]: () =>
          time(10, async () => {
            const device = await attach(file)
            await device.detach()
          }),
      },
      [
        { of: `C, among ${most}`, to: 'C, alone' },
        { of: `loopctl, among ${most}`, to: 'loopctl, alone', atMost: 1.5 },
      ],
    )

  await attachOne('alone')
  const worker = new Worker()
  try {
    const [rss = 0, heap = 0] = await worker.ask('memory')
    let held = 0
    for (const size of sizes) {
      const numbers = await workshop.addDevices(size - held)
      await worker.ask(
        'attach',
        numbers.map((number, i) => ({ number, file: files[held + i] ?? '' })),
      )
      held = size
      const last = files[size - 1] ?? ''
      const share = size > 100 ? 0.5 : undefined
      await turns(
        `list; ${size} attached`,
        {
          C: () => baseline.ask('list', 1),
          loopctl: () => time(1, () => list()),
          losetup: () => time(1, () => execFileSync('losetup', ['--list'])),
        },
        [
          { of: 'loopctl', to: 'C', ...(size === 1000 && { atMost: 1.2 }) },
          { of: 'losetup', to: 'loopctl', ...(size === 1000 && { atLeast: 1.8 }) },
        ],
        share,
      )
      await turns(
        `find; ${size} attached`,
        {
          C: () => baseline.ask('find', 1, last),
          loopctl: () => time(1, () => find(last)),
          losetup: () => time(1, () => execFileSync('losetup', ['--associated', last])),
        },
        [
          { of: 'loopctl', to: 'C' },
          { of: 'losetup', to: 'loopctl' },
        ],
        share,
      )
    }
    const [rssAfter = 0, heapAfter = 0] = await worker.ask('memory')
    const memory = results.row(`memory of a process that holds ${most}`, [], 'bytes')
    memory.add('resident, before', [rss])
    memory.add('resident', [rssAfter])
    memory.add('heap, for one LoopDevice', [(heapAfter - heap) / most])
    await attachOne(`among ${most}`)
  } finally {
    await worker.end()
  }
}
