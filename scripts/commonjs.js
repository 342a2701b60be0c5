/**
 * For programs in CommonJS: dist/*.cjs, which load the ES modules, and their types, dist/*.d.cts. There is one copy of the
 * library however it is loaded, and one of each type, so that an error is an instance of LoopError everywhere.
 */

import { writeFileSync } from 'node:fs'

const entries = ['index', 'ioctl']

for (const name of entries) {
  const module = await import(new URL(`../dist/${name}.js`, import.meta.url).href)
  write(`${name}.cjs`, `'use strict'\nmodule.exports = require('./${name}.js')\n`)
  write(`${name}.d.cts`, declare(name, module))
}

/**
 * @param {string} name
 * @param {Record<string, unknown>} module
 */
function declare(name, module) {
  const mode = "with { 'resolution-mode': 'import' }"
  const lines = [`import type * as esm from './${name}.js' ${mode}`, `export type * from './${name}.js' ${mode}`]
  for (const [member, value] of Object.entries(module)) {
    lines.push(`export declare const ${member}: typeof esm.${member}`)
    if (typeof value === 'function' && /^class\b/.test(String(value))) {
      lines.push(`export type ${member} = esm.${member}`)
    }
  }
  return `${lines.join('\n')}\n`
}

/**
 * @param {string} file
 * @param {string} text
 */
function write(file, text) {
  writeFileSync(new URL(`../dist/${file}`, import.meta.url), text)
}
