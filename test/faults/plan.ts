/** What a run of fixtures/operations.mjs is told, and what it tells. */

export interface Plan {
  /** Two devices that are attached and held by the parent, the second one read-only. */
  given: number
  readOnly: number
  /** `lo_file_name` of the first. */
  reference: string
  images: {
    given: string
    /** For what the child attaches. */
    own: string
    /** Bytes like those behind the second device, and where they are to be moved then. */
    twin: string
    moved: string
  }
  /** Of no device yet. */
  number: number
  /** The calls of loopctl/ioctl to make. */
  raw: string[]
  /** The operations to try; all of them where it is not said. */
  only?: string[]
}

export interface Outcome {
  /** The operation, or the call of loopctl/ioctl. */
  name: string
  /** What it resolved to, where that is more than "done". */
  answer?: string
  error?: { code: string; reason: string; message: string; call: string }
  /** The calls that it made, by the names of the addon. */
  calls: string[]
  /** What must not be, whichever fault was made. */
  wrong: string[]
}
