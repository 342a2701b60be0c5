/** Tables of a terminal. */

import { expect, test } from 'vitest'
import { table } from '../../lib/cli/text.ts'

test('columns are aligned by what a terminal draws, not by the length of the text', () => {
  // Two columns each; a letter with an accent of its own; a joiner, which is not drawn
  const rows = ['日本', 'ab', 'e\u0301', 'カ', '한글', '💾', 'x\u200D'].map((label) => [label, '|', '1'])
  expect(table([{ title: 'LABEL' }, { title: 'E' }, { title: 'N', right: true }], rows)).toBe(
    `LABEL  E  N
日本   |  1
ab     |  1
e\u0301      |  1
カ     |  1
한글   |  1
💾     |  1
x\u200D      |  1
`,
  )
})
