/** `N passed, N failed, N skipped`, summed from the JSON reports of the test runners that are named. */

import { readFileSync } from 'node:fs'

let [passed, failed, skipped] = [0, 0, 0]
for (const file of process.argv.slice(2)) {
  const report = JSON.parse(readFileSync(file, 'utf8'))
  if (!(report.numTotalTests > 0)) throw new Error(`${file} reports no test at all`)
  passed += report.numPassedTests
  failed += report.numFailedTests
  skipped += report.numPendingTests + report.numTodoTests
}
console.log(`${passed} passed, ${failed} failed, ${skipped} skipped`)
