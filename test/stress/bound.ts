/** LOOPCTL_STRESS=10 makes the stress tests ten times as long; CI runs them at 1. */
export function times(count: number): number {
  const factor = Number(process.env['LOOPCTL_STRESS'] ?? '1')
  return Math.round(count * (factor > 0 ? factor : 1))
}
