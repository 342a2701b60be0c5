/** What another machine, or another aim, makes of the tests: how long they may take, and how much of them is done. */

function factor(name: string, usual = 1): number {
  const value = Number(process.env[name] ?? usual)
  return value > 0 ? value : usual
}

/** A limit of so many milliseconds; LOOPCTL_TIME_SCALE=20 makes all of them twenty times as long, for slow machines. */
export function limit(milliseconds: number): number {
  return milliseconds * factor('LOOPCTL_TIME_SCALE')
}

/**
 * The stress tests are a tenth as long as this count, which takes seconds. LOOPCTL_STRESS=1 makes them whole, as CI runs
 * them, LOOPCTL_STRESS=10 ten times as long; in virtual machines they are shorter.
 */
export function times(count: number): number {
  return Math.ceil(count * factor('LOOPCTL_STRESS', 0.1))
}

/** LOOPCTL_FAULTS=40 leaves of the faults every fortieth. */
export function sample<T>(all: T[]): T[] {
  const step = factor('LOOPCTL_FAULTS')
  return all.filter((_, i) => i % step === 0)
}
