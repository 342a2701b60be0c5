/**
 * The tests on real devices under each kernel that loopctl is tested with, in guests of user-mode Linux
 * (scripts/uml/run), two at a time; ends with a table. scripts/uml/README.md says what to know of it.
 */

import { spawn, spawnSync } from 'node:child_process'
import { mkdirSync, openSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { printResults, readResults, toMarkdown } from './table.js'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
const RUN = join(ROOT, 'scripts/uml/run')

/** All that has tests on real devices and needs no other machine. */
const FOLDERS = ['attach', 'container', 'faults', 'hang', 'hostile', 'images', 'kernel', 'model', 'mount', 'stress']

/**
 * What is left out without --long, and why, by class of guest: a guest of class `whole` runs all of it. Files, or tests by
 * their names.
 *
 * @typedef {'whole' | 'slow' | 'part'} Class
 * @type {{ classes: Class[], why: string, files?: string[], tests?: string[] }[]}
 */
const LEFT_OUT = [
  {
    classes: ['slow'],
    why: 'the command, the documentation and the examples: a Node or more for each test, above functions that are tested here',
    files: [
      'kernel/bench',
      'kernel/cli',
      'kernel/cli-colours',
      'kernel/cli-completion',
      'kernel/cli-list',
      'kernel/cli-migrate',
      'kernel/cli-partitions',
      'kernel/cli-voice',
      'kernel/cli-watch',
      'kernel/demo',
      'kernel/docs',
      'kernel/examples',
      'mount/cli',
    ],
  },
  {
    classes: ['slow'],
    why: 'every environment with every function, and containers, each with several processes',
    files: ['kernel/unprivileged', 'container'],
  },
  {
    classes: ['slow'],
    why: 'the same again at every call: a process is killed, or a call given up',
    files: ['hostile/killed', 'kernel/undo', 'stress/migrate-killed'],
  },
  {
    classes: ['slow'],
    why: 'servers that do not answer: what the tests wait for is time, not the kernel',
    files: ['hang', 'kernel/migrate-silent'],
  },
  {
    classes: ['slow'],
    why: 'copies of whole files, which are made with the calls of any program; changes of the file are tested without them',
    files: ['kernel/migrate'],
  },
  { classes: ['slow'], why: 'many rounds of what is tested once as well', tests: ['2000 rounds', 'for every k'] },
]

/**
 * The guests, the longest first. `ptrace`, how kernels of before 6.16 hold their processes, makes a process three to six
 * times as dear as on the machine.
 *
 * @typedef {{
 *   kernel: string
 *   name: string
 *   class: Class
 *   udev?: true
 *   disk: string
 *   only?: string[]
 * }} Guest
 * @type {Guest[]}
 */
const GUESTS = [
  { kernel: '7.3', name: '7.3', class: 'whole', disk: '3G' },
  { kernel: '6.1', name: '6.1', class: 'slow', disk: '3G' },
  { kernel: '5.10', name: '5.10', class: 'slow', disk: '3G' },
  { kernel: '6.12', name: '6.12', class: 'slow', disk: '3G,4096' },
  { kernel: '7.2', name: '7.2', class: 'slow', disk: '3G' },
  {
    kernel: '7.3',
    name: '7.3-udev',
    class: 'part',
    disk: '3G,4096',
    udev: true,
    only: ['attach', 'mount', 'hang/udev', 'kernel/partscan', 'kernel/partitions', 'kernel/detach'],
  },
  {
    kernel: '6.1',
    name: '6.1-udev',
    class: 'part',
    disk: '3G',
    udev: true,
    only: ['mount/lock', 'hang/udev', 'kernel/partscan', 'kernel/detach'],
  },
  {
    kernel: '7.3-builtin',
    name: '7.3-builtin',
    class: 'part',
    disk: '3G',
    only: ['attach', 'kernel/attach', 'kernel/doctor', 'kernel/ioctl', 'kernel/none-free', 'kernel/detach'],
  },
  {
    kernel: '7.3-nowrite',
    name: '7.3-nowrite',
    class: 'part',
    disk: '3G',
    only: ['mount', 'kernel/change', 'kernel/swappable', 'kernel/kernel-bugs', 'kernel/examples'],
  },
]

const USAGE = `usage: scripts/kernels [--long] [--at-once N] [--only TEXT,...] [--write-docs] [GUEST...]
  GUEST         ${GUESTS.map(({ name }) => name).join(' ')} [all of them]
  --long        everything in every guest, at full length: hours
  --at-once N   guests that run at the same time [2]
  --only        files of tests whose names contain one of these
  --write-docs  the table goes into docs/kernels.md
Exit status: 0 where every guest ran every file that it was to run, and no test failed.`

/** Every file of tests that runs under other kernels, as vitest names it. */
function allFiles() {
  return FOLDERS.flatMap((folder) =>
    readdirSync(join(ROOT, 'test', folder))
      .filter((name) => name.endsWith('.test.ts'))
      .map((name) => `test/${folder}/${name}`),
  )
}

/** Whether a file is meant by `kernel`, `kernel/watch` or `kernel/watch.test.ts`. @param {string} file @param {string} word */
function isMeant(file, word) {
  return file === `test/${word}` || file === `test/${word}.test.ts` || file.startsWith(`test/${word}/`)
}

/** @param {Guest} guest @param {{ long: boolean, only: string[] }} options */
function filesOf(guest, { long, only }) {
  const left = long
    ? []
    : LEFT_OUT.filter(({ classes }) => classes.includes(guest.class)).flatMap(({ files = [] }) => files)
  return allFiles()
    .filter((file) => guest.only === undefined || guest.only.some((word) => isMeant(file, word)))
    .filter((file) => only.length === 0 || only.some((word) => file.includes(word)))
    .filter((file) => !left.some((word) => isMeant(file, word)))
}

/** What vitest is told to leave out. @param {Guest} guest @param {boolean} long */
function patternOf(guest, long) {
  if (long) return []
  const tests = LEFT_OUT.filter(({ classes }) => classes.includes(guest.class)).flatMap((one) => one.tests ?? [])
  return tests.length === 0 ? [] : [`--testNamePattern=^(?!.*(${tests.join('|')}))`]
}

/** How long, and how much. @param {Guest} guest @param {boolean} long */
function settingsOf(guest, long) {
  if (long) return { LOOPCTL_STRESS: '1', LOOPCTL_FAULTS: '1' }
  // A test under udev is one of many rounds, and there are few of them
  if (guest.udev) return { LOOPCTL_STRESS: '1', LOOPCTL_FAULTS: '60' }
  return guest.class === 'whole'
    ? { LOOPCTL_STRESS: '0.05', LOOPCTL_FAULTS: '10' }
    : { LOOPCTL_STRESS: '0.02', LOOPCTL_FAULTS: '60' }
}

/** A file that mocks a module wants the modules for itself; the others share them, which saves a process for each. @param {string} file */
function isMocking(file) {
  return readFileSync(join(ROOT, file), 'utf8').includes('vi.mock(')
}

/** @param {Guest} guest @param {string[]} files @param {boolean} mocks @param {boolean} long */
function commandOf(guest, files, mocks, long) {
  const some = files.filter((file) => isMocking(file) === mocks)
  if (some.length === 0) return ':'
  const words = ['node', 'node_modules/vitest/vitest.mjs', 'run', mocks ? '--isolate' : '--no-isolate']
  words.push('--reporter=verbose', '--reporter=./scripts/guests/reporter.js', ...patternOf(guest, long), ...some)
  return words.map((word) => `'${word}'`).join(' ')
}

/** @type {Set<import('node:child_process').ChildProcess>} */
const running = new Set()

/** Runs the files in the guest; its report tells the rest. @param {Guest} guest @param {string[]} files @param {boolean} long */
async function runGuest(guest, files, long) {
  const { kernel, name, disk, udev } = guest
  const report = `reports/kernel-${name}.json`
  const settings = {
    TMPDIR: '/scratch',
    NO_COLOR: '1',
    LOOPCTL_REQUIRE_KERNEL: '1',
    LOOPCTL_TIME_SCALE: '10',
    // It has one CPU, and a process for each worker costs more than what it saves
    LOOPCTL_TEST_WORKERS: '1',
    LOOPCTL_REPORT: report,
    ...settingsOf(guest, long),
  }
  const words = ['--kernel', kernel, '--disk', disk, ...(udev ? ['--udev'] : []), '--results', 'reports']
  words.push('--limit', long ? '14400' : '2400', '--console', `reports/kernel-${name}.console`)
  for (const [key, value] of Object.entries(settings)) words.push('--env', `${key}=${value}`)
  words.push('--', 'sh', '-c', [false, true].map((mocks) => commandOf(guest, files, mocks, long)).join('; '))
  const log = openSync(join(ROOT, report.replace(/json$/, 'log')), 'w')
  const start = performance.now()
  const child = spawn(RUN, words, { cwd: ROOT, stdio: ['ignore', log, log] })
  running.add(child)
  await new Promise((resolve) => void child.on('close', resolve))
  running.delete(child)
  const seconds = Math.round((performance.now() - start) / 1_000)
  console.error(`kernels: ${name}: ${seconds} s`)
  return { name, report: join(ROOT, report), files, seconds }
}

/** The results, between two comments of docs/kernels.md. @param {import('./table.js').Guest[]} results */
function writeDocs(results) {
  const file = join(ROOT, 'docs/kernels.md')
  const { releases, rows, skips, nowhere } = readResults(results)
  const guests = GUESTS.filter(({ name }) => results.some((one) => one.name === name))
  const described = guests.map(({ name, disk, udev }, i) => [
    name,
    releases[i] ?? '',
    disk.split(',')[1] ?? '512',
    udev ? 'yes' : 'no',
  ])
  const reasons = [...skips].map(([reason, byFile]) => {
    const tests = new Set(
      [...byFile].flatMap(([name, one]) => [...one.tests.keys()].map((title) => `${name} ${title}`)),
    )
    const where = new Set([...byFile.values()].flatMap((one) => one.guests))
    const counts = [tests.size, [...tests].filter((test) => nowhere.has(test)).length].map(String)
    return [reason, ...counts, where.size === guests.length ? 'all' : [...where].join(', ')]
  })
  const text = [
    toMarkdown([['guest', 'kernel', 'sectors', 'udev'], ...described]),
    toMarkdown(rows),
    'Skipped:',
    toMarkdown([['reason', 'tests', 'of these in no guest', 'skipped in'], ...reasons]),
  ].join('\n\n')
  const marks = /(<!-- scripts\/kernels -->\n).*(<!-- end -->)/s
  const before = readFileSync(file, 'utf8')
  if (!marks.test(before)) throw new Error(`${file} has no place for the table`)
  writeFileSync(
    file,
    before.replace(marks, (_, begin, end) => `${begin}\n${text}\n\n${end}`),
  )
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      'long': { type: 'boolean', default: false },
      'at-once': { type: 'string', default: '2' },
      'only': { type: 'string', default: '' },
      'write-docs': { type: 'boolean', default: false },
      'help': { type: 'boolean', short: 'h', default: false },
    },
  })
  if (values.help) {
    console.log(USAGE)
    return
  }
  const unknown = positionals.find((word) => GUESTS.every(({ name }) => name !== word))
  if (unknown !== undefined) throw new Error(`there is no guest ${unknown}`)
  const { long } = values
  const only = values.only.split(',').filter(Boolean)
  const wanted = GUESTS.filter(({ name }) => positionals.length === 0 || positionals.includes(name))
  const tasks = wanted
    .map((guest) => ({ guest, files: filesOf(guest, { long, only }) }))
    .filter(({ files }) => files.length > 0)

  mkdirSync(join(ROOT, 'reports'), { recursive: true })
  for (const name of readdirSync(join(ROOT, 'reports')))
    if (name.startsWith('kernel-')) rmSync(join(ROOT, 'reports', name))
  for (const kernel of new Set(tasks.map(({ guest }) => guest.kernel))) {
    const { status } = spawnSync(RUN, ['--kernel', kernel, '--fetch'], { stdio: ['ignore', 'ignore', 'inherit'] })
    if (status !== 0) throw new Error(`kernel ${kernel} is not to be had`)
  }
  for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP'])) {
    process.once(signal, () => {
      for (const child of running) child.kill()
      process.exitCode = 130
    })
  }
  /** @type {import('./table.js').Guest[]} */
  const results = []
  const queue = [...tasks]
  const work = async () => {
    for (let task = queue.shift(); task && process.exitCode === undefined; task = queue.shift()) {
      results.push(await runGuest(task.guest, task.files, long))
    }
  }
  await Promise.all(Array.from({ length: Number(values['at-once']) }, work))
  const ordered = wanted.flatMap(({ name }) => results.find((result) => result.name === name) ?? [])
  if (!printResults(ordered)) process.exitCode ??= 1
  if (values['write-docs']) writeDocs(ordered)
}

try {
  await main()
} catch (error) {
  console.error(`kernels: ${/** @type {Error} */ (error).message}\n${USAGE}`)
  process.exitCode = 2
}
