/** require('loopctl'): the same library as by import, with types under node16. */

import { execFileSync, spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))
let folder = ''

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'loopctl-commonjs-'))
  mkdirSync(join(folder, 'node_modules/@types'), { recursive: true })
  symlinkSync(ROOT, join(folder, 'node_modules/loopctl'))
  symlinkSync(join(ROOT, 'node_modules/@types/node'), join(folder, 'node_modules/@types/node'))
  writeFileSync(join(folder, 'package.json'), '{ "type": "commonjs" }')
})

afterAll(() => {
  rmSync(folder, { recursive: true, force: true })
})

/** What the compiler has to say of it. */
function compile(name: string, text: string): string {
  writeFileSync(join(folder, name), text)
  const compilerOptions = {
    module: 'node16',
    target: 'es2022',
    lib: ['es2022', 'esnext.disposable'],
    types: ['node'],
    strict: true,
    noEmit: true,
  }
  writeFileSync(join(folder, 'tsconfig.json'), JSON.stringify({ compilerOptions, files: [name] }))
  const { stdout, stderr } = spawnSync(join(ROOT, 'node_modules/.bin/tsc'), ['-p', folder], { encoding: 'utf8' })
  return stdout + stderr
}

const PROGRAM = `
import { attach, LoopControl, LoopDevice, LoopError, type LoopInfo, type LoopErrorReason, withDevice } from 'loopctl'
import { type LoopInfo64, loopGetStatus64Sync } from 'loopctl/ioctl'

export async function numberOf(file: string): Promise<number> {
  const device: LoopDevice = await attach(file, { readOnly: true })
  const info: LoopInfo64 = loopGetStatus64Sync(device.fd)
  const status: LoopInfo = await device.status()
  await withDevice(file, { offset: 512 }, (other) => other.ref)
  const control: LoopControl = await LoopControl.open()
  await control.close()
  return info.number + status.number
}

export function reasonOf(error: unknown): LoopErrorReason | undefined {
  return LoopError.is(error) ? error.reason : undefined
}
`

describe('the types', () => {
  test('are there for a module in CommonJS', { timeout: 60_000 }, () => {
    expect(compile('program.ts', PROGRAM)).toBe('')
  })

  test('are there for import = require()', { timeout: 60_000 }, () => {
    const text = "import loopctl = require('loopctl')\nexport const devices = loopctl.list({ all: true })\n"
    expect(compile('required.ts', text)).toBe('')
  })

  test('are those of the ES module: a device of one is a device of the other', { timeout: 60_000 }, () => {
    const text = `
import type { LoopDevice as Ours } from 'loopctl'
import type { LoopDevice as Theirs } from 'loopctl' with { 'resolution-mode': 'import' }
export function same(device: Ours): Theirs {
  return device
}
`
    expect(compile('same.ts', text)).toBe('')
  })

  test('see a mistake', { timeout: 60_000 }, () => {
    const text = "import { attach } from 'loopctl'\nexport const device = attach('disk.img', { readonly: true })\n"
    expect(compile('mistaken.ts', text)).toMatch(/'readonly' does not exist in type 'AttachOptions'|mean.* 'readOnly'/)
  })
})

test('there is one LoopError, however it is loaded', () => {
  const script = `
    const required = require('loopctl')
    const ioctl = require('loopctl/ioctl')
    Promise.all([import('loopctl'), import('loopctl/ioctl')]).then(([imported, others]) => {
      const same = (a, b) => Object.keys(b).every((name) => a[name] === b[name]) && Object.keys(b).length > 5
      console.log(same(required, imported) && same(ioctl, others))
    })`
  writeFileSync(join(folder, 'one.cjs'), script)
  expect(execFileSync(process.execPath, [join(folder, 'one.cjs')], { encoding: 'utf8' }).trim()).toBe('true')
})
