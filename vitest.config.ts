import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    // Wants the binaries of every machine
    exclude: process.env['LOOPCTL_PACK'] === '1' ? [] : ['test/pack/**'],
    globalSetup: ['test/gate.ts'],
    // Devices are the machine's, not a test file's: one file at a time, so that each can count them.
    fileParallelism: false,
    testTimeout: 20_000,
    reporters: process.env['CI'] ? ['default', ['json', { outputFile: 'reports/vitest.json' }]] : ['default'],
  },
})
