/**
 * A reporter for vitest in a guest: by file of tests, what passed, failed, and was skipped and why. Written anew after
 * every file, for a guest may be stopped. What `--testNamePattern` leaves out is no test of this run. A report that is
 * there is gone on with.
 */

import { existsSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { release } from 'node:os'
import { whySkipped } from '../../test/skips.ts'

/** @typedef {{ passed: number, failed: string[], skipped: Record<string, string[]>, seconds: number }} FileResult */

/**
 * @typedef {{
 *   isComplete: boolean
 *   release: string
 *   numTotalTests: number
 *   numPassedTests: number
 *   numFailedTests: number
 *   numPendingTests: number
 *   numTodoTests: number
 *   files: Record<string, FileResult>
 * }} Report
 */

export default class FileReporter {
  /** @type {Record<string, FileResult>} */
  files = {}
  path = process.env['LOOPCTL_REPORT'] ?? 'reports/files.json'
  /** Whether the run before this one, if there was any, came to its end. */
  wasComplete = true

  onInit() {
    if (existsSync(this.path)) {
      /** @type {Report} */
      const before = JSON.parse(readFileSync(this.path, 'utf8'))
      this.files = before.files
      this.wasComplete = before.isComplete
    }
    this.write(false)
  }

  /** @param {import('vitest/node').TestModule} module */
  onTestModuleEnd(module) {
    const result = this.resultOf(module.relativeModuleId)
    result.seconds = Math.round(module.diagnostic().duration / 1_000)
    for (const error of module.errors()) result.failed.push(error.message)
    for (const test of module.children.allTests()) {
      const { state, errors } = test.result()
      if (state === 'passed') result.passed++
      else if (state === 'failed') result.failed.push(`${test.fullName}: ${errors[0]?.message}`)
      else {
        const reason = whySkipped(test)
        if (reason !== undefined) (result.skipped[reason] ??= []).push(test.fullName)
      }
    }
    this.write(false)
  }

  /**
   * @param {unknown} _modules
   * @param {readonly { message: string }[]} errors
   */
  onTestRunEnd(_modules, errors) {
    // What is thrown outside a test, as by a promise that nobody waits for
    if (errors.length > 0) this.resultOf('test').failed.push(...errors.map(({ message }) => message))
    this.write(true)
  }

  /** @param {string} file */
  resultOf(file) {
    return (this.files[file] ??= { passed: 0, failed: [], skipped: {}, seconds: 0 })
  }

  /** @param {boolean} isComplete */
  write(isComplete) {
    const all = Object.values(this.files)
    /** @param {(file: FileResult) => number} count */
    const sum = (count) => all.reduce((total, file) => total + count(file), 0)
    const [numPassedTests, numFailedTests, numPendingTests] = [
      sum(({ passed }) => passed),
      sum(({ failed }) => failed.length),
      sum(({ skipped }) => Object.values(skipped).flat().length),
    ]
    /** @type {Report} */
    const report = {
      isComplete: isComplete && this.wasComplete,
      release: release(),
      numTotalTests: numPassedTests + numFailedTests + numPendingTests,
      numPassedTests,
      numFailedTests,
      numPendingTests,
      numTodoTests: 0,
      files: this.files,
    }
    writeFileSync(`${this.path}.new`, JSON.stringify(report, undefined, 2))
    renameSync(`${this.path}.new`, this.path)
  }
}
