/**
 * What guests reported, as a table: each file of tests against each guest. scripts/kernels calls it with what it has
 * started; the command is for scripts/vm-test: GUEST=REPORT=FILE,FILE... with the files that have to have run.
 */

import { existsSync, readFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'

/**
 * @typedef {import('./reporter.js').Report} Report
 * @typedef {import('./reporter.js').FileResult} FileResult
 * @typedef {{ name: string, report: string, files: readonly string[], seconds?: number }} Guest
 */

/** @param {Guest} guest @returns {Report} */
function readReport({ report }) {
  if (existsSync(report)) return JSON.parse(readFileSync(report, 'utf8'))
  const none = { numTotalTests: 0, numPassedTests: 0, numFailedTests: 0, numPendingTests: 0, numTodoTests: 0 }
  return { isComplete: false, release: '', files: {}, ...none }
}

/** @param {FileResult} result */
function countSkipped({ skipped }) {
  return Object.values(skipped).flat().length
}

/** Passed, and whatever else there was. @param {FileResult | undefined} result */
function cellOf(result) {
  if (result === undefined) return '-'
  const skipped = countSkipped(result)
  const [failed, left] = [result.failed.length, skipped]
  return `${result.passed}${failed > 0 ? `, ${failed} FAILED` : ''}${left > 0 ? `, ${left} skipped` : ''}`
}

/** @param {string[][]} rows @param {string} between @param {string} [edge] */
function align(rows, between, edge = '') {
  const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? []
  return rows.map((row) => {
    const cells = row.map((cell, column) => cell.padEnd(widths[column] ?? 0))
    return `${edge}${cells.join(between)}${edge.split('').toReversed().join('')}`.trimEnd()
  })
}

/** The table as Markdown has it. @param {readonly string[][]} rows */
export function toMarkdown([header = [], ...rows]) {
  const escaped = [header, ...rows].map((row) => row.map((cell) => cell.replaceAll('|', String.raw`\|`)))
  const widths = header.map((_, column) => Math.max(...escaped.map((row) => row[column]?.length ?? 0)))
  const [first = [], ...others] = escaped
  return align([first, widths.map((width) => '-'.repeat(width)), ...others], ' | ', '| ').join('\n')
}

/**
 * Reads the reports of the guests.
 *
 * @param {readonly Guest[]} guests
 */
export function readResults(guests) {
  const all = guests.map((guest) => ({ guest, report: readReport(guest) }))
  const files = [
    ...new Set(all.flatMap(({ guest, report }) => [...guest.files, ...Object.keys(report.files)])),
  ].toSorted()
  const rows = [
    ['', ...guests.map(({ name }) => name)],
    ...files.map((file) => [
      file.replace(/^test\//, '').replace(/\.test\.ts$/, ''),
      ...all.map(({ report }) => cellOf(report.files[file])),
    ]),
    ['passed', ...all.map(({ report }) => String(report.numPassedTests))],
    ['failed', ...all.map(({ report }) => String(report.numFailedTests))],
    ['skipped', ...all.map(({ report }) => String(report.numPendingTests))],
  ]
  if (guests.some(({ seconds }) => seconds !== undefined)) {
    rows.push(['seconds', ...guests.map(({ seconds = 0 }) => String(seconds))])
  }

  /** By reason and file, the guests, and the tests with the number of guests that skipped them. @type {Map<string, Map<string, { guests: string[], tests: Map<string, number> }>>} */
  const skips = new Map()
  /** @type {string[]} */
  const complaints = []
  for (const { guest, report } of all) {
    if (!report.isComplete)
      complaints.push(`${guest.name}: did not come to its end, see ${guest.report.replace(/json$/, 'log')}`)
    for (const file of guest.files) {
      const result = report.files[file]
      if (result === undefined || result.passed + result.failed.length + countSkipped(result) === 0)
        complaints.push(`${guest.name}: no test of ${file} has run`)
    }
    for (const [file, { failed, skipped }] of Object.entries(report.files)) {
      complaints.push(...failed.map((text) => `${guest.name}: ${file}: ${text}`))
      for (const [reason, titles] of Object.entries(skipped)) {
        const byFile = skips.get(reason) ?? new Map()
        skips.set(reason, byFile)
        const where = byFile.get(file) ?? { guests: [], tests: new Map() }
        byFile.set(file, where)
        where.guests.push(guest.name)
        for (const title of titles) where.tests.set(title, (where.tests.get(title) ?? 0) + 1)
      }
    }
  }
  /** Of tests that were skipped, those that ran in no guest. @type {Set<string>} */
  const nowhere = new Set()
  for (const byFile of skips.values()) {
    for (const [file, { tests }] of byFile) {
      const ran = all.filter(({ report }) => report.files[file] !== undefined).length
      for (const [title, count] of tests) if (count === ran) nowhere.add(`${file} ${title}`)
    }
  }
  return { nowhere, releases: all.map(({ report }) => report.release), rows, skips, complaints }
}

/** Prints it; whether all is well. @param {readonly Guest[]} guests */
export function printResults(guests) {
  const { rows, skips, nowhere, complaints } = readResults(guests)
  for (const line of align(rows, '  ')) console.log(line)
  for (const [reason, byFile] of skips) {
    console.log(`skipped, ${reason}:`)
    for (const [file, { guests: where, tests }] of byFile) {
      console.log(
        `  ${file}: ${[...tests.keys()].slice(0, 3).join('; ')}${tests.size > 3 ? `; ${tests.size} in all` : ''} (${where.join(', ')})`,
      )
    }
  }
  if (guests.length > 1) for (const test of nowhere) console.log(`in no guest: ${test}`)
  for (const complaint of complaints) console.error(`FAILED ${complaint}`)
  return guests.length > 0 && complaints.length === 0
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const guests = process.argv.slice(2).map((argument) => {
    const [name = '', report = '', files = ''] = argument.split('=')
    return { name, report, files: files.split(',') }
  })
  if (!printResults(guests)) process.exitCode = 1
}
