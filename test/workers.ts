import { availableParallelism } from 'node:os'

/** How many files of tests may run at once: each has an equal share of the numbers in own-devices.ts. */
export const WORKERS = 4

/** How many do run at once on this machine. The tests in test/vm take the driver out of the kernel: they run alone. */
export const AT_ONCE: number = process.env['LOOPCTL_VM'] === '1' ? 1 : Math.min(WORKERS, availableParallelism())
