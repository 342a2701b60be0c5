/** Which file the addon is loaded from: a binary that the package has, or one that was built in place. */

import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'

const fs = process.getBuiltinModule('node:fs')

/** Of the package; empty in a bundle that does not know its own place. */
export const ROOT: string = rootOf(import.meta.url)

function rootOf(here: string | undefined): string {
  return here === undefined ? '' : fileURLToPath(new URL('../..', here))
}

/**
 * The binaries of the package. Every path stands here in full, so that tools which trace or copy the files that a program
 * needs find them.
 */
const BINARIES: Readonly<Record<string, () => URL>> = {
  'x64 glibc': () => new URL('../../prebuilds/linux-x64/loopctl.glibc.node', import.meta.url),
  'x64 musl': () => new URL('../../prebuilds/linux-x64/loopctl.musl.node', import.meta.url),
  'arm64 glibc': () => new URL('../../prebuilds/linux-arm64/loopctl.glibc.node', import.meta.url),
  'arm64 musl': () => new URL('../../prebuilds/linux-arm64/loopctl.musl.node', import.meta.url),
}

/** The code was put into a bundle, which cannot hold a binary. */
export class Bundled extends Error {
  override readonly name = 'Bundled'

  constructor() {
    super("loopctl was bundled, and its binary was not: tell the bundler external: ['loopctl']")
  }
}

/** @throws {@link Bundled}, and what node-gyp-build or the dynamic linker says where no binary fits */
export function loadAddon(): Record<string, unknown> {
  if (ROOT === '') throw new Bundled()
  const require = createRequire(import.meta.url)
  const packaged = BINARIES[`${process.arch} ${libc()}`]
  if (packaged !== undefined && !isOtherWanted()) {
    const path = fileURLToPath(packaged())
    if (fs.existsSync(path)) return require(path) as Record<string, unknown>
  }
  // In a bundle this would be the folder of another program, with another addon perhaps.
  if (!isPackage()) throw new Bundled()
  return (require('node-gyp-build') as (root: string) => Record<string, unknown>)(ROOT)
}

/** As node-gyp-build tells it. */
function libc(): string {
  return process.env['LIBC'] ?? (fs.existsSync('/etc/alpine-release') ? 'musl' : 'glibc')
}

/** One that was built here, or that the environment names. */
function isOtherWanted(): boolean {
  return process.env['LOOPCTL_PREBUILD'] !== undefined || fs.existsSync(`${ROOT}/build`)
}

function isPackage(): boolean {
  try {
    const { name } = JSON.parse(fs.readFileSync(`${ROOT}/package.json`, 'utf8')) as { name?: unknown }
    return name === 'loopctl'
  } catch {
    return false
  }
}
