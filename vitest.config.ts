import { availableParallelism } from 'node:os'
import { defineConfig } from 'vitest/config'
import { WORKERS } from './test/workers.ts'
import { limit } from './test/scale.ts'

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    // Those of the package want the binaries of every machine; those of test/vm take the driver out of the kernel.
    exclude: ['pack', 'vm']
      .filter((name) => process.env[`LOOPCTL_${name.toUpperCase()}`] !== '1')
      .map((name) => `test/${name}/**`),
    globalSetup: ['test/gate.ts'],
    // Each file has numbers of devices for itself, of which there are as many as WORKERS. Those of test/vm want the driver.
    maxWorkers: process.env['LOOPCTL_VM'] === '1' ? 1 : Math.min(WORKERS, availableParallelism()),
    testTimeout: limit(20_000),
    hookTimeout: limit(10_000),
    expect: { poll: { timeout: limit(1_000) } },
    reporters: process.env['CI']
      ? ['default', ['json', { outputFile: process.env['LOOPCTL_REPORT'] ?? 'reports/vitest.json' }]]
      : ['default'],
  },
})
