/** What is built: what a program loads that imports the library. */

import { existsSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const DIST = fileURLToPath(new URL('../../dist', import.meta.url))

/** The files that are loaded with one, itself too. */
function loadedWith(file: string, seen = new Set<string>()): Set<string> {
  if (seen.has(file)) return seen
  seen.add(file)
  const text = readFileSync(file, 'utf8')
  for (const [, name = ''] of text.matchAll(/^(?:import|export) (?:.* from )?"(\.[^"]+)";$/gm)) {
    loadedWith(join(dirname(file), name), seen)
  }
  return seen
}

test.for(['index.js', 'ioctl.js'])('%s loads nothing of the command', (name) => {
  expect(existsSync(join(DIST, name)), 'npm run build').toBe(true)
  const files = [...loadedWith(join(DIST, name))]
  expect(files.length).toBeGreaterThan(1)
  for (const file of files) expect(readFileSync(file, 'utf8'), file).not.toMatch(/class Command\b|lib\/cli\//)
})
