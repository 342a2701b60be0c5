/** What another machine, or another aim, makes of the tests: how long they may take, and how much of them is done. */

function factor(name: string): number {
  const value = Number(process.env[name] ?? '1')
  return value > 0 ? value : 1
}

/** A limit of so many milliseconds; LOOPCTL_TIME_SCALE=20 makes all of them twenty times as long, for slow machines. */
export function limit(milliseconds: number): number {
  return milliseconds * factor('LOOPCTL_TIME_SCALE')
}

/** LOOPCTL_STRESS=10 makes the stress tests ten times as long; CI runs them at 1, and at less in virtual machines. */
export function times(count: number): number {
  return Math.ceil(count * factor('LOOPCTL_STRESS'))
}

/** LOOPCTL_FAULTS=40 leaves of the faults every fortieth. */
export function sample<T>(all: T[]): T[] {
  const step = factor('LOOPCTL_FAULTS')
  return all.filter((_, i) => i % step === 0)
}
