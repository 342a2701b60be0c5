/** What the demo needs of the machine, and how it starts the machine's programs. */

import { spawn, spawnSync } from 'node:child_process'
import { doctor } from 'loopctl'

/** Each program, and the Debian package that has it. */
const PROGRAMS = { 'mkfs.ext4': 'e2fsprogs', 'blockdev': 'util-linux' }
/** No program of the demo takes longer, in ms. */
const LIMIT = 60_000

/** `su` leaves the path of an ordinary user, who has no sbin in it. */
const path = [process.env['PATH'] || '/usr/bin', '/usr/sbin', '/sbin'].join(':')
const env = { ...process.env, PATH: path, LC_ALL: 'C' }

/** What keeps the demo from running here, and what to do about it; undefined: nothing. */
export async function whyImpossible() {
  if (process.platform !== 'linux') return `The demo needs Linux, this is ${process.platform}: run it there.`
  if (process.getuid?.() !== 0) return 'The demo attaches and mounts, which only root may: run it with sudo.'
  const missing = Object.entries(PROGRAMS).filter(([program]) => !has(program))
  if (missing.length > 0) {
    const packages = [...new Set(missing.map(([, name]) => name))]
    return `The demo needs ${missing.map(([program]) => program).join(', ')}: install the packages ${packages.join(', ')}.`
  }
  const { canAttach, checks } = await doctor()
  if (canAttach) return undefined
  const { message, remedy } = checks.find(({ status }) => status === 'failure') ?? { message: 'the reason is unknown' }
  return `Loop devices do not work here: ${message}${remedy === undefined ? '' : `; ${remedy}`}.`
}

/** @param {string} program */
function has(program) {
  const { error } = spawnSync(program, ['-V'], { env, stdio: 'ignore' })
  return error === undefined || !('code' in error) || error.code !== 'ENOENT'
}

/**
 * Runs a program to its end; rejects with what it said where it fails. It has a session of its own: the Ctrl-C of the
 * terminal is for the demo, which lets the program end and then takes back what it did.
 *
 * @param {string} program
 * @param {string[]} words
 * @returns {Promise<void>}
 */
export function run(program, ...words) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, words, {
      env,
      stdio: ['ignore', 'ignore', 'pipe'],
      detached: true,
      timeout: LIMIT,
      killSignal: 'SIGKILL',
    })
    let complaint = ''
    child.stderr.setEncoding('utf8').on('data', (text) => (complaint += text))
    child.once('error', reject)
    child.once('close', (code, signal) => {
      if (code === 0) resolve()
      else reject(new Error(`${[program, ...words].join(' ')}: ${complaint.trim() || (signal ?? `exit code ${code}`)}`))
    })
  })
}
