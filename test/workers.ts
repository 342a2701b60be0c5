/** How many files of tests may run at once: each has an equal share of the numbers in own-devices.ts. */
export const WORKERS = 4

/**
 * How many do run at once: three, or LOOPCTL_TEST_WORKERS of them. Most files wait for processes half of their time. The
 * tests in test/vm take the driver out of the kernel: they always run alone.
 */
export const AT_ONCE: number =
  process.env['LOOPCTL_VM'] === '1'
    ? 1
    : Math.min(WORKERS, Math.max(1, Number(process.env['LOOPCTL_TEST_WORKERS'] ?? 3)))
