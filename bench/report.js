/** Results as text: a table for a terminal, and one in Markdown. */

/** @typedef {import('./measure.js').Row} Row */
/** @typedef {import('./measure.js').Unit} Unit */

const SCALES = /** @type {const} */ ({
  'ns': [
    [1e9, 's'],
    [1e6, 'ms'],
    [1e3, 'µs'],
    [1, 'ns'],
  ],
  'bytes': [
    [2 ** 20, 'MiB'],
    [2 ** 10, 'KiB'],
    [1, 'bytes'],
  ],
  '/s': [[1, '/s']],
  'times': [[1, '']],
})

/** @param {number} value @param {Unit} unit */
function format(value, unit) {
  const [scale, name] = SCALES[unit].find(([size]) => value >= size) ?? [1, unit === 'times' ? '' : unit]
  return `${round(value / scale)} ${name}`.trim()
}

/** Three digits. @param {number} value */
function round(value) {
  if (value === 0 || value >= 100) return value.toFixed(0)
  return value.toPrecision(3)
}

/** @param {Row} row @param {Row['comparisons'][number]} comparison */
function compare({ unit }, { to, value, atMost, atLeast, met }) {
  const limit = atMost ?? atLeast
  const target =
    limit === undefined ? '' : `${atMost === undefined ? '≥' : '≤'} ${to === undefined ? format(limit, unit) : limit}`
  return {
    ratio: to === undefined ? '' : `${round(value)} × ${to}`,
    target: met === false ? `${target}, missed` : target,
  }
}

/**
 * One line a contestant, and one more for each further comparison of it.
 *
 * @param {Row} row
 */
function linesOf(row) {
  return row.results.flatMap(({ who, median, p99, samples }, i) => {
    const [first, ...more] = row.comparisons.filter(({ of }) => of === who).map((each) => compare(row, each))
    const single = samples === 1
    const figures = [format(median, row.unit), single ? '' : format(p99, row.unit), single ? '' : String(samples)]
    return [
      [i === 0 ? row.name : '', who, ...figures, first?.ratio ?? '', first?.target ?? ''],
      ...more.map(({ ratio, target }) => ['', '', '', '', '', ratio, target]),
    ]
  })
}

const HEADINGS = ['what', 'who', 'median', 'p99', 'samples', 'ratio', 'target']
const toTheRight = new Set([2, 3, 4])

/** @param {import('./run.js').Report} report */
export function toText({ machine, rows }) {
  const lines = [HEADINGS, ...rows.flatMap(linesOf)]
  const widths = HEADINGS.map((_, i) => Math.max(...lines.map((cells) => cells[i]?.length ?? 0)))
  const table = lines.map((cells) =>
    cells
      .map((cell, i) => (toTheRight.has(i) ? cell.padStart(widths[i] ?? 0) : cell.padEnd(widths[i] ?? 0)))
      .join('  ')
      .trimEnd(),
  )
  return [describe(machine), '', ...table].join('\n')
}

/** @param {import('./run.js').Report} report */
export function toMarkdown({ machine, rows }) {
  const table = toTable([HEADINGS, ...rows.flatMap(linesOf)], (column) => toTheRight.has(column))
  return `Measured on: ${describe(machine)}.\n\n${table}`
}

/**
 * As Markdown has it; the first line is the head.
 *
 * @param {readonly (readonly string[])[]} lines
 * @param {(column: number) => boolean} isToTheRight
 */
export function toTable([head = [], ...rest], isToTheRight) {
  const rule = head.map((_, column) => (isToTheRight(column) ? '--:' : '---'))
  return [head, rule, ...rest].map((cells) => `| ${cells.join(' | ')} |`).join('\n')
}

/** @param {Record<string, string | number>} machine */
function describe(machine) {
  return Object.entries(machine)
    .map(([name, value]) => `${name} ${value}`)
    .join('; ')
}
