/**
 * What the guests of scripts/vm-test reported, as a table: REPORT=SUITE,SUITE... names a guest's report, and the suites
 * of which it has to have run something. Fails where a test did, a guest did not come to its end, or a suite did not run.
 */

import { existsSync, readFileSync } from 'node:fs'

/**
 * @typedef {import('./reporter.js').Suite} Suite
 * @typedef {{ isComplete: boolean, numPassedTests: number, numTotalTests: number, suites: Record<string, Suite> }} Report
 */

/** @type {string[]} */
const complaints = []
/** @type {Map<string, Set<string>>} */
const skips = new Map()
const columns = ['vm', 'kernel', 'faults', 'stress']
const rows = [['kernel', 'guest', ...columns, 'tests']]
/** @type {Map<string, number>} */
const perKernel = new Map()

for (const argument of process.argv.slice(2)) {
  const [file = '', wanted = ''] = argument.split('=')
  const [, kernel = '', guest = ''] = /(?:^|\/)vm-([^/]*)-(\w+)\.json$/.exec(file) ?? []
  const name = `${kernel} ${guest}`
  /** @type {Report} */
  const report = existsSync(file)
    ? JSON.parse(readFileSync(file, 'utf8'))
    : { isComplete: false, numPassedTests: 0, numTotalTests: 0, suites: {} }
  if (!report.isComplete) complaints.push(`${name}: did not come to its end, see ${file.replace(/json$/, 'log')}`)
  for (const suite of wanted.split(',')) {
    if (!((report.suites[suite]?.passed ?? 0) > 0)) complaints.push(`${name}: no test of test/${suite} has run`)
  }
  for (const { failed, skipped } of Object.values(report.suites)) {
    complaints.push(...failed.map((text) => `${name}: ${text}`))
    for (const [reason, titles] of Object.entries(skipped)) {
      const where = skips.get(reason) ?? new Set()
      for (const title of titles) where.add(`${name}: ${title}`)
      skips.set(reason, where)
    }
  }
  const cells = columns.map((column) => {
    const suite = report.suites[column]
    return suite ? `${suite.passed}/${suite.failed.length}/${Object.values(suite.skipped).flat().length}` : '-'
  })
  rows.push([kernel, guest, ...cells, String(report.numTotalTests)])
  perKernel.set(kernel, (perKernel.get(kernel) ?? 0) + report.numPassedTests)
}

const widths = columns.concat('', '', '').map((_, i) => Math.max(...rows.map((row) => row[i]?.length ?? 0)))
console.log('passed/failed/skipped')
for (const row of rows)
  console.log(
    row
      .map((cell, i) => cell.padEnd(widths[i] ?? 0))
      .join('  ')
      .trimEnd(),
  )
for (const [kernel, passed] of perKernel) console.log(`${kernel}: ${passed} tests passed`)
for (const [reason, where] of skips) {
  console.log(`skipped, ${reason}:`)
  for (const title of where) console.log(`  ${title}`)
}
for (const complaint of complaints) console.error(`FAILED ${complaint}`)
if (rows.length === 1 || complaints.length > 0) process.exitCode = 1
