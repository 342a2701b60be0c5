/** Tells a story in a terminal: what each step is, its code, and what it answered. */

import { inspect } from 'node:util'

const WIDTH = 80
const INDENT = 5
const colours = process.stdout.isTTY && process.stdout.hasColors()

/** @param {number} code @param {string} text */
const paint = (code, text) => (colours ? `\x1b[${code}m${text}\x1b[0m` : text)
const BOLD = 1
const CYAN = 36

/** A path that somebody else chose can hold what a terminal obeys. @param {unknown} value */
const printable = (value) => String(value).replaceAll(/\p{Cc}/gu, '?')

/**
 * The steps of a function and their code: a step is what stands between one `await step('...')` and the next. The text
 * is that of the function which runs, so what is shown cannot differ from what is done.
 *
 * @param {Function} story
 * @returns {Map<string, string>}
 */
function codeOfSteps(story) {
  const body = story.toString().replace(/\n\}$/, '')
  const [, ...parts] = body.split(/^ {2}await step\('(.*)'\)$/m)
  return new Map(
    parts.flatMap((title, i) => (i % 2 === 0 ? [[title, (parts[i + 1] ?? '').replaceAll(/^ {2}/gm, '').trim()]] : [])),
  )
}

export class Narrator {
  #code
  #signal
  #told = 0
  /** Whether the step has answered nothing yet. */
  #silent = true

  /** @param {Function} story @param {AbortSignal} signal at which the next step is not begun */
  constructor(story, signal) {
    this.#code = codeOfSteps(story)
    this.#signal = signal
  }

  /** Begins a step: shows its title and its code. @param {string} title */
  step = async (title) => {
    const code = this.#code.get(title)
    if (code === undefined) throw new Error(`no step of the story is called: ${title}`)
    console.log(`\n${paint(BOLD, `${++this.#told}. ${title}`)}\n`)
    for (const line of code.split('\n')) console.log(paint(CYAN, `     ${line}`.trimEnd()))
    this.#silent = true
    // Lets a signal, and that nobody reads the output any more, be noticed before the step begins.
    await new Promise(setImmediate)
    this.#signal.throwIfAborted()
  }

  /** What the step answered, in as many lines as it needs. @param {unknown[]} values */
  say = (...values) => {
    const texts = values.map((value) =>
      typeof value === 'string' ? value : inspect(value, { breakLength: WIDTH - INDENT, colors: colours }),
    )
    this.#answer(texts.join(' ').split('\n'))
  }

  /** @param {string[]} lines */
  #answer(lines) {
    if (this.#silent) console.log('')
    this.#silent = false
    for (const [i, line] of lines.entries()) console.log(`${i === 0 ? '  -> ' : '     '}${line}`)
  }

  /**
   * Those properties of each row, in columns; where a line is too long, its last column loses its beginning.
   *
   * @template {object} Row
   * @param {Row[]} rows
   * @param {(keyof Row & string)[]} names
   */
  sayTable = (rows, ...names) => {
    const table = [names, ...rows.map((row) => names.map((name) => printable(row[name])))]
    const widths = names.map((_, i) => Math.max(...table.map((cells) => cells[i]?.length ?? 0)))
    const lines = table.map((cells) => {
      const last = cells.pop() ?? ''
      const line = cells.map((cell, i) => cell.padEnd((widths[i] ?? 0) + 2)).join('')
      const room = WIDTH - INDENT - line.length
      return line + (last.length > room ? `...${last.slice(3 - room)}` : last)
    })
    this.#answer(lines)
  }
}
