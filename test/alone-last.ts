import { BaseSequencer, type TestSpecification } from 'vitest/node'
import { ALONE } from './alone.ts'

function isAlone({ moduleId }: TestSpecification): boolean {
  return ALONE.test(moduleId)
}

/** Those that have to be alone come last: nobody waits for them then. */
export class AloneLast extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    // oxlint-disable-next-line no-array-sort -- it is vitest's, of files
    const sorted = await super.sort(files)
    return [...sorted.filter((file) => !isAlone(file)), ...sorted.filter((file) => isAlone(file))]
  }
}
