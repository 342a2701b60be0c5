/**
 * The figures and the table of docs/benchmarks.md, of what `npm run bench -- --json bench/results.json` has written:
 *
 *     node bench/plot.js [FILE [FOLDER]]
 */

import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parse, View } from 'vega'
import { compile } from 'vega-lite'
import { toMarkdown } from './report.js'

/** @typedef {import('./measure.js').Row} Row */
/** @typedef {import('vega-lite').TopLevelSpec} Spec */

const SUMMARY = '<!-- summary: written by npm run bench:plot -->'
const END_OF_SUMMARY = '<!-- end of summary -->'
const BEGIN = '<!-- results: written by npm run bench:plot -->'
const END = '<!-- end of results -->'

/** The same in every figure; told apart by shape too. */
const SERIES = ['C', 'loopctl/ioctl, sync', 'loopctl', 'losetup']
const COLOURS = ['#848d97', '#d29922', '#2f81f7', '#e5534b']
const SHAPES = ['diamond', 'square', 'circle', 'triangle-up']

/** Text and lines on either background: the reader's choice of colours decides. */
const STYLE = `<style>
  svg > rect { fill: #ffffff } text { fill: #1f2328 } .role-axis-grid line { stroke: #d1d9e0 }
  @media (prefers-color-scheme: dark) {
    svg > rect { fill: #0d1117 } text { fill: #e6edf3 } .role-axis-grid line { stroke: #30363d }
  }
</style>`

const CONFIG = {
  font: 'system-ui, sans-serif',
  padding: 12,
  axis: {
    labelFontSize: 12,
    labelLimit: 0,
    titleFontSize: 12,
    titleFontWeight: /** @type {const} */ ('normal'),
    titlePadding: 8,
    domain: false,
  },
  axisY: { ticks: false, labelPadding: 8 },
  legend: {
    orient: /** @type {const} */ ('top'),
    labelFontSize: 12,
    labelLimit: 0,
    symbolSize: 90,
    symbolOpacity: 1,
    offset: 8,
  },
  view: { stroke: null },
  title: { anchor: /** @type {const} */ ('start'), fontSize: 14, offset: 12 },
}

const nominal = /** @type {const} */ ('nominal')
const quantitative = /** @type {const} */ ('quantitative')
const log = { type: /** @type {const} */ ('log') }
const yes = /** @type {const} */ (true)

/** Only the decades: a line for each step between them is noise. */
const time = {
  type: quantitative,
  scale: log,
  title: 'time, logarithmic',
  axis: {
    grid: yes,
    values: [-3, -2, -1, 0, 1, 2, 3, 4].map((power) => 10 ** power),
    labelExpr:
      "datum.value >= 1000 ? datum.value / 1000 + ' s' : datum.value >= 1 ? datum.value + ' ms' : round(datum.value * 1000) + ' µs'",
  },
}

/** @param {readonly { series: string }[]} points */
function bySeries(points) {
  const domain = SERIES.filter((name) => points.some(({ series }) => series === name))
  const pick = (/** @type {readonly string[]} */ of) => domain.map((name) => of[SERIES.indexOf(name)] ?? '')
  const series = { field: 'series', type: nominal, title: null }
  return {
    color: { ...series, scale: { domain, range: pick(COLOURS) } },
    shape: { ...series, scale: { domain, range: pick(SHAPES) } },
    yOffset: { field: 'series', type: nominal, sort: domain },
  }
}

/** Of the ways of C the one with the fewest calls. @param {Row} row */
function pointsOf({ name, results }) {
  const ways = ['C', 'C, bare', 'C, ioctl', 'C, one after another']
  const way = ways.find((one) => results.some(({ who }) => who === one))
  return results.flatMap(({ who, median, p99 }) => {
    const series = who === way ? 'C' : who
    return SERIES.includes(series) ? [{ name, series, median: median / 1e6, p99: p99 / 1e6 }] : []
  })
}

/** Points, not bars: a logarithmic scale has no 0 for them to begin at. @param {readonly Row[]} rows @returns {Spec} */
function drawOperations(rows) {
  const shown = rows.filter(({ name }) => /^(attach, (?!.*among)|status|changeBackingFile|detach of)/.test(name))
  const points = shown.flatMap(pointsOf)
  const { color, shape, yOffset } = bySeries(points)
  const y = {
    field: 'name',
    type: nominal,
    title: null,
    sort: null,
    axis: { grid: yes, tickBand: /** @type {const} */ ('extent') },
  }
  return {
    title: 'Median, and a line to the 99th percentile; C: as few calls as it takes',
    data: { values: points },
    width: 520,
    height: { step: 9, for: 'offset' },
    encoding: { y, yOffset, color },
    layer: [
      {
        mark: { type: 'rule', opacity: 0.6, strokeWidth: 2 },
        encoding: { x: { ...time, field: 'median' }, x2: { field: 'p99' } },
      },
      {
        mark: { type: 'point', filled: true, size: 70, opacity: 1 },
        encoding: { x: { ...time, field: 'median' }, shape },
      },
    ],
  }
}

/** @param {readonly Row[]} rows @returns {Spec} */
function drawList(rows) {
  const points = rows.flatMap((row) => {
    const attached = /^list; (\d+) attached$/.exec(row.name)?.[1]
    return attached === undefined ? [] : pointsOf(row).map((point) => ({ ...point, attached: Number(attached) }))
  })
  const { color, shape } = bySeries(points)
  return {
    title: 'list(): all attached devices, median',
    data: { values: points },
    width: 520,
    height: 260,
    mark: { type: 'line', point: { filled: true, size: 90 }, strokeWidth: 2 },
    encoding: {
      x: {
        field: 'attached',
        type: quantitative,
        scale: log,
        title: 'attached devices, logarithmic',
        axis: { values: points.map(({ attached }) => attached) },
      },
      y: { ...time, field: 'median' },
      color,
      shape,
    },
  }
}

/** Bars from 0. @param {readonly Row[]} rows @returns {Spec} */
function drawMany(rows) {
  return {
    vconcat: rows
      .filter(({ name }) => /^(detach|remove) of/.test(name))
      .map(({ name, results }) => ({
        title: name,
        data: {
          values: results.map(({ who, median }) => ({ who, series: who.split(',')[0], median: median / 1e6 })),
        },
        width: 520,
        height: { step: 26 },
        mark: { type: 'bar' },
        encoding: {
          x: { field: 'median', type: quantitative, title: 'milliseconds, median', axis: { tickCount: 6 } },
          y: { field: 'who', type: nominal, title: null, sort: null },
          color: { field: 'series', type: nominal, scale: { domain: SERIES, range: COLOURS }, legend: null },
        },
      })),
  }
}

/** @param {string} name @param {Spec} spec */
async function draw(name, spec) {
  const view = new View(parse(compile({ ...spec, config: CONFIG, background: '#ffffff' }).spec), { renderer: 'none' })
  const svg = await view.toSVG()
  writeFileSync(join(folder, `${name}.svg`), `${svg.replace('>', `>${STYLE}`)}\n`)
}

const here = fileURLToPath(new URL('.', import.meta.url))
const [, , file = join(here, 'results.json'), folder = join(here, '../docs')] = process.argv
/** @type {import('./run.js').Report} */
const report = JSON.parse(readFileSync(file, 'utf8'))
await draw('benchmarks-operations', drawOperations(report.rows))
await draw('benchmarks-list', drawList(report.rows))
await draw('benchmarks-many', drawMany(report.rows))

/** @param {number} nanoseconds */
function milliseconds(nanoseconds) {
  return `${Number((nanoseconds / 1e6).toPrecision(2))} ms`
}

/** @param {number} factor */
function times(factor) {
  return factor < 10 ? factor.toFixed(1) : factor.toFixed(0)
}

/** @param {string} row @param {string} who */
function medianOf(row, who) {
  return report.rows.find(({ name }) => name === row)?.results.find((one) => one.who === who)?.median ?? Number.NaN
}

/** What can be read without the rest; undefined where only a part was measured. */
function summary() {
  const [whole, mounted] = ['attach, status, detach; file on tmpfs', 'mount, unmount; ext4 on tmpfs']
  const lists = report.rows.findLast(({ name }) => name.startsWith('list; '))?.name ?? ''
  const [loopctl, losetup, c] = ['loopctl', 'losetup', 'C, careful'].map((who) => medianOf(whole, who))
  const [mount, people] = ['loopctl', 'losetup, mount, umount, losetup'].map((who) => medianOf(mounted, who))
  const slower = medianOf(lists, 'loopctl') / medianOf(lists, 'losetup')
  if (!loopctl || !losetup || !c || !mount || !people || !slower) return undefined
  return `Attach, status and detach of one device take ${milliseconds(loopctl)}; attach and detach by two runs of \`losetup\` take ${times(losetup / loopctl)} times as long. To mount an image and unmount it takes ${milliseconds(mount)}, and ${milliseconds(people)} with four programs. A C program that makes the same system calls takes ${milliseconds(c)} for one device; \`list()\` with ${lists.replaceAll(/\D/g, '')} devices takes ${times(slower)} times as long as \`losetup --list\`.`
}

const page = join(folder, 'benchmarks.md')
let text = readFileSync(page, 'utf8')
for (const [begin, end, content] of [
  [SUMMARY, END_OF_SUMMARY, summary()],
  [BEGIN, END, toMarkdown(report)],
]) {
  if (content === undefined) continue
  const [before, rest] = text.split(begin ?? '')
  const after = rest?.split(end ?? '')[1]
  if (before === undefined || after === undefined) throw new Error(`${page}: no ${begin} or no ${end}`)
  text = `${before}${begin}\n\n${content}\n\n${end}${after}`
}
writeFileSync(page, text)
