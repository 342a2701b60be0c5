/** Processes that are killed in the middle. */

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { setImmediate } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

/**
 * Runs the fixture, and kills it some moments after it has said that the phase begins.
 *
 * @returns what it said last; undefined where it ended by itself before
 */
export async function killIn(
  fixture: string,
  words: string[],
  phase: string,
  moments: number,
): Promise<string | undefined> {
  const script = fileURLToPath(new URL(`fixtures/${fixture}`, import.meta.url))
  const child = spawn(process.execPath, [script, ...words], { stdio: ['ignore', 'pipe', 'inherit'] })
  let said = ''
  const exit = once(child, 'exit')
  const reaching = new Promise<void>((resolve) => {
    child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      said += chunk
      if (said.includes(`${phase}\n`)) resolve()
    })
  })
  await Promise.race([reaching, exit])
  for (let i = 0; i < moments; i++) await setImmediate()
  child.kill('SIGKILL')
  const [, signal] = (await exit) as [number | null, NodeJS.Signals | null]
  if (!child.stdout.readableEnded) await once(child.stdout, 'end')
  return signal === 'SIGKILL' ? said.trimEnd().split('\n').at(-1) : undefined
}
