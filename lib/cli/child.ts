/** The command of `loopctl run`: its streams, signals and terminal are its own. */

import { spawn } from 'node:child_process'
import { constants } from 'node:os'
import { errnoDescription } from '../errors/errors.ts'
import { leaveTerminal } from '../kernel/process.ts'
import { isFromKernel, isSessionLeader, noteSender } from '../kernel/signals.ts'
import { report } from './terminal.ts'

/** How a command ended. */
export interface Ended {
  /** As in a shell: 128 and the signal's number where one ended it. */
  status: number
  signal: NodeJS.Signals | null
}

const PASSED_ON = ['SIGINT', 'SIGQUIT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'] as const

/** Resolves when the command has ended. Never looks at process.stdin, which would change the command's. */
export function runCommand(
  [program = '', ...words]: string[],
  added: NodeJS.ProcessEnv,
  json: true | undefined,
): Promise<Ended> {
  return new Promise((resolve) => {
    // Before the command exists: a signal that comes first must not end this process alone.
    const early: NodeJS.Signals[] = []
    let pass = (signal: NodeJS.Signals): unknown => early.push(signal)
    const handler = (signal: NodeJS.Signals) => {
      if (!hasCommandGot(signal)) pass(signal)
    }
    for (const signal of PASSED_ON) {
      process.on(signal, handler)
      noteSender(signal)
    }
    const end = (status: number, signal: NodeJS.Signals | null = null) => {
      for (const name of PASSED_ON) process.off(name, handler)
      resolve({ status, signal })
    }
    const child = spawn(program, words, { stdio: 'inherit', env: { ...process.env, ...added } })
    child.once('error', (error: NodeJS.ErrnoException) => {
      report(cannotStart(program, error), json === true)
      end(error.code === 'ENOENT' ? 127 : 126)
    })
    child.once('exit', (code, signal) => end(signal === null ? (code ?? 0) : 128 + constants.signals[signal], signal))
    pass = (signal) => child.kill(signal)
    for (const signal of early) pass(signal)
  })
}

/** Node's own names the call and the code. */
function cannotStart(program: string, { code, errno = 0 }: NodeJS.ErrnoException): Error {
  const problem = code === 'ENOENT' ? 'command not found' : `cannot be started: ${errnoDescription(errno)}`
  return Object.assign(new Error(`${program}: ${problem}`), { code, errno, path: program })
}

/** Whether the terminal has sent it to the command too, which is of the same process group. */
function hasCommandGot(signal: NodeJS.Signals): boolean {
  return isFromKernel(signal) && !(signal === 'SIGHUP' && isSessionLeader())
}

/** Those that write a core, which would be of this process. */
const OF_CORES = 'SIGQUIT SIGILL SIGTRAP SIGABRT SIGBUS SIGFPE SIGSEGV SIGXCPU SIGXFSZ SIGSYS'.split(' ')

/** Ends this process as the command ended: whoever waits for it sees the same. */
export function endAs({ status, signal }: Ended): void {
  process.exitCode = status
  leaveTerminal(status)
  if (signal !== null && !OF_CORES.includes(signal)) process.kill(process.pid, signal)
}
