/** What the completion scripts are written from. */

export const SHELLS = ['bash', 'zsh', 'fish'] as const

/** What is completed: a kind of thing, or one of the words. */
export type Completed = 'file' | 'folder' | 'device' | 'free' | 'command' | 'device or file' | readonly string[]

export interface OptionWords {
  short?: string
  long: string
  about: string
  /** Undefined: it has no value. */
  value?: Completed
  /** The value is taken only after `=`. */
  isOptional: boolean
}

export interface CommandWords {
  name: string
  about: string
  options: OptionWords[]
  /** Of its arguments, one after another. */
  values: Completed[]
  /** Of all that follow. */
  rest?: Completed
}
