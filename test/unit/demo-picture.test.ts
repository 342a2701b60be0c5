/** docs/demo.svg against scripts/demo.js: after a change of the demo, npm run demo:picture draws it anew. */

import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'

const read = (file: string) => readFileSync(new URL(`../../${file}`, import.meta.url), 'utf8')

/** The lines of the picture, without their indentation. */
const shown = [...read('docs/demo.svg').matchAll(/<text [^>]*>([^<]*)<\/text>/g)].map(([, text = '']) =>
  text.replaceAll('&lt;', '<').replaceAll('&gt;', '>').replaceAll('&amp;', '&'),
)

/** The title and the code of each step of the demo. */
const [, ...parts] = read('scripts/demo.js').split(/^ {2}await step\('(.*)'\)$/m)
const steps = parts.flatMap((title, i) => (i % 2 === 0 ? [{ title, code: parts[i + 1] ?? '' }] : []))

test('the picture of the demo has the titles and the code of its first steps', () => {
  const titles = shown.filter((text) => /^\d+\. /.test(text))
  expect(titles.length).toBeGreaterThan(2)
  expect(titles).toEqual(steps.slice(0, titles.length).map(({ title }, i) => `${i + 1}. ${title}`))
  const code = steps.slice(0, titles.length).flatMap((step) => step.code.split('\n').map((line) => line.trim()))
  expect(shown).toEqual(expect.arrayContaining(code.filter((line) => line !== '')))
})
