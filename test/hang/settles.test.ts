/** Every call in a program of its own, which has nothing else to wait for, and a server that is stopped. */

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { build } from 'esbuild'
import { expect, onTestFinished } from 'vitest'
import { limit } from '../scale.ts'
import { CALLS } from './calls.ts'
import { makeImage } from './server.ts'
import { test } from './support.ts'

const DIST = fileURLToPath(new URL('../../dist/index.js', import.meta.url))
/** Programs at a time. */
const MANY = 12

/** The program as plain JavaScript, with the library as it is built. */
async function buildProgram(folder: string): Promise<string> {
  const outfile = join(folder, 'settles.mjs')
  await build({
    entryPoints: [fileURLToPath(new URL('settles.ts', import.meta.url))],
    outfile,
    bundle: true,
    platform: 'node',
    target: 'node20',
    format: 'esm',
    plugins: [
      {
        name: 'built',
        setup: (bundle) => bundle.onResolve({ filter: /lib\/index\.ts$/ }, () => ({ path: DIST, external: true })),
      },
    ],
  })
  return outfile
}

interface Program {
  name: string
  child: ChildProcess
  said: () => string
  ended: Promise<unknown>
}

function start(program: string, name: string, folder: string, own: string): Program {
  const child = spawn(process.execPath, [program, name, folder, own], { stdio: ['pipe', 'pipe', 'inherit'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  let said = ''
  child.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()))
  return { name, child, said: () => said, ended: once(child, 'close') }
}

test(
  'what is awaited settles, though nothing else keeps the program',
  { timeout: limit(120_000) },
  async ({ folder, server }) => {
    const program = await buildProgram(folder)
    const names = CALLS.filter(({ takesLong }) => takesLong !== true).map(({ name }) => name)
    for (let from = 0; from < names.length; from += MANY) {
      const programs = names.slice(from, from + MANY).map((name, i) => {
        const own = `${from + i}`
        for (const file of ['disk', 'other']) server.image(`${own}.${file}`)
        makeImage(join(folder, `${own}.healthy`), 1 << 20)
        return start(program, name, folder, own)
      })
      await expect
        .poll(() => programs.map(({ said }) => said()), { timeout: limit(20_000) })
        .toEqual(programs.map(() => 'ready\n'))
      await server.stop()
      for (const { child } of programs) child.stdin?.end('\n')
      await expect
        .poll(() => programs.filter(({ said }) => !said().includes('settled')).map(({ name }) => name), {
          timeout: limit(15_000),
        })
        .toEqual([])
      server.go()
      await Promise.all(programs.map(({ ended }) => ended))
    }
  },
)
