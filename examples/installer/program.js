/**
 * The program that runs from the image: it reads every file again and again and compares it with the manifest. Run, it
 * is the program; imported, it is what makes its files and starts it. It does not know that there is a loop device.
 */

import { spawn } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { EventEmitter, once } from 'node:events'
import { mkdirSync, readFileSync, realpathSync, writeFileSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'

const MANIFEST = 'MANIFEST.json'
const FILES = 320
/** No single wait may be longer, in ms. */
const LIMIT = 60_000

/** @param {Buffer} bytes */
const sha256 = (bytes) => createHash('sha256').update(bytes).digest('hex')

/**
 * Fills a folder with some 40 MiB in files of every size from 1 byte to 256 KiB, and their sha256 in a manifest. Random
 * bytes: a packed image stays as large, and no block is like another.
 *
 * @param {string} folder
 */
export function makeFiles(folder) {
  /** @type {Record<string, string>} */
  const manifest = {}
  for (let i = 0; i < FILES; i++) {
    const name = `part${i % 16}/file${i}`
    const bytes = randomBytes(1 + ((i * 7919) % 262_144))
    mkdirSync(dirname(join(folder, name)), { recursive: true })
    writeFileSync(join(folder, name), bytes)
    manifest[name] = sha256(bytes)
  }
  writeFileSync(join(folder, MANIFEST), JSON.stringify(manifest))
}

/** The running program, seen from outside. */
export class Program {
  /** Complete passes over all files. */
  passes = 0
  errors = 0
  /** What ended it; undefined while it runs. @type {string | undefined} */
  ended
  /** @type {import('node:child_process').ChildProcess} */
  #child
  /** When each complete pass had begun. @type {number[]} */
  #began = []
  #firstError = ''
  #news = new EventEmitter()

  /** @param {string} root what it reads */
  constructor(root) {
    const child = spawn(process.execPath, [fileURLToPath(import.meta.url), root], {
      stdio: ['ignore', 'pipe', 'inherit'],
      // Its working folder must not be what keeps the medium busy.
      cwd: '/',
    })
    this.#child = child
    child.once('error', (error) => this.#end(error.message))
    child.once('close', (code, signal) => this.#end(signal ?? `exit code ${code}`))
    createInterface({ input: child.stdout }).on('line', (line) => {
      this.#take(JSON.parse(line))
      this.#news.emit('news')
    })
  }

  /** @param {{ error?: string, began?: number }} line */
  #take({ error, began }) {
    if (error !== undefined) {
      this.errors++
      this.#firstError ||= error
    }
    if (began === undefined) return
    this.passes++
    this.#began.push(began)
  }

  /** @param {string} how */
  #end(how) {
    this.ended ??= how
    this.#news.emit('news')
  }

  /**
   * Waits until so many passes are complete that began after that moment: one that was under way then has read some of
   * its files before.
   *
   * @param {number} moment as of Date.now()
   * @param {number} count
   * @param {AbortSignal} signal
   */
  async passesSince(moment, count, signal) {
    const limit = AbortSignal.timeout(LIMIT)
    while (this.#began.filter((began) => began > moment).length < count) {
      if (this.errors > 0) throw new Error(`the program read something wrong: ${this.#firstError}`)
      if (this.ended !== undefined) throw new Error(`the program ended: ${this.ended}`)
      await this.#waitForNews(AbortSignal.any([signal, limit]))
    }
  }

  /** @param {AbortSignal} signal */
  async #waitForNews(signal) {
    try {
      await once(this.#news, 'news', { signal })
    } catch {
      throw new Error('waited for the program too long', { cause: signal.reason })
    }
  }

  /** Ends it, and waits for that. Throws where it had seen an error. */
  async stop() {
    this.#child.kill('SIGTERM')
    const limit = AbortSignal.timeout(LIMIT)
    while (this.ended === undefined) await this.#waitForNews(limit)
    if (this.ended !== 'exit code 0') throw new Error(`the program ended: ${this.ended} ${this.#firstError}`)
  }
}

/** @param {Record<string, unknown>} line */
function report(line) {
  process.stdout.write(`${JSON.stringify(line)}\n`)
}

/** @param {string} root */
async function run(root) {
  const ending = new AbortController()
  const end = ending.signal
  let passes = 0
  let errors = 0
  process.once('SIGTERM', () => ending.abort())
  // Nobody listens any more: whoever started it is gone.
  process.stdout.once('error', () => process.exit(1))
  /** @type {Record<string, string>} */
  const manifest = JSON.parse(readFileSync(join(root, MANIFEST), 'utf8'))
  const files = Object.entries(manifest)
  while (!end.aborted) {
    const began = Date.now()
    for (const [name, wanted] of files) {
      if (end.aborted) break
      try {
        const found = sha256(await readFile(join(root, name)))
        if (found !== wanted) throw new Error('its sha256 is not that of the manifest')
      } catch (error) {
        errors++
        report({ error: `${name}: ${error instanceof Error ? error.message : String(error)}` })
      }
    }
    if (!end.aborted) report({ passes: ++passes, files: files.length, errors, began })
  }
  process.exitCode = errors > 0 ? 1 : 0
}

const [, script, root] = process.argv
if (script !== undefined && realpathSync(script) === fileURLToPath(import.meta.url)) {
  if (root === undefined) throw new Error('usage: program.js FOLDER')
  await run(root)
}
