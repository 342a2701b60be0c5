/** The launcher, compiled when first needed, and a child under it. */

import { execFile, execFileSync, spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { afterAll, expect, vi } from 'vitest'
import { attach, LoopControl } from '../../lib/index.ts'
import { keptToNumbers } from '../kernel/own-numbers.ts'
import { attachedNumbers, firstNumber, removeDevice, sysfs, test as onDevices } from '../kernel/support.ts'
import type { Outcome, Plan } from './plan.ts'
import { limit } from '../scale.ts'

const OPERATIONS = fileURLToPath(new URL('fixtures/operations.mjs', import.meta.url))
const SOURCE = fileURLToPath(new URL('launcher.c', import.meta.url))
/** No child comes near it: one that does hangs, and is killed. */
const LIMIT = limit(120_000)

const built = mkdtempSync(join(tmpdir(), 'loopctl-launcher-'))
const launcher = join(built, 'launcher')
afterAll(() => rmSync(built, { recursive: true, force: true }))

function whyNot(): string {
  try {
    execFileSync('cc', ['-O1', '-Wall', '-Wextra', '-o', launcher, SOURCE], { stdio: 'pipe' })
  } catch (error) {
    return `the launcher cannot be compiled: ${String(error)}`
  }
  const { status, stderr } = spawnSync(launcher, ['0xffffffff=1', '--', 'true'], { encoding: 'utf8' })
  return status === 0 ? '' : `no seccomp filter can be had: ${stderr}`
}

const reason = whyNot()
if (reason !== '') {
  if (process.env['LOOPCTL_REQUIRE_KERNEL'] === '1') {
    throw new Error(`LOOPCTL_REQUIRE_KERNEL=1, but faults cannot be made: ${reason}`)
  }
  console.warn(`\n*** TESTS UNDER MADE FAULTS ARE SKIPPED: ${reason} ***\n`)
}

/** `test` of test/kernel, skipped where no faults can be made. */
export const test: typeof onDevices = reason === '' ? onDevices : (onDevices.skip as typeof onDevices)

let runs = 0

/** Children that run at once. */
export const AT_ONCE = 4
/** More devices than a child has attached at once, with those that a fault keeps it from detaching. */
const DEVICES = 20
/** The numbers of a child: beside those devices it makes some more where each refuses. */
const NUMBERS = 36

/** For each of the children at once the first of the numbers that it is kept to: nobody takes a device before it. */
const free = Array.from({ length: AT_ONCE }, (_, slot) => slot * NUMBERS)
const made: number[] = []
afterAll(async () => void (await Promise.all(made.map(removeDevice))))

async function takeNumbers(): Promise<number> {
  const slot = free.shift()
  if (slot === undefined) throw new Error(`more than ${AT_ONCE} children at once`)
  const first = firstNumber() + slot
  if (made.includes(first)) return first
  await using control = await LoopControl.open()
  for (let number = first; number < first + DEVICES; number++) made.push(await control.add(number))
  return first
}

/**
 * Runs the operations under the faults, with two devices held by this process, and looks afterwards whether anything of
 * the child outlived it.
 */
export async function runUnder(
  faults: string,
  parent: string,
  { raw, only }: { raw: readonly string[]; only?: string[] },
): Promise<Outcome[]> {
  const run = ++runs
  const folder = join(parent, String(run))
  const own = join(parent, `own-${run}`)
  mkdirSync(folder)
  mkdirSync(own)
  const [given, readOnly, twin] = ['given', 'read-only', 'twin'].map((name) => join(folder, name)) as [
    string,
    string,
    string,
  ]
  const images = { given, own: join(own, 'image'), twin, moved: join(folder, 'moved') }
  writeFileSync(given, Buffer.alloc(262_144, run))
  for (const copy of [readOnly, twin, images.own]) copyFileSync(given, copy)
  const reference = `faults-${process.pid}-${run}`
  const first = await attach(given, { reference, blockSize: 4096 })
  const second = await attach(readOnly, { readOnly: true })
  const number = numberOf(run)
  const numbers = await takeNumbers()
  try {
    const plan: Plan = {
      given: first.number,
      readOnly: second.number,
      reference,
      images,
      number,
      raw: [...raw],
      ...(only && { only }),
    }
    const { stdout } = await promisify(execFile)(
      launcher,
      [faults, '--', process.execPath, OPERATIONS, JSON.stringify(plan)],
      {
        timeout: LIMIT,
        killSignal: 'SIGKILL',
        maxBuffer: 1 << 24,
        env: keptToNumbers(numbers, join(parent, 'made'), NUMBERS).env,
      },
    )
    // Somebody else who has one of them open in this moment is waited for
    await vi.waitFor(() => expect(attachedUnder(`${own}/`), `left attached after ${faults}`).toEqual([]), {
      timeout: limit(5_000),
    })
    expect(sysfs(first.number, 'loop/backing_file'), faults).toBe(given)
    expect([readOnly, twin, images.moved], faults).toContain(sysfs(second.number, 'loop/backing_file'))
    return JSON.parse(stdout) as Outcome[]
  } finally {
    free.push(numbers - firstNumber())
    await first.close()
    await second.close()
    await removeDevice(number)
    rmSync(folder, { recursive: true })
    rmSync(own, { recursive: true })
  }
}

function attachedUnder(prefix: string): string[] {
  return attachedNumbers()
    .map((number) => sysfs(number, 'loop/backing_file') ?? '')
    .filter((file) => file.startsWith(prefix))
}

/** Of those that this file of tests has for itself; children that run at once have different ones. */
function numberOf(run: number): number {
  for (let number = firstNumber() + AT_ONCE * NUMBERS + (run % 100); ; number += 100) {
    if (!existsSync(`/sys/block/loop${number}`)) return number
  }
}
