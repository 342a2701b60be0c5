/**
 * dist/: a few files in place of sixty, each of which would cost half a millisecond of every start. What a file finds
 * beside it by import.meta.url is two folders up, as in lib/: so chunks are in a folder too.
 */

import { defineConfig } from 'rolldown'

// The last two are for the manual page, and for tests that watch the calls.
const entries = ['index', 'ioctl', 'cli/main', 'cli/commands', 'kernel/seam']

export default defineConfig({
  input: Object.fromEntries(entries.map((name) => [name, `lib/${name}.ts`])),
  platform: 'node',
  external: /^(?![./])/,
  // Warnings are errors.
  onLog: (_level, { message }) => {
    throw new Error(message)
  },
  output: {
    dir: 'dist',
    format: 'esm',
    sourcemap: true,
    sourcemapExcludeSources: true,
    chunkFileNames: 'chunks/[name].js',
  },
})
