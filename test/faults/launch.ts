/** The launcher, compiled when first needed, and a child under it. */

import { execFile, execFileSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { afterAll, expect, vi } from 'vitest'
import { attach } from '../../lib/index.ts'
import { attachedNumbers, firstNumber, removeDevice, sysfs } from '../kernel/support.ts'
import { needs, needsKernel } from '../needs.ts'
import type { Outcome, Plan } from './plan.ts'
import { limit } from '../scale.ts'

const OPERATIONS = fileURLToPath(new URL('fixtures/operations.mjs', import.meta.url))
const SOURCE = fileURLToPath(new URL('launcher.c', import.meta.url))
/** No child comes near it: one that does hangs, and is killed. */
const LIMIT = limit(120_000)

const built = mkdtempSync(join(tmpdir(), 'loopctl-launcher-'))
const launcher = join(built, 'launcher')
afterAll(() => rmSync(built, { recursive: true, force: true }))

/** Before each test under faults: it is skipped where none can be made. */
export function prepareLauncher(): void {
  needsKernel('seccomp filters')
  needs('cc')
  if (!existsSync(launcher)) execFileSync('cc', ['-O1', '-Wall', '-Wextra', '-o', launcher, SOURCE], { stdio: 'pipe' })
}

let runs = 0

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
      { timeout: LIMIT, killSignal: 'SIGKILL', maxBuffer: 1 << 24 },
    )
    // Somebody else who has one of them open in this moment is waited for
    await vi.waitFor(() => expect(attachedUnder(`${own}/`), `left attached after ${faults}`).toEqual([]), {
      timeout: limit(5_000),
    })
    expect(sysfs(first.number, 'loop/backing_file'), faults).toBe(given)
    expect([readOnly, twin, images.moved], faults).toContain(sysfs(second.number, 'loop/backing_file'))
    return JSON.parse(stdout) as Outcome[]
  } finally {
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
  for (let number = firstNumber() + (run % 100); ; number += 100) {
    if (!existsSync(`/sys/block/loop${number}`)) return number
  }
}
