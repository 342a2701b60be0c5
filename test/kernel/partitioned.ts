/** Partitioned images, made by sfdisk and sgdisk, and what the kernel and sfdisk say of them. */

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, existsSync, openSync, readdirSync, readSync, statSync, writeSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { expect, onTestFinished } from 'vitest'
import { attach, type AttachOptions, type LoopErrorReason, type Partition } from '../../lib/index.ts'
import { env } from '../needs.ts'
import { sysfs } from './support.ts'

export const MiB = 1 << 20

export const TWO = 'label: gpt\nstart=2048, size=2048, name=first\nstart=4096, size=4096, name=second\n'
export const TWO_4096 = 'label: gpt\nstart=256, size=256, name=first\nstart=512, size=512, name=second\n'

/** sfdisk, with a script, on an image or a device. Nobody else is to be told: sfdisk would ask the kernel to look. */
export function sfdisk(path: string, script: string, ...options: string[]): void {
  execFileSync('sfdisk', ['--quiet', '--no-reread', '--no-tell-kernel', ...options, path], { env, input: script })
}

export function deletePartition(path: string, number: number): void {
  execFileSync('sfdisk', ['--quiet', '--no-reread', '--no-tell-kernel', '--delete', path, `${number}`], { env })
}

export function sgdisk(path: string, ...options: string[]): void {
  execFileSync('sgdisk', [...options, path], { env, stdio: ['ignore', 'ignore', 'inherit'] })
}

/** A table for another block size than 512: sfdisk makes it for that of the device. */
export async function sfdiskAt(blockSize: number, file: string, script: string): Promise<void> {
  await using device = await attach(file, { blockSize })
  sfdisk(device.path, script)
  await device.flush()
  await device.detach()
}

/** What sfdisk says of a device or an image; the figures are bytes. */
export interface Told {
  number: number
  start: number
  size: number
  type: string
  name?: string
  uuid?: string
  bootable?: boolean
  attrs?: string
}

export function told(path: string): { label: string; partitions: Told[] } {
  const output = execFileSync('sfdisk', ['--json', path], {
    env,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'ignore'],
  })
  const { partitiontable } = JSON.parse(output) as {
    partitiontable: { label: string; sectorsize: number; partitions?: (Told & { node: string })[] }
  }
  const { label, sectorsize, partitions = [] } = partitiontable
  return {
    label: label === 'dos' ? 'mbr' : label,
    partitions: partitions.map(({ node, ...entry }) => ({
      ...entry,
      number: Number(/\d+$/.exec(node)?.[0]),
      start: entry.start * sectorsize,
      size: entry.size * sectorsize,
    })),
  }
}

/** A pattern at the place in the image where each partition begins: the contents to be found through the nodes. */
export function mark(file: string, starts: readonly number[]): void {
  const fd = openSync(file, 'r+')
  for (const [index, start] of starts.entries()) writeSync(fd, pattern(index), 0, 512, start)
  closeSync(fd)
}

export function pattern(index: number): Buffer {
  return Buffer.alloc(512, `pattern ${index} `)
}

export function readBytes(path: string, start: number, length: number): Buffer {
  const bytes = Buffer.alloc(length)
  const fd = openSync(path, 'r')
  try {
    return bytes.subarray(0, readSync(fd, bytes, 0, length, start))
  } finally {
    closeSync(fd)
  }
}

/** `loop7p1` and so on, of the kernel. */
export function knownPartitions(number: number): Record<string, { start: number; size: number; device: string }> {
  const names = existsSync(`/sys/block/loop${number}`) ? readdirSync(`/sys/block/loop${number}`) : []
  const entries = names
    .filter((name) => name.startsWith(`loop${number}p`))
    .toSorted()
    .map((name) => {
      const [start, size] = ['start', 'size'].map((file) => Number(sysfs(number, `${name}/${file}`)) * 512)
      return [name, { start: start ?? -1, size: size ?? -1, device: sysfs(number, `${name}/dev`) ?? '' }] as const
    })
  return Object.fromEntries(entries)
}

/** Sectors of a partition that no other process of the tests makes as long: one that is left is known by its length. */
export const OWN_LENGTH: number = 4096 + (process.pid % 8000)

/** The partitions of so many sectors that the kernel has, on whichever device: `loop7p2`. */
export function partitionsOfLength(sectors: number): string[] {
  const devices = readdirSync('/sys/block').flatMap((name) => Number(/^loop(\d+)$/.exec(name)?.[1] ?? []))
  return devices.flatMap((number) => {
    try {
      const names = Object.entries(knownPartitions(number)).filter(([, { size }]) => size === sectors * 512)
      return names.map(([name]) => name)
    } catch {
      // Another program's device, which has gone since
      return []
    }
  })
}

/** Without what changes when a partition is added again. */
export function places(number: number): Record<string, string> {
  return Object.fromEntries(
    Object.entries(knownPartitions(number)).map(([name, { start, size }]) => [name, `${start} ${size}`]),
  )
}

/** Partition nodes of the device that a /dev has; that of another process is behind its root. */
export function partitionNodes(number: number, dev = '/dev'): string[] {
  return readdirSync(dev)
    .filter((name) => name.startsWith(`loop${number}p`))
    .toSorted()
}

/** `major:minor` of a node. */
export function nodeOf(path: string): string {
  const { rdev } = statSync(path)
  const [major, minor] = [(rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >>> 12) & 0xfff00)]
  return `${major}:${minor}`
}

/** Neither in the kernel nor in /dev. */
export function expectNoPartitions(number: number): void {
  expect(knownPartitions(number)).toEqual({})
  expect(partitionNodes(number)).toEqual([])
}

/** That each has a node of its own, which shows the bytes of the image that the kernel says. */
export function expectUsable(partitions: readonly Partition[], file: string, offset = 0): void {
  for (const { path, device, start, size } of partitions) {
    expect(nodeOf(path), path).toBe(device)
    const length = Math.min(size, 4096)
    expect(readBytes(path, 0, length).equals(readBytes(file, offset + start, length)), path).toBe(true)
  }
}

interface Refused {
  reason: LoopErrorReason
  code: string
  message: string
  hint?: string
  holders?: { pid?: number }[]
}

/** Another process, which does what it is told: fixtures/remote.mjs. */
export class Remote {
  readonly #child: ChildProcess
  readonly #lines: AsyncIterator<string>

  /** `enter`: what it is to be put behind. */
  constructor(enter: readonly string[] = []) {
    const fixture = fileURLToPath(new URL('fixtures/remote.mjs', import.meta.url))
    const [program, ...rest] = [...enter, process.execPath, fixture]
    const child = spawn(program, rest, { stdio: ['pipe', 'pipe', 'inherit'] })
    onTestFinished(() => void child.kill('SIGKILL'))
    this.#lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
    this.#child = child
  }

  get pid(): number {
    return this.#child.pid ?? -1
  }

  /** What its mount namespace has there. */
  path(path: string): string {
    return `/proc/${this.pid}/root${path}`
  }

  /** Its answer; the error that it ends with is one of the test. */
  async ask<T>(...words: unknown[]): Promise<T> {
    const { value, error } = await this.#ask(words)
    if (error) expect.fail(`${JSON.stringify(words)}: ${error.message}`)
    return value as T
  }

  attach(file: string, options: AttachOptions): Promise<{ number: number; partitions: Partition[] }> {
    return this.ask('attach', file, options)
  }

  /** The error that it has to end with. */
  async refused(reason: LoopErrorReason, ...words: unknown[]): Promise<Refused> {
    const { error } = await this.#ask(words)
    if (!error) expect.fail(`${JSON.stringify(words)} did not fail`)
    expect(error.reason, error.message).toBe(reason)
    return error
  }

  /** Ends it; by SIGKILL where that is asked for. */
  async end(signal?: 'SIGKILL'): Promise<void> {
    const ended = once(this.#child, 'exit')
    if (signal) this.#child.kill(signal)
    else this.#child.stdin?.end()
    await ended
  }

  async #ask(words: unknown[]): Promise<{ value?: unknown; error?: Refused }> {
    this.#child.stdin?.write(`${JSON.stringify(words)}\n`)
    const { value, done } = await this.#lines.next()
    if (done) expect.fail(`the process ended before it answered ${JSON.stringify(words)}`)
    return JSON.parse(value) as { value?: unknown; error?: Refused }
  }
}

/** Another process that has a path open until it is told to end. */
export interface Opener {
  pid: number
  end: () => Promise<void>
}

export async function opener(path: string): Promise<Opener> {
  const child = spawn('sh', ['-c', 'exec 3<"$0"; echo open; read line', path], { stdio: ['pipe', 'pipe', 'inherit'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  await once(child.stdout, 'data')
  return {
    pid: child.pid ?? -1,
    end: async () => {
      const ended = once(child, 'exit')
      child.stdin.end('\n')
      await ended
    },
  }
}
