/** Nothing is published that does not say where it is from. */

import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))

function check(addresses: object): { status: number | null; stderr: string } {
  const folder = mkdtempSync(join(tmpdir(), 'loopctl-publish-'))
  try {
    const file = join(folder, 'package.json')
    writeFileSync(file, JSON.stringify({ name: 'loopctl', ...addresses }))
    const { status, stderr } = spawnSync(process.execPath, ['scripts/check-publish.js', file], {
      cwd: ROOT,
      encoding: 'utf8',
    })
    return { status, stderr }
  } finally {
    rmSync(folder, { recursive: true })
  }
}

const WHOLE = {
  repository: { type: 'git', url: 'git+https://example.org/someone/loopctl.git' },
  homepage: 'https://example.org/someone/loopctl#readme',
  bugs: { url: 'https://example.org/someone/loopctl/issues' },
}

test('with all addresses it may be published', () => {
  expect(check(WHOLE)).toEqual({ status: 0, stderr: '' })
})

test.for([
  ['repository.url', { ...WHOLE, repository: undefined }],
  ['homepage', { ...WHOLE, homepage: 'TODO' }],
  ['bugs.url', { ...WHOLE, bugs: {} }],
] as const)('without %s it is refused', ([name, addresses]) => {
  const { status, stderr } = check(addresses)
  expect(status).toBe(1)
  expect(stderr).toContain(`has no address in ${name}:`)
})

test('npm asks before it publishes, and the release workflow asks itself', () => {
  const { scripts } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as {
    scripts: Record<string, string>
  }
  expect(scripts['prepublishOnly']).toContain('scripts/check-publish.js')
  expect(readFileSync(join(ROOT, '.github/workflows/release.yml'), 'utf8')).toContain('scripts/check-publish.js')
})
