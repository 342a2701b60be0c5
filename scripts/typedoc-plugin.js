/** For `npm run docs`: pages are called by their headings, and errors are lists that link to what each reason means. */

import { readFileSync } from 'node:fs'
import { posix } from 'node:path'

const ERRORS = 'Errors'

/** The reasons that the page about errors has a row for. */
const reasons = new Set(
  [...readFileSync(new URL('../docs/errors.md', import.meta.url), 'utf8').matchAll(/^\| `([a-z-]+)` /gm)].map(
    ([, reason]) => reason,
  ),
)

/**
 * @typedef {{ kind: string, text: string }} Part
 * @typedef {{ name: string, content: Part[] }} Document
 */

/** @param {any} app */
export function load(app) {
  app.converter.on('resolveBegin', (/** @type {any} */ { project }) => {
    // The page of the project has a heading already.
    const [first] = project.readme ?? []
    if (first !== undefined) first.text = first.text.replace(HEADING, '')
    for (const document of documentsOf(project)) document.name = headingOf(document.content) ?? document.name
  })
  app.renderer.on('endPage', (/** @type {any} */ page) => {
    const errors = documentsOf(page.project).find(({ name }) => name === ERRORS)
    if (errors === undefined) throw new Error(`there is no page ${ERRORS}`)
    const address = posix.relative(posix.dirname(page.url), app.renderer.router.getFullUrl(errors))
    page.contents = page.model === errors ? markReasons(page.contents) : linkReasons(page.contents, address)
  })
}

/**
 * @param {any} project
 * @returns {Document[]}
 */
function documentsOf(project) {
  return Object.values(project.reflections).filter((reflection) => Array.isArray(reflection.content))
}

const HEADING = /^\s*# (.+)\n/

/**
 * @param {Part[]} parts
 * @returns {string | undefined}
 */
function headingOf([first]) {
  return HEADING.exec(first?.text ?? '')?.[1]
}

/** @param {string} html */
function markReasons(html) {
  return html.replaceAll(/<td><code>([a-z-]+)<\/code><\/td>/g, (cell, reason) =>
    reasons.has(reason) ? cell.replace('<td>', `<td id="${reason}">`) : cell,
  )
}

/**
 * @param {string} html
 * @param {string} address of the page that explains the reasons
 */
export function linkReasons(html, address) {
  return html
    .replaceAll(
      /(id="throws(?:-\d+)?">[^]*?<\/h4>)<p>([^]*?)<\/p>/g,
      (_, heading, text) => heading + list(text, address),
    )
    .replaceAll(/<span class="tsd-signature-type">&quot;([a-z-]+)&quot;<\/span>/g, (type, reason) =>
      reasons.has(reason) ? `<a href="${address}#${reason}">${type}</a>` : type,
    )
}

/**
 * @param {string} text
 * @param {string} address
 */
function list(text, address) {
  const [before = '', ...rest] = text.replaceAll('\n', ' ').split(/<code>([a-z-]+)<\/code>/)
  let intro = before
  /** @type {string[]} */
  const items = []
  for (let i = 0; i < rest.length; i += 2) {
    const [word = '', after = ''] = [rest[i], rest[i + 1]]
    const code = `<code>${word}</code>`
    if (reasons.has(word)) items.push(`<a href="${address}#${word}">${code}</a>${after}`)
    else if (items.length === 0) intro += code + after
    else items[items.length - 1] += code + after
  }
  if (items.length === 0) return `<p>${text}</p>`
  const trimmed = items.map((item) => `<li>${item.replace(/(?:[,;] ?(?:and|or)?|,? (?:and|or))? *$/, '')}</li>`)
  return `<p>${intro.trim()}</p><ul>${trimmed.join('')}</ul>`
}
