/**
 * Says what the tests need and this machine has not, and installs it: with apt-get, where that is Debian or Ubuntu and
 * this is root. Elsewhere it names the packages, and ends with 1. scripts/tools.js has the table of them.
 */

import { spawnSync } from 'node:child_process'
import { parseArgs } from 'node:util'
import { DISTRIBUTIONS, missingTools, packageOf, PURPOSES, thisDistribution } from './tools.js'

/** @typedef {import('./tools.js').Tool} Tool */
/** @typedef {import('./tools.js').Purpose} Purpose */

const DEBIAN = DISTRIBUTIONS.findIndex(({ ids }) => ids.includes('debian'))

const USAGE = `usage: npm run setup -- [--for PURPOSE,...] [--check]
  --for    what the tools are for [build,devices,tests]:
${Object.entries(PURPOSES)
  .map(([name, text]) => `           ${name.padEnd(13)} ${text}`)
  .join('\n')}
  --check  installs nothing: what is missing is named, and makes the exit status 1`

/** @returns {{ purposes: Purpose[], check: boolean } | undefined} */
function readArguments() {
  try {
    const { values } = parseArgs({
      options: { for: { type: 'string', default: 'build,devices,tests' }, check: { type: 'boolean', default: false } },
    })
    const purposes = values.for.split(',')
    const unknown = purposes.find((purpose) => !Object.hasOwn(PURPOSES, purpose))
    if (unknown !== undefined) throw new Error(`there is no purpose ${unknown}`)
    return { purposes: /** @type {Purpose[]} */ (purposes), check: values.check }
  } catch (error) {
    console.error(`setup: ${/** @type {Error} */ (error).message}\n${USAGE}`)
    return undefined
  }
}

/** Every missing tool with its package in each distribution. @param {readonly Tool[]} tools */
function tableOf(tools) {
  const header = ['', ...DISTRIBUTIONS.map(({ name }) => name)]
  const rows = tools.map((tool) => [tool, ...DISTRIBUTIONS.map((_, index) => packageOf(tool, index) ?? '-')])
  const widths = header.map((_, column) => Math.max(...[header, ...rows].map((row) => row[column]?.length ?? 0)))
  const lines = [header, ...rows].map((row) => row.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join('  '))
  return lines.map((line) => line.trimEnd()).join('\n')
}

/** @param {readonly Tool[]} tools @param {number} distribution */
function packagesOf(tools, distribution) {
  return [...new Set(tools.flatMap((tool) => packageOf(tool, distribution) ?? []))]
}

/** With the lists of packages as the mirror has them now; whether it worked. @param {readonly string[]} packages */
function installByApt(packages) {
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' }
  for (const words of [
    ['update', '-qq'],
    ['install', '-qq', '--yes', '--no-install-recommends', '--no-remove', ...packages],
  ]) {
    console.log(`setup: apt-get ${words.join(' ')}`)
    // What dpkg says of each package is told only where something failed.
    const { status, error, stdout, stderr } = spawnSync('apt-get', words, { env, encoding: 'utf8' })
    if (status === 0) continue
    console.error(error?.message ?? `${stdout}${stderr}apt-get ended with ${status}`)
    return false
  }
  return true
}

/** Tells root which packages to install. @param {readonly Tool[]} missing @returns whether nothing is left to be done */
function advise(missing) {
  console.error(`${tableOf(missing)}\n`)
  const distribution = thisDistribution()
  if (distribution === undefined) {
    console.error('setup: this distribution is none of these: install what has these programs, and run this again.')
    return false
  }
  const packages = packagesOf(missing, distribution)
  if (packages.length === 0) {
    console.error('setup: this distribution has no package of them; the tests that need them are skipped.')
    return true
  }
  console.error(`setup: as root: ${DISTRIBUTIONS[distribution]?.install} ${packages.join(' ')}`)
  return false
}

/** @param {readonly Purpose[]} purposes @param {boolean} check @returns whether all is there that can be had */
function setUp(purposes, check) {
  const missing = missingTools(purposes)
  if (missing.length === 0) {
    console.log(`setup: nothing is missing for ${purposes.join(', ')}.`)
    return true
  }
  console.error(`setup: missing for ${purposes.join(', ')}: ${missing.join(', ')}`)
  if (check || thisDistribution() !== DEBIAN || process.getuid?.() !== 0) return advise(missing)
  if (!installByApt(packagesOf(missing, DEBIAN))) return false
  const still = missingTools(purposes)
  if (still.length > 0) console.error(`setup: still missing: ${still.join(', ')}`)
  else console.log('setup: all is there.')
  return still.length === 0
}

const given = readArguments()
if (given === undefined) process.exitCode = 2
else if (!setUp(given.purposes, given.check)) process.exitCode = 1
