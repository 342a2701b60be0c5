/**
 * One of the calls in a program that has nothing else to do: CALL FOLDER NAME. What nobody keeps waiting ends with the
 * program, and its promise is never told. Says `ready`, waits for a line, and says `settled`.
 */

import { readSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { attach } from '../../lib/index.ts'
import { CALLS } from './calls.ts'

const [name = '', folder = '', own = ''] = process.argv.slice(2)
const each = CALLS.find((one) => one.name === name)
if (each === undefined) throw new Error(`there is no call ${name}`)
const served = join(folder, 'served')
const device = await attach(join(served, `${own}.disk`), each.options)
const scene = {
  device,
  served: join(served, `${own}.other`),
  servedFree: join(served, `${own}.free`),
  healthy: join(folder, `${own}.healthy`),
  free: join(folder, `${own}.free`),
}
writeSync(1, 'ready\n')
readSync(0, Buffer.alloc(1))
const wait = each.signalOnly ? { signal: AbortSignal.timeout(500) } : { timeout: 500 }
// AbortSignal.timeout() keeps no process alive either.
const timer = each.signalOnly ? setTimeout(() => {}, 600) : undefined
await each.call(scene, wait).catch(() => {})
clearTimeout(timer)
writeSync(1, 'settled\n')
