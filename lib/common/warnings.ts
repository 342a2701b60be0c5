/** What is allowed but odd: returned beside the result, never thrown, and never printed by the library. */

/** What a {@link Warning} is about. Programs can rely on these codes. */
export type WarningCode =
  | 'tail-cut'
  | 'nothing-to-see'
  | 'partition-left-out'
  | 'partition-cut'
  | 'gpt-backup'
  | 'table-block-size'
  | 'window-unbounded'
  | 'open-for-writing'
  | 'backing-mounted'
  | 'no-parser'
  | 'direct-io-buffered'
  | 'data-lost'
  | 'not-answering'

/** Something that is odd, but allowed; plain data. */
export interface Warning {
  code: WarningCode
  /** One sentence, with the figures. */
  message: string
  /** What to do about it, in one sentence. */
  hint?: string
}

/** The warnings of one device: each said once, however often it is found. */
export class Warnings {
  readonly #all = new Map<string, Warning>()

  get list(): readonly Warning[] {
    return this.#all.size === 0 ? [] : [...this.#all.values()]
  }

  add(code: WarningCode, message: string, hint?: string): void {
    this.#all.set(`${code} ${message}`, { code, message, ...(hint !== undefined && { hint }) })
  }

  /** Takes back those with one of the codes: what they were about is looked at anew. */
  clear(...codes: readonly WarningCode[]): void {
    for (const [key, { code }] of this.#all) if (codes.includes(code)) this.#all.delete(key)
  }
}
