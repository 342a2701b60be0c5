/** The sentences of the library, in the words of the command. */

import { readdirSync, readFileSync } from 'node:fs'
import { parseAst } from 'rolldown/parseAst'
import { describe, expect, test } from 'vitest'
import { overlapError } from '../../lib/attach/overlap.ts'
import { translate, translateArgument, translateHint, translateMember } from '../../lib/cli/words.ts'

/** Options of the API that are no words of English, where they are not the command's. */
const NAMES = /(?<!--|-)\b(?:autoclear|partscan|swappable)\b/
/** What only the API has: `readOnly`, `lazy: true`, `attach()`, `'auto'`, `device.migrate`, a handle. */
const API = new RegExp(
  [
    String.raw`\b[a-z]+[A-Z]\w*`,
    String.raw`\w: (?:true|false|'[a-z])`,
    String.raw`\b[a-z]\w*\(\)`,
    "'[a-z]+'",
    String.raw`\b(?:control|device|file|loopctl|mount|options|partition)\.[a-z]`,
    String.raw`\b(?:a|the|this|another) (?:handle|option)\b`,
    NAMES.source,
  ].join('|'),
)

/** Sentences of that form which no command says, or which name what is not loopctl's; each with the reason. */
const OTHERS = new Map([
  ['was garbage collected without close()', 'a warning of the process; the command closes what it opens'],
  ['use `await using`, or close it', 'its hint'],
  ['tell the bundler external:', 'the command is not bundled'],
  ['keep it out of the bundle with external:', 'the command is not bundled'],
  ['Kubernetes: securityContext.capabilities.add', 'words of Kubernetes'],
  ['the attach ended without a handle', 'a fault of the library itself'],
  ['there is no handle yet', 'a fault of the library itself'],
])

interface Node {
  type: string
  start: number
  end: number
  [member: string]: unknown
}

const isNode = (value: unknown): value is Node =>
  typeof value === 'object' && value !== null && 'type' in value && typeof value.type === 'string'

function* nodesOf(value: unknown): Generator<Node> {
  if (Array.isArray(value)) for (const one of value) yield* nodesOf(one)
  else if (isNode(value)) {
    yield value
    for (const member of Object.values(value)) yield* nodesOf(member)
  }
}

/** The text of a literal or of a template, in which `…` is what is put in. */
function textOf(value: unknown): string | undefined {
  if (!isNode(value)) return undefined
  if (value.type === 'Literal') return typeof value['value'] === 'string' ? value['value'] : undefined
  if (value.type !== 'TemplateLiteral') return undefined
  const pieces = value['quasis'] as { value: { cooked: string } }[]
  return pieces.map((piece) => piece.value.cooked).join('…')
}

/** The nodes of the sources of the library, without the command. */
const nodes = readdirSync('lib', { recursive: true, encoding: 'utf8' })
  .filter((name) => name.endsWith('.ts') && !name.startsWith('cli/'))
  .flatMap((name) => [...nodesOf(parseAst(readFileSync(`lib/${name}`, 'utf8'), { lang: 'ts' }).body)])

/** The calls of one of the functions, whose name is given, with their arguments. */
function callsOf(callee: RegExp): Node[][] {
  return nodes.flatMap((node) => {
    if (node.type !== 'CallExpression' || !isNode(node['callee'])) return []
    const { type, name } = node['callee']
    return type === 'Identifier' && callee.test(String(name)) ? [node['arguments'] as Node[]] : []
  })
}

/** What is wrong with a value is half a sentence: its subject is the name of the value. */
const wrongs = callsOf(/^(?:wrongType|wrongValue|outOfRange)$/)
const wrong = wrongs.flatMap(([name, problem]) => {
  const text = textOf(problem)
  return text === undefined ? [] : [`${textOf(name) ?? 'value'} ${text}`]
})

/** Every other text with a space is one: what an error, a warning or a check of doctor says, or a part of it. */
const sentences = nodes.flatMap((node) => {
  const text = textOf(node)
  if (wrongs.some((given) => given.includes(node))) return []
  // The tables of partition types have lines.
  return text?.includes(' ') && !text.includes('\n') ? [text] : []
})

const isOther = (text: string) => [...OTHERS.keys()].some((other) => text.includes(other))

test('no sentence of the library keeps the words of the API', () => {
  expect(sentences.length).toBeGreaterThan(700)
  const left = sentences.map((text) => translateHint(text)).filter((text) => API.test(text) && !isOther(text))
  expect(left).toEqual([])
})

test('the test sees the words of the API, in a new sentence too', () => {
  const sentence = 'the device can be had with noSuchOption, or is opened with frobnicate: true'
  expect(API.test(translateHint(sentence))).toBe(true)
  for (const text of ["must not be 'late'", 'call release() first', 'device.migrate failed', 'needs swappable']) {
    expect(API.test(translate(text)), text).toBe(true)
  }
  for (const other of OTHERS.keys()) expect(sentences.join('\n')).toContain(other)
})

test('no wrong value is named as the API names it', () => {
  expect(wrong.length).toBeGreaterThan(40)
  const left = wrong.map(translateArgument).filter((text) => API.test(text) && !isOther(text))
  // Of arguments that no command gives
  expect(left.filter((text) => !/^(?:device\.backing|mountPoint) /.test(text))).toEqual([])
})

test('what errors call the failed call is a system call, an ioctl, or what a command is', () => {
  const calls = [
    ...callsOf(/^refusal$/).map(([, call]) => textOf(call)),
    ...nodes.flatMap((node) => {
      const { type, key } = node
      return type === 'Property' && isNode(key) && /^(?:call|syscall|ioctl)$/.test(String(key['name']))
        ? [textOf(node['value'])]
        : []
    }),
  ].filter((call) => call !== undefined)
  expect(calls.length).toBeGreaterThan(100)
  expect(calls.filter((call) => !/^(?:[a-z0-9_]+|[A-Z0-9_ ]+)$/.test(call))).toEqual([])
})

test.each([
  ["allow it with overlap: 'allow'", 'allow it with --overlap allow'],
  ["attach with directIO: 'prefer'", 'attach with --direct-io=prefer'],
  ['attach with partition: 3', 'attach with --partition 3'],
  ['mount with makeTarget: true', 'mount with --make-dir'],
  ['createNode: false', '--no-create-node'],
  ['setStatus({ partscan: true })', '`loopctl set --partscan DEVICE`'],
  ['raise the timeout, or attach fewer', 'raise --timeout, or attach fewer'],
  ["attach with a block size of 4096, or 'auto'", 'attach with --block-size 4096, or --block-size auto'],
  [
    'close descriptor 9 of process 77, which is this one; or wait',
    'close descriptor 9 in the shell that runs loopctl; or wait',
  ],
  ['look at /data/note: true story.img', 'look at /data/note: true story.img'],
])('%s', (hint, expected) => {
  expect(translateHint(hint)).toBe(expected)
})

describe('what is no word of the library stays as it is', () => {
  test('a path, though it looks like an option', () => {
    const path = '/data/force: true $& (1).img'
    expect(translate(`ENOENT: stat ${path}: attach with readOnly: true`, [path, undefined])).toBe(
      `ENOENT: stat ${path}: attach with --read-only`,
    )
    expect(translateHint(`unmount ${path} first, or force: true`, 'change', [path])).toBe(
      `unmount ${path} first, or --force`,
    )
  })

  test('what is in double quotes', () => {
    expect(translate(String.raw`there is no partition with the label "lazy: true \"readOnly\"": readOnly: true`)).toBe(
      String.raw`there is no partition with the label "lazy: true \"readOnly\"": --read-only`,
    )
  })
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

test.each([
  ['blockSize must be a power of two', '--block-size must be a power of two'],
  ['swappable needs readOnly: true', '--swappable needs --read-only'],
  [
    'partition cannot be had with offset, sizeLimit or partscan',
    '--partition cannot be had with --offset, --size-limit or --partscan',
  ],
  ["overlap cannot be 'reuse' with swappable", '--overlap cannot be reuse with --swappable'],
  ['timeout must be a whole number', '--timeout must be a whole number'],
  ['partition.uuid must be a UUID, not "xx"', 'UUID= must be a UUID, not "xx"'],
  ['file must not be empty', 'the path of the file must not be empty'],
])('a wrong value is named as the option is: %s', (message, expected) => {
  expect(translateArgument(message)).toBe(expected)
})

test('sentences alone are translated in JSON', () => {
  expect(translateMember('hint', 'force: true', 'change')).toBe('--force')
  expect(translateMember('remedy', 'force: true')).toBe('--force')
  expect(translateMember('message', 'force: true')).toBe('--force')
  expect(translateMember('path', 'force: true')).toBe('force: true')
  expect(translateMember('size', 3)).toBe(3)
})
