/** A filesystem whose server is stopped, killed, slow, or answers errors: as the test says, and never longer than it. */

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, readdirSync, readFileSync, rmdirSync, truncateSync, writeFileSync } from 'node:fs'
import { constants } from 'node:os'
import { createInterface, type Interface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { expect, vi } from 'vitest'
import { limit } from '../scale.ts'

const SCRIPT = fileURLToPath(new URL('fixtures/fuse_server.py', import.meta.url))

/** By the name of a request, `*` for all others: seconds that the answer takes, a negative errno, or no answer. */
export type Rules = Readonly<Record<string, number | 'silent'>>

export const SLOW: Rules = { '*': 1 }
export const ERRORS: Rules = { '*': -constants.errno.EIO }

/** A stopped one goes on after so long in any case: a test whose main thread waits for it cannot say so. */
const LONGEST_STOP_S = limit(20_000) / 1_000

export class Server {
  /** Where its filesystem is mounted. */
  readonly folder: string
  readonly #child: ChildProcess
  readonly #lines: Interface
  #guard: ChildProcess | undefined
  #isUnmounted = false

  private constructor(folder: string, child: ChildProcess, lines: Interface) {
    this.folder = folder
    this.#child = child
    this.#lines = lines
  }

  /** Mounted at `folder`, which is made, until the test has ended. */
  static async start(folder: string): Promise<Server> {
    mkdirSync(folder)
    const child = spawn('python3', [SCRIPT, folder], { stdio: ['pipe', 'pipe', 'inherit'] })
    const lines = createInterface({ input: child.stdout ?? expect.fail('no stdout') })
    const server = new Server(folder, child, lines)
    expect(await once(lines, 'line')).toEqual(['ready'])
    return server
  }

  /** Takes it and its mount away. Idempotent. */
  async end(): Promise<void> {
    await this.kill()
    if (this.#isUnmounted) return
    this.#isUnmounted = true
    execFileSync('umount', ['-l', this.folder])
    rmdirSync(this.folder)
  }

  /** A file of that many zeros; its path. */
  image(name: string, bytes = 1 << 20): string {
    return makeImage(`${this.folder}/${name}`, bytes)
  }

  async behave(rules: Rules): Promise<void> {
    const said = once(this.#lines, 'line')
    this.#child.stdin?.write(`${JSON.stringify(rules)}\n`)
    expect(await said).toEqual(['ok'])
  }

  /** No request is answered, nor even read, until {@link go}. */
  async stop(): Promise<void> {
    const { pid } = this.#child
    this.#child.kill('SIGSTOP')
    this.#guard = spawn('sleep', [String(LONGEST_STOP_S)], { stdio: 'ignore' })
    this.#guard.once('exit', (status) => {
      if (status === 0 && pid !== undefined) process.kill(pid, 'SIGCONT')
    })
    await vi.waitFor(() => expect(statesOf(pid)).toEqual(new Set(['T'])), { timeout: limit(5_000) })
  }

  get isStopped(): boolean {
    return statesOf(this.#child.pid).has('T')
  }

  /** What it has not answered so far it answers now. */
  go(): void {
    this.#guard?.kill()
    this.#guard = undefined
    this.#child.kill('SIGCONT')
  }

  /** It answers as at the beginning, if it still is. */
  async recover(): Promise<void> {
    if (this.#hasEnded) return
    this.go()
    await this.behave({})
  }

  get #hasEnded(): boolean {
    return this.#child.exitCode !== null || this.#child.signalCode !== null
  }

  /** Every request fails ENOTCONN from now on. */
  async kill(): Promise<void> {
    if (this.#hasEnded) return
    const gone = once(this.#child, 'exit')
    this.#child.kill('SIGKILL')
    await gone
    this.#guard?.kill()
  }
}

/** A file of that many zeros; its path. */
export function makeImage(path: string, bytes = 1 << 20): string {
  writeFileSync(path, '')
  truncateSync(path, bytes)
  return path
}

/** What becomes of a promise: it is to end while a server is silent. */
export type Ending<T> = { value: T } | { error: unknown } | 'hangs'

/** How long a call may take that was given a second. */
export const SECOND = 1_000
const MOST = limit(2 * SECOND)

/** How the call has ended, within twice a second, in which others of this process go on. */
export async function endingOf<T>(calling: Promise<T>, ms = MOST): Promise<Ending<T>> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<'hangs'>((resolve) => {
    timer = setTimeout(resolve, ms, 'hangs')
  })
  try {
    return await Promise.race([
      calling.then(
        (value) => ({ value }),
        (error: unknown) => ({ error }),
      ),
      late,
    ])
  } finally {
    clearTimeout(timer)
  }
}

/** The states of the threads of a process, as procfs has them. */
function statesOf(pid: number | undefined): Set<string | undefined> {
  const tasks = `/proc/${pid}/task`
  return new Set(readdirSync(tasks).map((task) => /\) (\w)/.exec(readFileSync(`${tasks}/${task}/stat`, 'utf8'))?.[1]))
}
