/** K4: where udev runs, attach with partscan opens the device by a node that udev does not watch. Nobody else ever sees it. */

import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { describe, expect } from 'vitest'
import { attachedUnder, test } from '../kernel/support.ts'

/** Attaches, and notes each call, and what is in /dev at that moment but for the nodes of loop devices. */
const SCRIPT = `
import { readdirSync } from 'node:fs'
const { attach } = await import(process.argv[1] + '/dist/index.js')
const { observe } = await import(process.argv[1] + '/dist/kernel/observe-calls.js')
const [, , file, killedAt] = process.argv
const calls = []
const names = new Set()
observe((call) => {
  calls.push(call)
  for (const name of readdirSync('/dev')) if (!name.startsWith('loop')) names.add(name)
  if (call === killedAt && calls.includes('mknodBlockAt')) process.kill(process.pid, 'SIGKILL')
})
const device = await attach(file, { partscan: true })
observe(undefined)
console.log(JSON.stringify({ calls, names: [...names] }))
await device.detach()
`

/** A /run of the process's own, in which udev seems to be. */
const WITH_UDEV =
  'mount --make-rprivate / && mount -t tmpfs none /run && mkdir /run/udev && touch /run/udev/control && exec "$@"'

function attachUnderUdev(file: string, killedAt = '') {
  const node = [process.execPath, '--input-type=module', '-e', SCRIPT, process.cwd(), file, killedAt]
  return spawnSync('unshare', ['--mount', 'sh', '-c', WITH_UDEV, 'sh', ...node], { encoding: 'utf8' })
}

const isOfLoop = (name: string) => name.startsWith('loop')

describe('the node that udev does not watch', () => {
  test('is in no folder', ({ image }) => {
    const before = new Set(readdirSync('/dev'))
    const { stdout, stderr } = attachUnderUdev(image('disk'))
    expect(stderr).toBe('')
    const { calls, names } = JSON.parse(stdout) as { calls: string[]; names: string[] }
    expect(calls).toContain('mknodBlockAt')
    expect(names.filter((name) => !before.has(name))).toEqual([])
  })

  for (const call of ['openat', 'loopConfigure']) {
    test(`leaves nothing where the process is killed at ${call}`, ({ folder, image }) => {
      const before = new Set(readdirSync('/dev'))
      expect(attachUnderUdev(image('disk'), call)).toMatchObject({ signal: 'SIGKILL', stdout: '' })
      expect(readdirSync('/dev').filter((name) => !before.has(name) && !isOfLoop(name))).toEqual([])
      expect(attachedUnder(folder)).toEqual([])
    })
  }
})
