/** Calls and decisions as people read them. */

import { decodeConfig, decodeInfo } from './uapi.ts'

/** What the diagnostics channel `loopctl:call` carries. */
export type TraceMessage =
  | {
      type: 'call'
      /** The ioctl (`LOOP_CONFIGURE`), or the call of the addon, which is named after its system call. */
      call: string
      /** Paths as text, structs as objects; for other data, the number of bytes. */
      arguments: readonly unknown[]
      /**
       * The kernel's value, or the negative errno. For a file or folder that was read, the number of bytes or entries.
       */
      answer: number
      /** The errno's name: `EBUSY`. */
      code?: string
      /**
       * The time in the kernel, for a call that is made at once or is one of several in one hop to a thread. For a call
       * that is alone in its hop, the time of the hop is included.
       */
      microseconds: number
    }
  | {
      type: 'decision'
      /** The decision in words, which can change with every version. */
      text: string
    }

/** `LOOP_SET_STATUS64` for loopSetStatus64, `BLKGETSIZE64` for blkGetSize64; others as they are, without Sync. */
export function nameOfCall(name: string): string {
  const base = name.replace(/Sync$/, '')
  if (/^loop[A-Z]/.test(base)) return base.replaceAll(/[A-Z]/g, (letter) => `_${letter}`).toUpperCase()
  if (base.startsWith('blkPg'))
    return `BLKPG ${base
      .slice('blkPg'.length)
      .replace(/Partition$/, '')
      .toUpperCase()}`
  return /^blk[A-Z]/.test(base) ? base.toUpperCase() : base
}

type Decode = (bytes: Uint8Array) => unknown

const STRUCTS: Record<string, Decode> = {
  loopConfigure: decodeConfig,
  loopGetStatus64: decodeInfo,
  loopSetStatus64: decodeInfo,
}

export function describeArguments(name: string, values: readonly unknown[], answer: number): unknown[] {
  const base = name.replace(/Sync$/, '')
  // What the kernel would have filled is not there where it refused.
  const decode = base === 'loopGetStatus64' && answer < 0 ? undefined : STRUCTS[base]
  return values.map((value) => {
    if (!(value instanceof Uint8Array)) return value
    return decode === undefined ? (textOf(value) ?? `${value.length} bytes`) : decode(value)
  })
}

/** Of data that is a path or a word and ends in a NUL. */
function textOf(bytes: Uint8Array): string | undefined {
  const end = bytes.indexOf(0)
  return end > 0 && end === bytes.length - 1 ? Buffer.from(bytes.subarray(0, end)).toString() : undefined
}

/** One line: `LOOP_CLR_FD(21) = -EBUSY (3.4 us)`. */
export function format(message: TraceMessage): string {
  if (message.type === 'decision') return `-> ${message.text}`
  const { call, arguments: values, answer, code, microseconds } = message
  const told = code === undefined ? String(answer) : `-${code}`
  const flags = FLAGS_AT[call]
  const texts = values.map((value, i) => (i === flags ? formatFlags(Number(value)) : formatValue(value)))
  return `${call}(${texts.join(', ')}) = ${told} (${microseconds} us)`
}

/** Which argument has the flags of open(2). */
const FLAGS_AT: Record<string, number> = {
  open: 1,
  openRegular: 1,
  openLoop: 1,
  create: 1,
  reopenFile: 1,
  openat: 2,
  createat: 2,
}

const O_ACCMODE = 3
const ACCESS = ['O_RDONLY', 'O_WRONLY', 'O_RDWR']

/** `O_RDWR|O_EXCL`. */
function formatFlags(flags: number): string {
  const { O_CREAT, O_EXCL, O_TRUNC, O_APPEND, O_NONBLOCK, O_DIRECTORY, O_NOFOLLOW } =
    process.getBuiltinModule('node:fs').constants
  const known = { O_CREAT, O_EXCL, O_TRUNC, O_APPEND, O_NONBLOCK, O_DIRECTORY, O_NOFOLLOW }
  const set = Object.entries(known).filter(([, bit]) => (flags & bit) === bit)
  const rest = set.reduce((left, [, bit]) => left & ~bit, flags & ~O_ACCMODE)
  const names = [ACCESS[flags & O_ACCMODE] ?? String(flags & O_ACCMODE), ...set.map(([name]) => name)]
  return [...names, ...(rest === 0 ? [] : [`0x${rest.toString(16)}`])].join('|')
}

function formatValue(value: unknown): string {
  if (typeof value === 'string') return /^\d+ bytes$/.test(value) ? `[${value}]` : JSON.stringify(value)
  if (typeof value !== 'object' || value === null) return String(value)
  return process.getBuiltinModule('node:util').inspect(value, { breakLength: Infinity })
}
