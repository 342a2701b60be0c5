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

/**
 * Long series of tests that differ little are whole where the stress tests are. Otherwise a run takes every fourth of them,
 * and another run may take others.
 */
export const STEP: number = factor('LOOPCTL_STRESS', 0.1) < 1 ? 4 : 1

function anyFirst(): number {
  return Math.floor(Math.random() * STEP)
}

/** The calls at which something happens in a test that says "at its k-th call, for every k". */
export function* eachCall(last = Infinity): Generator<number, void> {
  for (let k = 1 + anyFirst(); k <= last; k += STEP) yield k
}

/** Of a list of faults; LOOPCTL_FAULTS=1 takes all of them, LOOPCTL_FAULTS=40 every fortieth. */
export function sample<T>(all: T[]): T[] {
  const given = process.env['LOOPCTL_FAULTS']
  const step = given === undefined ? STEP : factor('LOOPCTL_FAULTS')
  const first = given === undefined ? anyFirst() : 0
  return all.filter((_, i) => i % step === first)
}
