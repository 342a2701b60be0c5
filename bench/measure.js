/** Samples, the taking of turns, and what is made of them. */

/**
 * How long a contestant takes: its median against that of another, or as it is.
 *
 * @typedef {object} Comparison
 * @property {string} of
 * @property {string} [to] without it the limits are of the row's unit
 * @property {number} [atMost]
 * @property {number} [atLeast]
 */

/** @typedef {'ns' | 'bytes' | '/s' | 'times'} Unit */

/**
 * @typedef {object} Row
 * @property {string} name
 * @property {Unit} unit
 * @property {{ who: string, samples: number, median: number, p99: number }[]} results
 * @property {(Comparison & { value: number, met: boolean | undefined })[]} comparisons
 */

/**
 * Nanoseconds of each call.
 *
 * @param {number} count
 * @param {(i: number) => unknown} work
 */
export async function time(count, work) {
  const samples = []
  for (let i = 0; i < count; i++) {
    const start = performance.now()
    const pending = work(i)
    if (pending instanceof Promise) await pending
    samples.push((performance.now() - start) * 1e6)
  }
  return samples
}

/**
 * The nearest rank.
 *
 * @param {readonly number[]} samples
 * @param {number} share
 */
function quantile(samples, share) {
  const sorted = samples.toSorted((a, b) => a - b)
  return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)] ?? Number.NaN
}

export class Results {
  /** @type {Map<string, { unit: Unit, samples: Map<string, number[]>, comparisons: Comparison[] }>} */
  #rows = new Map()

  /**
   * @param {string} name
   * @param {Comparison[]} [comparisons]
   * @param {Unit} [unit]
   */
  row(name, comparisons = [], unit = 'ns') {
    const row = this.#rows.get(name) ?? { unit, samples: new Map(), comparisons }
    this.#rows.set(name, row)
    return {
      /** @param {string} who @param {readonly number[]} samples */
      add: (who, samples) => {
        const known = row.samples.get(who)
        if (known) known.push(...samples)
        else row.samples.set(who, [...samples])
      },
    }
  }

  /** @returns {Row[]} */
  summary() {
    return [...this.#rows].map(([name, { unit, samples, comparisons }]) => ({
      name,
      unit,
      results: [...samples].map(([who, values]) => ({
        who,
        samples: values.length,
        median: quantile(values, 0.5),
        p99: quantile(values, 0.99),
      })),
      comparisons: comparisons.map((comparison) => {
        const { of, to, atMost = Infinity, atLeast = -Infinity } = comparison
        const median = quantile(samples.get(of) ?? [], 0.5)
        const value = to === undefined ? median : median / quantile(samples.get(to) ?? [], 0.5)
        const hasTarget = 'atMost' in comparison || 'atLeast' in comparison
        return { ...comparison, value, met: hasTarget ? value <= atMost && value >= atLeast : undefined }
      }),
    }))
  }
}

/**
 * Every contestant once a round, each the first in turn: what the machine does besides hits all of them alike. The
 * first rounds warm up and are not counted: V8 compiles what runs often.
 *
 * @param {Record<string, () => readonly number[] | Promise<readonly number[]>>} contestants
 * @param {{ rounds: number, signal: AbortSignal, warmUp: number }} how
 * @param {(who: string, samples: readonly number[]) => void} onSamples
 */
export async function takeTurns(contestants, { rounds, signal, warmUp }, onSamples) {
  const all = Object.entries(contestants)
  for (let round = -warmUp; round < rounds; round++) {
    for (let i = 0; i < all.length; i++) {
      const [who, run] = all[(i + round + 1) % all.length] ?? []
      if (who === undefined || run === undefined) continue
      // A signal is heard only between calls that block.
      await new Promise((resolve) => setImmediate(resolve))
      signal.throwIfAborted()
      const samples = await run()
      if (round >= 0) onSamples(who, samples)
    }
  }
}
