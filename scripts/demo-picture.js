/**
 * A picture of the demo in a terminal of 80 columns, docs/demo.svg: runs `npm run demo` on a pseudo-terminal, and draws
 * what it printed in its first steps, in its colours. Run as root: npm run demo:picture
 */

import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { stripVTControlCharacters } from 'node:util'

const COLUMNS = 80
const STEPS = 4
const FILE = fileURLToPath(new URL('../docs/demo.svg', import.meta.url))

/** Pixels. */
const CELL = { width: 8.4, height: 19 }
const PADDING = 20
const TITLE_BAR = 34

const FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
const BACKGROUND = '#0d1117'
const FOREGROUND = '#e6edf3'

/** What the codes of SGR (select graphic rendition) that the demo uses look like. */
const COLOURS = new Map([
  [32, '#7ee787'],
  [33, '#e3b341'],
  [36, '#79c0ff'],
])
const BOLD = 1
const ESCAPE = String.fromCharCode(27)
const SEQUENCE = new RegExp(`(${ESCAPE}\\[[\\d;]*[A-Za-z])`)
const STYLE = new RegExp(`^${ESCAPE}\\[(\\d*)m$`)

/** @typedef {{ text: string, column: number, bold: boolean, colour: string }} Run a piece of a line in one style */

/** The pieces of a line. An escape sequence that is not known fails, so that nothing is left out. @param {string} line */
function runsOf(line) {
  /** @type {Run[]} */
  const runs = []
  let [column, bold, colour] = [0, false, FOREGROUND]
  for (const piece of line.split(SEQUENCE)) {
    if (!piece.startsWith(ESCAPE)) {
      if (piece.trim() !== '') runs.push({ text: piece, column, bold, colour })
      column += piece.length
      continue
    }
    const code = Number(STYLE.exec(piece)?.[1] ?? NaN)
    if (code === 0) [bold, colour] = [false, FOREGROUND]
    else if (code === BOLD) bold = true
    else if (code === 39) colour = FOREGROUND
    else if (COLOURS.has(code)) colour = COLOURS.get(code) ?? FOREGROUND
    else throw new Error(`an escape sequence that is not drawn: ${JSON.stringify(piece)}`)
  }
  if (column > COLUMNS) throw new Error(`a line is longer than ${COLUMNS} columns: ${line}`)
  return runs
}

/** @param {string} text */
const escape = (text) => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')

/** One piece on the grid of the terminal, whatever font there is. @param {Run} run @param {number} row */
function draw({ text, column, bold, colour }, row) {
  const shown = text.trim()
  const x = PADDING + (column + text.indexOf(shown)) * CELL.width
  const y = TITLE_BAR + PADDING + (row + 0.75) * CELL.height
  const weight = bold ? ' font-weight="bold"' : ''
  const length = (shown.length * CELL.width).toFixed(1)
  return `<text x="${x.toFixed(1)}" y="${y}" fill="${colour}"${weight} textLength="${length}">${escape(shown)}</text>`
}

/** @param {string[]} lines */
function picture(lines) {
  const width = Math.ceil(COLUMNS * CELL.width + 2 * PADDING)
  const height = TITLE_BAR + lines.length * CELL.height + 2 * PADDING
  const buttons = ['#e5534b', '#d29922', '#57ab5a'].map(
    (colour, i) => `<circle cx="${PADDING + 6 + i * 20}" cy="${TITLE_BAR / 2 + 3}" r="6" fill="${colour}"/>`,
  )
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"` +
      ` role="img" aria-label="The first steps of npm run demo in a terminal" font-family="${FONT}" font-size="14">`,
    // Otherwise spaces within a line become one.
    '<style>text { white-space: pre }</style>',
    `<rect width="${width}" height="${height}" rx="10" fill="${BACKGROUND}"/>`,
    ...buttons,
    ...lines.flatMap((line, row) => runsOf(line).map((run) => draw(run, row))),
    '</svg>\n',
  ].join('\n')
}

// script(1) runs it on a terminal, of which npm and the demo ask whether it has colours.
const output = execFileSync('script', ['-qec', `stty cols ${COLUMNS}; npm run --silent demo`, '/dev/null'], {
  encoding: 'utf8',
  env: { ...process.env, TERM: 'xterm-256color', NO_COLOR: undefined, FORCE_COLOR: undefined },
})
const printed = output.replaceAll('\r\n', '\n').split('\n')
const end = printed.findIndex((line) => stripVTControlCharacters(line).startsWith(`${STEPS + 1}. `))
if (end < 0) throw new Error(`the demo has no step ${STEPS + 1}:\n${output}`)
writeFileSync(FILE, picture(['# npm run --silent demo', ...printed.slice(0, end - 1)]))
