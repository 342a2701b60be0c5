/**
 * dist/: a few files in place of sixty, each of which would cost half a millisecond of every start. What a file finds
 * beside it by import.meta.url is two folders up, as in lib/: so chunks are in a folder too.
 */

import { readFileSync } from 'node:fs'
import { defineConfig } from 'rolldown'

// The last two are for the manual page, and for tests that watch the calls.
const entries = ['index', 'ioctl', 'cli/main', 'cli/commands', 'kernel/seam']

/** The chunks, and the files that each is for; what these import goes with them, where no chunk before has it. */
const chunks = {
  // A command that only looks needs no more of the library.
  list: /\/lib\/(?:observe\/list|kernel\/seam)\.ts$/,
  // What it shares with the library, which must not need the command.
  find: /\/lib\/(?:observe\/find|partitions\/ref)\.ts$/,
  commands: /\/lib\/cli\/commands\.ts$/,
  library: /\/lib\/index\.ts$/,
}

const commanderLicense = readFileSync(new URL('node_modules/commander/LICENSE', import.meta.url), 'utf8')

export default defineConfig({
  input: Object.fromEntries(entries.map((name) => [name, `lib/${name}.ts`])),
  platform: 'node',
  // Bundled, commander takes half the time: it is seven files.
  external: /^(?![./]|commander$)/,
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
    codeSplitting: {
      groups: Object.entries(chunks).map(([name, test], i, { length }) => ({ name, test, priority: length - i })),
    },
    banner: ({ moduleIds }) =>
      moduleIds.some((id) => id.includes('/node_modules/commander/'))
        ? `/*! With commander, of which this is the license:\n\n${commanderLicense}*/`
        : '',
  },
})
