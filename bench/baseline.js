/** The C program: built, started, asked. */

import { execFileSync, spawn } from 'node:child_process'
import { createInterface } from 'node:readline'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const SOURCE = fileURLToPath(new URL('baseline.c', import.meta.url))

export class Baseline {
  #child
  #lines

  /** @param {string} folder where the program goes */
  constructor(folder) {
    const program = join(folder, 'baseline')
    execFileSync('cc', ['-std=gnu17', '-O2', '-Wall', '-Wextra', '-Werror', '-o', program, SOURCE])
    this.#child = spawn(program, { stdio: ['pipe', 'pipe', 'inherit'] })
    // It is gone: said by the answer that does not come.
    this.#child.stdin.on('error', () => {})
    this.#lines = createInterface(this.#child.stdout)[Symbol.asyncIterator]()
  }

  /**
   * @param {string} command
   * @param {(string | number)[]} words
   */
  async ask(command, ...words) {
    this.#child.stdin.write(`${[command, ...words].join(' ')}\n`)
    const answer = await this.#lines.next()
    if (answer.done) throw new Error(`the C program ended during ${command}`)
    if (answer.value.startsWith('error')) throw new Error(`the C program, ${command}: ${answer.value}`)
    return answer.value.trim().split(' ').map(Number)
  }

  end() {
    this.#child.stdin.end()
  }
}
