/** The public types as they are emitted, against those checked in: a change of them is seen in review. */

import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, expect, test } from 'vitest'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
let emitted = ''

beforeAll(() => {
  emitted = mkdtempSync(join(tmpdir(), 'loopctl-api-'))
  const options = ['--emitDeclarationOnly', '--declarationMap', 'false', '--removeComments', '--outDir', emitted]
  execFileSync(join(ROOT, 'node_modules/.bin/tsc'), ['-p', join(ROOT, 'tsconfig.build.json'), ...options])
})

afterAll(() => {
  rmSync(emitted, { recursive: true, force: true })
})

/** The declarations of a file and of all that it names, each once, in the order in which they are named. */
function collect(file: string, seen = new Set<string>()): string {
  if (seen.has(file)) return ''
  seen.add(file)
  const text = readFileSync(file, 'utf8')
  const named = [...text.matchAll(/(?:from|import\()\s*['"](\.[^'"]+)\.ts['"]/g)].map(([, name = '']) =>
    join(dirname(file), `${name}.d.ts`),
  )
  return [`// ${relative(emitted, file)}\n${text}`, ...named.map((name) => collect(name, seen))]
    .filter(Boolean)
    .join('\n')
}

// npx vitest run test/unit/api -u writes them anew.
test.for(['index', 'ioctl'])('the types of %s are those of test/api', async (entry) => {
  await expect(collect(join(emitted, `${entry}.d.ts`))).toMatchFileSnapshot(`../api/${entry}.txt`)
})
