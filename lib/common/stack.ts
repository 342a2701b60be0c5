/** Stack traces: how many frames V8 records, and which of them are of this library. */

/** A page may have frozen it (`--frozen-intrinsics`): then it stays as it is. */
const IS_ADJUSTABLE = Object.getOwnPropertyDescriptor(Error, 'stackTraceLimit')?.writable === true

/** Frames of this library that there can be between the error and its caller. */
export const OWN_FRAMES = 30

/** Sets how many frames the next errors get; answers how many it was before. No frames at all stays no frames. */
export function limitStack(frames: number): number {
  const before = Error.stackTraceLimit
  if (IS_ADJUSTABLE && before > 0) Error.stackTraceLimit = frames
  return before
}

export function restoreStackLimit(before: number): void {
  if (IS_ADJUSTABLE && before > 0) Error.stackTraceLimit = before
}

/** `.../lib/` in a checkout, `.../dist/` of the package, and the sources that a source map leads to. */
const FOLDERS = foldersOf(import.meta.url)

function foldersOf(here: string | undefined): string[] {
  // In a bundle in CommonJS nothing is known.
  if (here === undefined) return []
  return ['lib/', 'dist/'].flatMap((name) => {
    const { pathname } = new URL(`../../${name}`, here)
    return [pathname, decodeURIComponent(pathname)]
  })
}

/** Whether a line of a stack is neither of this library nor of Node.js. */
export function isForeign(frame: string): boolean {
  return !/\((?:node:|<anonymous>)|at (?:async )?node:/.test(frame) && !FOLDERS.some((folder) => frame.includes(folder))
}

export function isFrame(line: string): boolean {
  return line.startsWith('    at ')
}
