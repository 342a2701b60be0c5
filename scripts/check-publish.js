/**
 * What has to be in a package.json before it is published; the release workflow adds it, since only there it is known where
 * the package is built. Of another file than this checkout's: node scripts/check-publish.js FILE
 */

import { readFileSync } from 'node:fs'

const file = process.argv[2] ?? new URL('../package.json', import.meta.url)
const { repository, homepage, bugs } = JSON.parse(readFileSync(file, 'utf8'))

const addresses = { 'repository.url': repository?.url, homepage, 'bugs.url': bugs?.url }
const missing = Object.entries(addresses)
  .filter(([, address]) => !/^(?:git\+)?https:\/\/[^/]+\.[^/]+\/./.test(address ?? ''))
  .map(([name]) => name)

if (missing.length > 0) {
  console.error(`package.json has no address in ${missing.join(', ')}: publish with the release workflow, or set them`)
  process.exitCode = 1
}
