/**
 * Which files of tests run beside each other, in this run and in any other on the machine. A device whose server does not
 * answer is everybody's: whoever looks at all devices has a thread in it, and a process cannot end before its threads. And
 * a mount namespace that is made has all mounts of that moment; and the node that was made for a free device stays where
 * somebody else has just taken that. So files are alone that stop a server, or cannot bear one of the others.
 */

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { afterAll, beforeAll, inject } from 'vitest'
import { ALONE } from './alone.ts'

/** They use no device, or one that no other program is offered. */
const NO_DEVICES = /\/test\/(?:api|unit|pack|vm)\//

/** Every process of the machine sees this directory, whatever its /tmp and /run are. */
const LOCKED = '/sys/block'

let holder: ChildProcess | undefined

// oxlint-disable-next-line no-empty-pattern -- vitest reads the fixtures' names off the pattern
beforeAll(async ({}, { file: { filepath } }) => {
  if (inject('noKernel') !== '' || NO_DEVICES.test(filepath)) return
  const mode = ALONE.test(filepath) ? '--exclusive' : '--shared'
  // It ends with this process, however that ends.
  holder = spawn('flock', [mode, LOCKED, 'sh', '-c', 'echo locked; read line'], { stdio: ['pipe', 'pipe', 'inherit'] })
  await once(holder.stdout ?? holder, 'data')
}, 3_600_000)

afterAll(async () => {
  if (holder === undefined) return
  const gone = once(holder, 'exit')
  holder.stdin?.end('\n')
  await gone
  holder = undefined
})
