/** loopctl run: the command's streams, signals and terminal are its own. */

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, onTestFinished } from 'vitest'
import { limit } from '../scale.ts'
import { test } from './support.ts'

const MAIN = join(process.cwd(), 'dist/cli/main.js')
const O_NONBLOCK = 0o4000

/** A process with all that it has written. */
function started(program: string, words: string[]) {
  const child = spawn(program, words, { stdio: ['pipe', 'pipe', 'inherit'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  let text = ''
  child.stdout.on('data', (data: Buffer) => (text += String(data)))
  return {
    stdin: child.stdin,
    said: () => text,
    ended: once(child, 'close') as Promise<[status: number | null, signal: NodeJS.Signals | null]>,
  }
}

function eventually<T>(look: () => T) {
  return expect.poll(look, { timeout: limit(10_000), interval: 5 })
}

/** Tells the process that it is a child of, counts SIGINT for a second, and tells how many there were. */
const COUNTER = `n=0; trap 'n=$((n + 1))' INT; echo "ready $PPID."; for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; done; echo "got $n."`

describe('a signal reaches the command once', () => {
  const ways: [what: string, before: string, send: (pid: number, keys: NodeJS.WritableStream) => unknown][] = [
    ['Ctrl-C in a terminal, which sends it to the command too', '', (_, keys) => keys.write('\u0003')],
    ['Ctrl-C, with a pipe as stdin', 'echo | ', (_, keys) => keys.write('\u0003')],
    ['kill, in a terminal', '', (pid) => process.kill(pid, 'SIGINT')],
    ['kill, with a pipe as stdin', 'echo | ', (pid) => process.kill(pid, 'SIGINT')],
  ]
  for (const [what, before, send] of ways) {
    test(what, async ({ image }) => {
      const line = `${before}${process.execPath} ${MAIN} run ${image('disk', 65_536)} -- sh -c '${COUNTER.replaceAll("'", String.raw`'\''`)}'`
      const { stdin, said, ended } = started('script', ['--quiet', '--return', '--command', line, '/dev/null'])
      await eventually(said).toMatch(/ready \d+\./)
      send(Number(/ready (\d+)\./.exec(said())?.[1]), stdin)
      await eventually(said).toMatch(/got \d+\./)
      expect(said()).toContain('got 1.')
      stdin.end()
      await ended
    })
  }
})

describe('stdin', () => {
  test('is never made non-blocking, also by a signal: the command reads what comes later', async ({ image }) => {
    const script = `trap : USR1; echo "ready $PPID."; cat`
    const { stdin, said, ended } = started(process.execPath, [
      MAIN,
      'run',
      image('disk', 65_536),
      '--',
      'sh',
      '-c',
      script,
    ])
    await eventually(said).toMatch(/ready \d+\./)
    const pid = Number(/ready (\d+)\./.exec(said())?.[1])
    process.kill(pid, 'SIGUSR1')
    stdin.write('first\n')
    const flags = /^flags:\s*(\d+)$/m.exec(readFileSync(`/proc/${pid}/fdinfo/0`, 'utf8'))?.[1] ?? ''
    expect(Number.parseInt(flags, 8) & O_NONBLOCK).toBe(0)
    stdin.end('second\n')
    expect(await ended).toEqual([0, null])
    expect(said()).toContain('first\nsecond\n')
  })
})

test('what the command sets in the terminal stays', async ({ image }) => {
  const run = `${process.execPath} ${MAIN} run ${image('disk', 65_536)} --`
  const line = `stty echo; ${run} stty -echo; stty -a | grep -o -e '-*echo '`
  const { said, ended } = started('script', ['--quiet', '--return', '--command', line, '/dev/null'])
  await ended
  expect(said().trim()).toBe('-echo')
})

test('a shell sees how the command ended', async ({ image }) => {
  const run = `${process.execPath} ${MAIN} run ${image('disk', 65_536)} -- sh -c`
  const { said, ended } = started('sh', ['-c', `${run} 'exit 3'; echo $?; ${run} 'kill -TERM $$'; echo $?`])
  await ended
  expect(said()).toBe('3\n143\n')
})
