/** The hints of the library, in the words of the command. */

import { readdirSync, readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { overlapError } from '../../lib/attach/overlap.ts'
import { translateArgument, translateHint, translateMember } from '../../lib/cli/hints.ts'

/** What only the API has: `readOnly`, `lazy: true`, `attach()`. */
const API = /\b[a-z]+[A-Z]\w*|\w: (?:true|false|'[a-z])|\b[a-z]\w*\(\)/

/** Texts of that form which are no hints, or which name what is not loopctl's. */
const OTHERS = [
  'was garbage collected without close()',
  'cannot be had with offset, sizeLimit or partscan',
  'Kubernetes: securityContext.capabilities.add',
  'must not contain',
  '${path.replaceAll(',
]

/** The sentences in the sources of the library. */
function* sentences(): Generator<string> {
  const files = readdirSync('lib', { recursive: true, encoding: 'utf8' })
  for (const file of files.filter((name) => name.endsWith('.ts') && !name.startsWith('cli/'))) {
    const source = readFileSync(`lib/${file}`, 'utf8').replaceAll(/\/\*[^]*?\*\/|^\s*\/\/.*$/gm, '')
    for (const [, , text = ''] of source.matchAll(/(['"`])((?:(?!\1)[^\\\n]|\\.)*)\1/g)) {
      if (text.includes(' ')) yield text
    }
  }
}

test('no sentence of the library keeps the words of the API', () => {
  const translated = [...sentences()].map((text) => translateHint(text))
  expect(translated.length).toBeGreaterThan(300)
  const left = translated.filter(
    (text) => API.test(text.replaceAll(/\$\{[^}]*\}/g, '')) && !OTHERS.some((other) => text.includes(other)),
  )
  expect(left).toEqual([])
})

test.each([
  ["allow it with overlap: 'allow'", 'allow it with --overlap allow'],
  ["attach with directIO: 'prefer'", 'attach with --direct-io=prefer'],
  ['attach with partition: 3', 'attach with --partition 3'],
  ['mount with makeTarget: true', 'mount with --make-dir'],
  ['createNode: false', '--no-create-node'],
  ['setStatus({ partscan: true })', '`loopctl set --partscan DEVICE`'],
  ['raise the timeout, or attach fewer', 'raise --timeout, or attach fewer'],
  ['look at /data/note: true story.img', 'look at /data/note: true story.img'],
])('%s', (hint, expected) => {
  expect(translateHint(hint)).toBe(expected)
})

test('a hint names the ways out that the command has', () => {
  const file = { path: 'disk.img', device: 1n, inode: 2n, rdevice: undefined, opened: true, fd: 3 }
  const other = { number: 7, offset: 0n, sizeLimit: 0n, start: 0n, end: 1n, readOnly: false }
  const hint = overlapError('LOOP_CONFIGURE', 'disk.img', file, other as Parameters<typeof overlapError>[3]).hint ?? ''
  for (const command of ['attach', 'run', 'mount', undefined]) {
    const text = translateHint(hint, command)
    expect(text).toContain('--overlap reuse')
    expect(text).toContain('--overlap allow')
  }
  for (const command of ['set', 'change', 'migrate']) {
    const text = translateHint(hint, command)
    expect(text).not.toContain('reuse')
    expect(text).toContain('--overlap allow')
  }
})

test('a wrong value is named as the option is', () => {
  expect(translateArgument('blockSize must be a power of two')).toBe('--block-size must be a power of two')
  expect(translateArgument('swappable needs readOnly: true')).toBe('--swappable needs --read-only')
  expect(translateArgument('partition cannot be had with offset, sizeLimit or partscan')).toBe(
    '--partition cannot be had with offset, --size-limit or partscan',
  )
  expect(translateArgument('file must not be empty')).toBe('file must not be empty')
})

test('hints and remedies alone are translated in JSON', () => {
  expect(translateMember('hint', 'force: true', 'change')).toBe('--force')
  expect(translateMember('remedy', 'force: true')).toBe('--force')
  expect(translateMember('path', 'force: true')).toBe('force: true')
})
