/** A reporter for vitest: tells at the end of a run which tests were skipped, and why. */

import type { Reporter, TestCase, TestModule, Vitest } from 'vitest/node'

/** The files of so many skipped tests for one reason are told, not the tests. */
const MANY = 5

/** Why the test was skipped; undefined where it was not, or is no test of this run. */
export function whySkipped(test: TestCase): string | undefined {
  const result = test.result()
  if (result.state !== 'skipped') return undefined
  const pattern = test.project.vitest.config.testNamePattern
  if (pattern && !pattern.test(test.fullName.replaceAll(' > ', ' '))) return undefined
  if (result.note !== undefined) return result.note
  // The tests of test/kernel/support.ts alone are skipped without a word of their own.
  const { noKernel } = test.project.getProvidedContext()
  return noKernel === '' ? 'no reason was given' : `tests on real devices cannot run: ${noKernel}`
}

export class SkipReporter implements Reporter {
  #vitest: Vitest | undefined

  onInit(vitest: Vitest): void {
    this.#vitest = vitest
  }

  onTestRunEnd(modules: readonly TestModule[]): void {
    const skipped = new Map<string, Map<string, string[]>>()
    for (const module of modules) {
      for (const test of module.children.allTests('skipped')) {
        const reason = whySkipped(test)
        if (reason === undefined) continue
        const files = skipped.get(reason) ?? new Map<string, string[]>()
        skipped.set(reason, files)
        files.set(module.relativeModuleId, [...(files.get(module.relativeModuleId) ?? []), test.fullName])
      }
    }
    for (const [reason, files] of skipped) this.#vitest?.logger.log(describe(reason, files))
  }
}

function describe(reason: string, files: Map<string, string[]>): string {
  const count = [...files.values()].flat().length
  const lines = [...files].flatMap(([file, titles]) =>
    titles.length > MANY ? [`${file}: ${titles.length} tests`] : titles.map((title) => `${file} > ${title}`),
  )
  return [`SKIPPED ${count === 1 ? '1 test' : `${count} tests`}: ${reason}`, ...lines].join('\n  ')
}
