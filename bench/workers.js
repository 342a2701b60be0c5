/** The other end of worker.js. */

import { fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'

/** @typedef {import('./worker.js').Operations} Operations */

const PROGRAM = fileURLToPath(new URL('worker.js', import.meta.url))

export class Worker {
  #child

  constructor() {
    this.#child = fork(PROGRAM, { execArgv: ['--expose-gc'] })
  }

  /**
   * @template {keyof Operations} Name
   * @param {Name} operation
   * @param {Parameters<Operations[Name]>} argument
   * @returns {Promise<number[]>}
   */
  async ask(operation, ...[argument]) {
    const ended = new AbortController()
    const { signal } = ended
    try {
      const gone = once(this.#child, 'exit', { signal }).then(() => {
        throw new Error(`a process ended during ${operation}`)
      })
      this.#child.send({ operation, argument })
      const [answer] = await Promise.race([once(this.#child, 'message', { signal }), gone])
      return answer
    } finally {
      ended.abort()
    }
  }

  /** With all that it holds. */
  async end() {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return
    const gone = once(this.#child, 'exit')
    if (this.#child.connected) this.#child.disconnect()
    await gone
  }
}
