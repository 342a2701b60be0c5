/** What `npm run docs` makes of the sources, as far as that can be seen without making it. */

import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import { linkReasons } from '../../scripts/typedoc-plugin.js'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const { projectDocuments: groups } = JSON.parse(readFileSync(join(ROOT, 'typedoc.json'), 'utf8')) as {
  projectDocuments: string[]
}

/** The pages that stand below a group, as its head lists them. */
function childrenOf(group: string): string[] {
  const head = /^---\n([^]*?)\n---\n/.exec(readFileSync(join(ROOT, group), 'utf8'))?.[1] ?? ''
  return [...head.matchAll(/^ {2}- (.+)$/gm)].map(([, path = '']) => join(dirname(group), path))
}

describe('the pages', () => {
  test('are guides or reference, each once', () => {
    const pages = readdirSync(join(ROOT, 'docs')).filter((name) => name.endsWith('.md') && name !== 'README.md')
    expect(groups.flatMap(childrenOf).toSorted()).toEqual(pages.map((name) => `docs/${name}`).toSorted())
  })

  test.for(groups)('%s links to each that it has', (group) => {
    const links = [...readFileSync(join(ROOT, group), 'utf8').matchAll(/\]\(([^)]+)\)/g)].map(([, path = '']) =>
      join(dirname(group), path),
    )
    expect(links.toSorted()).toEqual(childrenOf(group).toSorted())
    for (const link of links) expect(existsSync(join(ROOT, link)), link).toBe(true)
  })
})

/** As typedoc writes a paragraph of `@throws`. */
function throws(text: string): string {
  return `<h4 class="tsd-anchor-link" id="throws-1">Throws</h4><p>${text}</p>`
}

function item(reason: string, more = ''): string {
  return `<li><a href="../e.html#${reason}"><code>${reason}</code></a>${more}</li>`
}

/** As typedoc writes one member of a union of strings. */
function member(text: string): string {
  return `<span class="tsd-signature-type">&quot;${text}&quot;</span>`
}

describe('errors', () => {
  test('are a list, with a link to what each reason means', () => {
    const text = 'LoopError <code>in-use</code>, <code>io</code> (of <code>x</code>), and\n<code>closed</code>'
    const list = item('in-use') + item('io', ' (of <code>x</code>)') + item('closed')
    expect(linkReasons(throws(text), '../e.html')).toContain(`</h4><p>LoopError</p><ul>${list}</ul>`)
  })

  test('that name no reason stay as they are', () => {
    const text = 'LoopError the errors of <code>attach</code>'
    expect(linkReasons(throws(text), 'e.html')).toBe(throws(text))
  })

  test('the type of the reasons links to each', () => {
    const linked = `<a href="e.html#overlap">${member('overlap')}</a>`
    expect(linkReasons(member('overlap') + member('EBUSY'), 'e.html')).toBe(linked + member('EBUSY'))
  })

  test('every reason has a row to link to', () => {
    const source = readFileSync(join(ROOT, 'lib/errors/errors.ts'), 'utf8')
    const type = /export type LoopErrorReason =\n([^]*?)\n\n/.exec(source)?.[1] ?? ''
    const reasons = [...type.matchAll(/'([a-z-]+)'/g)].map(([, reason = '']) => reason)
    expect(reasons.length).toBeGreaterThan(30)
    const rows = readFileSync(join(ROOT, 'docs/errors.md'), 'utf8')
    for (const reason of reasons) expect(rows).toContain(`| \`${reason}\` `)
  })
})
