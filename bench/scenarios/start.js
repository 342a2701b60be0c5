/** What has to be waited for before anything is done. */

import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { time } from '../measure.js'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const IMPORT = `
  const start = performance.now()
  await import('loopctl')
  console.log((performance.now() - start) * 1e6)`

/** @param {string[]} words */
function node(...words) {
  return execFileSync(process.execPath, words, { cwd: ROOT, encoding: 'utf8' })
}

/** @param {import('../run.js').Bench} bench */
export async function start({ turns }) {
  await turns("import 'loopctl'", { loopctl: () => [Number(node('--input-type=module', '--eval', IMPORT))] }, [
    { of: 'loopctl', atMost: 15e6 },
  ])
  await turns(
    'start of the command',
    {
      'node -e 0': () => time(2, () => node('-e', '0')),
      'loopctl list': () => time(2, () => node('dist/cli/main.js', 'list')),
      'losetup --list': () => time(2, () => execFileSync('losetup', ['--list'])),
    },
    [
      { of: 'loopctl list', to: 'node -e 0', atMost: 1.5 },
      { of: 'loopctl list', to: 'losetup --list' },
    ],
  )
}
