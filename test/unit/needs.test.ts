import { readFileSync } from 'node:fs'
import { afterEach, describe, expect, test, type TestContext, vi } from 'vitest'
import { LACKS } from '../kernel-lacks.ts'
import { kernelHas, needs, needsKernel, skipForKernel } from '../needs.ts'

// No tool is there, whatever machine this is.
vi.mock('../../scripts/tools.js', async (original) => ({ ...(await original<object>()), isThere: () => false }))

afterEach(() => vi.unstubAllEnvs())

/** What the operation would skip the test for; this test goes on. */
function reasonOf(context: TestContext, operation: () => void): unknown {
  const skip = vi.spyOn(context, 'skip').mockImplementation(() => {
    throw new Error('skipped')
  })
  expect(operation).toThrow('skipped')
  const [[reason] = []] = skip.mock.calls
  skip.mockRestore()
  return reason
}

describe('a missing tool', () => {
  test('skips the test, with its package and what to do', (context) => {
    vi.stubEnv('LOOPCTL_REQUIRE_KERNEL', '')
    expect(reasonOf(context, () => needs('strace', 'runc'))).toBe(
      'strace (package strace), runc (package runc) are missing: npm run setup',
    )
  })

  test('is an error with LOOPCTL_REQUIRE_KERNEL=1', () => {
    vi.stubEnv('LOOPCTL_REQUIRE_KERNEL', '1')
    expect(() => needs('strace')).toThrow(
      'LOOPCTL_REQUIRE_KERNEL=1, but strace (package strace) is missing: npm run setup',
    )
  })
})

describe('what the kernel lacks', () => {
  test('skips the test with the reason of the list, also with LOOPCTL_REQUIRE_KERNEL=1', (context) => {
    vi.stubEnv('LOOPCTL_REQUIRE_KERNEL', '1')
    expect(reasonOf(context, () => skipForKernel('user namespaces'))).toBe(LACKS['user namespaces'].reason)
  })

  test.for(['btrfs', 'erofs', 'exfat', 'f2fs', 'fuse', 'iso9660', 'ntfs3', 'squashfs', 'udf', 'vfat', 'xfs'] as const)(
    '%s: as /proc/filesystems says',
    (name) => {
      const has = kernelHas(name)
      const known = readFileSync('/proc/filesystems', 'utf8').split(/\s+/)
      expect(has).toBe(known.includes(name))
      if (has) expect(() => needsKernel(name)).not.toThrow()
    },
  )
})
