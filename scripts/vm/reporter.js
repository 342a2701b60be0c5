/**
 * A reporter for vitest: by folder of test/, what passed, failed, and was skipped and why. Written anew after every
 * file, for a guest may be stopped. What `--testNamePattern` leaves out is no test of this run.
 */

import { renameSync, writeFileSync } from 'node:fs'
import { whySkipped } from '../../test/skips.ts'

/** @typedef {{ passed: number, failed: string[], skipped: Record<string, string[]> }} Suite */

export default class SuiteReporter {
  /** @type {Record<string, Suite>} */
  suites = {}

  onInit() {
    this.write(false)
  }

  /** @param {import('vitest/node').TestModule} module */
  onTestModuleEnd(module) {
    const [, name = 'test'] = /(?:^|\/)test\/(\w+)\//.exec(module.moduleId) ?? []
    const suite = (this.suites[name] ??= { passed: 0, failed: [], skipped: {} })
    for (const error of module.errors()) suite.failed.push(`${module.relativeModuleId}: ${error.message}`)
    for (const test of module.children.allTests()) {
      const result = test.result()
      const title = `${module.relativeModuleId}: ${test.fullName}`
      if (result.state === 'passed') suite.passed++
      else if (result.state === 'failed') suite.failed.push(`${title}: ${result.errors[0]?.message}`)
      else {
        const reason = whySkipped(test)
        if (reason !== undefined) (suite.skipped[reason] ??= []).push(title)
      }
    }
    this.write(false)
  }

  /**
   * @param {unknown} _modules
   * @param {readonly { message: string }[]} errors
   */
  onTestRunEnd(_modules, errors) {
    const suite = (this.suites['test'] ??= { passed: 0, failed: [], skipped: {} })
    for (const { message } of errors) suite.failed.push(message)
    this.write(true)
  }

  /** @param {boolean} isComplete */
  write(isComplete) {
    const { suites } = this
    const all = Object.values(suites)
    /** @param {(suite: Suite) => number} count */
    const sum = (count) => all.reduce((total, suite) => total + count(suite), 0)
    const [numPassedTests, numFailedTests, numPendingTests] = [
      sum(({ passed }) => passed),
      sum(({ failed }) => failed.length),
      sum(({ skipped }) => Object.values(skipped).flat().length),
    ]
    const numTotalTests = numPassedTests + numFailedTests + numPendingTests
    const report = {
      isComplete,
      numTotalTests,
      numPassedTests,
      numFailedTests,
      numPendingTests,
      numTodoTests: 0,
      suites,
    }
    const file = process.env['LOOPCTL_REPORT'] ?? 'reports/suites.json'
    writeFileSync(`${file}.new`, JSON.stringify(report, undefined, 2))
    renameSync(`${file}.new`, file)
  }
}
