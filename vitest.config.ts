import { defineConfig } from 'vitest/config'
import { AT_ONCE } from './test/workers.ts'
import { limit } from './test/scale.ts'
import { SkipReporter } from './test/skips.ts'
import { AloneLast } from './test/alone-last.ts'

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    // Those of the package want the binaries of every machine; those of test/vm take the driver out of the kernel; a soak
    // takes as long as it is told to.
    exclude: ['pack', 'vm', 'soak']
      .filter((name) => process.env[`LOOPCTL_${name.toUpperCase()}`] === undefined)
      .map((name) => `test/${name}/**`),
    globalSetup: ['test/gate.ts'],
    setupFiles: ['test/beside.ts'],
    sequence: { sequencer: AloneLast },
    fileParallelism: AT_ONCE > 1,
    maxWorkers: AT_ONCE,
    testTimeout: limit(20_000),
    hookTimeout: limit(10_000),
    expect: { poll: { timeout: limit(1_000) } },
    reporters: process.env['CI']
      ? [
          'default',
          new SkipReporter(),
          ['json', { outputFile: process.env['LOOPCTL_REPORT'] ?? 'reports/vitest.json' }],
        ]
      : ['default', new SkipReporter()],
  },
})
