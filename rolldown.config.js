/**
 * dist/: a few files in place of sixty, each of which would cost half a millisecond of every start. What a file finds
 * beside it by import.meta.url is two folders up, as in lib/: so chunks are in a folder too.
 */

import { readdirSync, readFileSync } from 'node:fs'
import { defineConfig } from 'rolldown'

// The last two are for the manual page, and for tests that watch the calls.
const entries = ['index', 'ioctl', 'cli/main', 'cli/commands', 'kernel/observe-calls']

/** The chunks, and the files that each is for; what these import goes with them, where no chunk before has it. */
const chunks = {
  // A command that only looks needs no more of the library.
  list: /\/lib\/(?:observe\/list|kernel\/observe-calls)\.ts$/,
  // What it shares with the library, which must not need the command.
  find: /\/lib\/(?:observe\/find|partitions\/ref)\.ts$/,
  commands: /\/lib\/cli\/commands\.ts$/,
  library: /\/lib\/index\.ts$/,
}

/** Bundled into the command, commander takes half the time: it is seven files. Users get one dependency only. */
const BUNDLED = [
  'commander',
  'cli-progress',
  'string-width',
  'strip-ansi',
  'ansi-regex',
  'emoji-regex',
  'is-fullwidth-code-point',
]

/** A notice of each package that is in a file, which its license asks for. */
function noticesOf(moduleIds) {
  const packages = BUNDLED.filter((name) => moduleIds.some((id) => id.includes(`/node_modules/${name}/`)))
  return packages.map((name) => `/*! With ${name}, of which this is the license:\n\n${licenseOf(name)}*/`).join('\n')
}

function licenseOf(name) {
  const folder = new URL(`node_modules/${name}/`, import.meta.url)
  const file = readdirSync(folder).find((each) => /^licen[cs]e\b/i.test(each))
  if (file === undefined) throw new Error(`${name} has no license`)
  return readFileSync(new URL(file, folder), 'utf8')
}

export default defineConfig({
  input: {
    ...Object.fromEntries(entries.map((name) => [name, `lib/${name}.ts`])),
    // The name that it had before, for programs that watch the calls too.
    'kernel/seam': 'lib/kernel/observe-calls.ts',
  },
  platform: 'node',
  external: (id) => !/^[./]/.test(id) && !BUNDLED.includes(id),
  // Warnings are errors.
  onLog: (_level, { message }) => {
    throw new Error(message)
  },
  output: {
    dir: 'dist',
    format: 'esm',
    sourcemap: true,
    sourcemapExcludeSources: true,
    // They are in lib/, where the source maps lead.
    comments: { legal: true, jsdoc: false, annotation: true },
    chunkFileNames: 'chunks/[name].js',
    codeSplitting: {
      groups: Object.entries(chunks).map(([name, test], i, { length }) => ({ name, test, priority: length - i })),
    },
    banner: ({ moduleIds }) => noticesOf(moduleIds),
  },
})
