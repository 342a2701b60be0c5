/**
 * The program that reads without end: it reads a file block by block, again and again, and compares each block with
 * what it has to be. Imported, it is what starts the program and asks it. It does not know that there is a loop device.
 */

import { fork } from 'node:child_process'
import { once } from 'node:events'
import { constants, realpathSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'

/** Bytes that are read at once. */
const BLOCK = 65_536

/**
 * @typedef {object} Count
 * @property {number} reads that were tried
 * @property {number} errors reads that failed, or found other bytes than they should
 * @property {string} firstError
 * @property {number} slowest how long the slowest read took, in ms
 */

/**
 * What is used of WebAssembly, which the types of Node 20 do not have.
 *
 * @typedef {object} WithWebAssembly
 * @property {{ Memory: new (pages: { initial: number }) => { buffer: ArrayBuffer } }} WebAssembly
 */

/** The running program, seen from outside. */
export class Reader {
  #child
  #blocks
  #signal
  /** Aborts when the program has ended. */
  #ended = new AbortController()

  /**
   * @param {string} path
   * @param {Buffer} content which the file must have; whole blocks
   * @param {AbortSignal} signal which ends the waiting, not the program
   */
  constructor(path, content, signal) {
    this.#blocks = content.length / BLOCK
    this.#signal = signal
    // A session of its own: the Ctrl-C of the terminal is for the demo, which ends the program.
    this.#child = fork(fileURLToPath(import.meta.url), [path], { detached: true, serialization: 'advanced' })
    this.#child.once('exit', (code, name) => this.#ended.abort(new Error(`the program ended: ${name ?? code}`)))
    this.#child.on('error', (error) => this.#ended.abort(error))
    this.#child.send(content)
  }

  /** What it has read until now. Rejects where a read failed, or found other bytes. */
  async count() {
    return this.#whenReads(0)
  }

  /** What it has read when it has been through the whole file so many times more, from now. @param {number} times */
  async passes(times) {
    const { reads } = await this.count()
    return this.#whenReads(reads + times * this.#blocks)
  }

  /** @param {number} wanted @returns {Promise<Count>} */
  async #whenReads(wanted) {
    const either = AbortSignal.any([this.#ended.signal, this.#signal])
    /** @type {Count[]} */
    let answer
    try {
      either.throwIfAborted()
      this.#child.send(wanted)
      answer = await once(this.#child, 'message', { signal: either })
    } catch (error) {
      throw either.reason ?? error
    }
    const [count] = answer
    if (count === undefined) throw new Error('the program answered nothing')
    const { reads, errors, firstError } = count
    if (errors > 0) throw new Error(`the program missed ${errors} of ${reads} reads: ${firstError}`)
    return count
  }

  /** Ends it, and waits for that. */
  async stop() {
    if (this.#ended.signal.aborted) return
    this.#child.kill('SIGKILL')
    await once(this.#ended.signal, 'abort')
  }
}

/** @param {string} path */
async function readWithoutEnd(path) {
  /** How many reads the other side waits for. @type {number | undefined} */
  let wanted
  /** The first message is the content, each further one a number of reads. @type {Buffer} */
  const content = await new Promise((resolve) => {
    process.on('message', (message) => {
      if (typeof message === 'number') wanted = message
      else resolve(/** @type {Buffer} */ (message))
    })
  })
  // Whoever started it is gone.
  process.once('disconnect', () => process.exit(1))

  const file = await open(path, constants.O_RDONLY | constants.O_DIRECT)
  // O_DIRECT wants memory at a multiple of 512, which Buffer does not promise; WebAssembly's begins at a page.
  const { WebAssembly } = /** @type {WithWebAssembly} */ (/** @type {unknown} */ (globalThis))
  const block = new Uint8Array(new WebAssembly.Memory({ initial: 1 }).buffer, 0, BLOCK)
  /** @type {Count} */
  const count = { reads: 0, errors: 0, firstError: '', slowest: 0 }
  for (let at = 0; ; at = (at + BLOCK) % content.length) {
    const began = performance.now()
    try {
      const { bytesRead } = await file.read(block, 0, BLOCK, at)
      if (bytesRead < BLOCK) throw new Error(`at ${at} there were only ${bytesRead} bytes`)
      if (content.compare(block, 0, BLOCK, at, at + BLOCK) !== 0) throw new Error(`at ${at} there were other bytes`)
    } catch (error) {
      count.errors++
      count.firstError ||= String(error)
    }
    count.reads++
    count.slowest = Math.max(count.slowest, Math.ceil(performance.now() - began))
    if (wanted === undefined || count.reads < wanted) continue
    wanted = undefined
    process.send?.(count)
  }
}

const [, script, path] = process.argv
if (script !== undefined && path !== undefined && realpathSync(script) === fileURLToPath(import.meta.url)) {
  await readWithoutEnd(path)
}
