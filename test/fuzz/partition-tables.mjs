// Mutated partition tables, read by us, by sfdisk, by partx, and with --kernel by the kernel's own parsers. Says what it
// has seen as one JSON object on stdout; the seed and what differs unexpectedly go to stderr, with the image kept.
//
//   node test/fuzz/partition-tables.mjs [--seed N] [--tables N] [--seconds N] [--only INDEX] [--kernel | --every N]
//
// Exit 0: every difference has its reason in DIFFERENCES. --kernel wants root, and what `npm run build` made.

import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { crc32 } from 'node:zlib'
import { build } from 'rolldown'

const { values } = parseArgs({
  options: {
    seed: { type: 'string' },
    tables: { type: 'string', default: '3000' },
    seconds: { type: 'string', default: '120' },
    only: { type: 'string' },
    every: { type: 'string', default: '1' },
    kernel: { type: 'boolean', default: false },
  },
})
const seed = Number(values.seed ?? Date.now() % 1_000_000_007)
const count = Number(values.tables)
const byKernel = values.kernel
/** sfdisk and partx take more time than all the rest: they read each n-th. */
const every = Number(values.every)
console.error(`seed ${seed}`)

const { attach } = byKernel ? await import(new URL('../../dist/index.js', import.meta.url).href) : {}
const folder = mkdtempSync(join(tmpdir(), 'loopctl-fuzz-'))
const { findTable, describeTable } = await loadReader()

/** The parser alone, of this checkout: it is no part of what the package exports. */
async function loadReader() {
  const lib = fileURLToPath(new URL('../../lib/', import.meta.url))
  const input = join(folder, 'reader.ts')
  const files = ['partitions/table.ts', 'partitions/disk.ts'].map(
    (file) => `export * from ${JSON.stringify(lib + file)}\n`,
  )
  writeFileSync(input, files.join(''))
  const file = join(folder, 'reader.mjs')
  await build({ input, platform: 'node', external: /^node:|^node-gyp-build$/, output: { file }, logLevel: 'silent' })
  return import(pathToFileURL(file).href)
}

const BLOCKS = 4096
const env = { ...process.env, PATH: `${process.env['PATH']}:/usr/sbin:/sbin`, LC_ALL: 'C.UTF-8' }

/** mulberry32 @param {number} from */
function randomOf(from) {
  let state = from
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let value = Math.imul(state ^ (state >>> 15), 1 | state)
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32
  }
}

// ── Tables that are whole ──

/** @param {Buffer} image @param {number} block @param {number[][]} entries type, start, size, active */
function bootRecord(image, block, entries) {
  for (const [index, [type = 0, start = 0, size = 0, active = 0]] of entries.entries()) {
    const at = block * 512 + 446 + index * 16
    image.writeUInt8(active, at)
    image.writeUInt8(type, at + 4)
    image.writeUInt32LE(start, at + 8)
    image.writeUInt32LE(size, at + 12)
  }
  image.writeUInt16LE(0xaa55, block * 512 + 510)
}

function mbr() {
  const image = Buffer.alloc(BLOCKS * 512)
  image.writeUInt32LE(0x1a2b3c4d, 440)
  bootRecord(image, 0, [
    [0x83, 8, 80, 0x80],
    [5, 100, 3000],
    [0xc, 3200, 100],
    [0x82, 3400, 600],
  ])
  bootRecord(image, 100, [
    [0x83, 4, 40],
    [5, 60, 100],
  ])
  bootRecord(image, 160, [
    [0x82, 4, 40],
    [5, 200, 100],
  ])
  bootRecord(image, 300, [[0x83, 4, 40]])
  return image
}

const LINUX = Buffer.from('af3dc60f838472478e793d69d8477de4', 'hex')

function gpt() {
  const image = Buffer.alloc(BLOCKS * 512)
  bootRecord(image, 0, [[0xee, 1, BLOCKS - 1]])
  const entries = Buffer.alloc(128 * 128)
  for (const [index, [first = 0, last = 0]] of [
    [40, 99],
    [100, 999],
    [2000, 2999],
  ].entries()) {
    const at = index * 128
    LINUX.copy(entries, at)
    entries.writeUInt32LE(index + 1, at + 16)
    entries.writeBigUInt64LE(BigInt(first), at + 32)
    entries.writeBigUInt64LE(BigInt(last), at + 40)
    entries.write(`part ${index + 1}`, at + 56, 'utf16le')
  }
  const last = BLOCKS - 1
  for (const [mine = 0, other = 0, place = 0] of [
    [1, last, 2],
    [last, 1, last - 32],
  ]) {
    const header = image.subarray(mine * 512, mine * 512 + 92)
    header.write('EFI PART', 'latin1')
    header.writeUInt32LE(0x10000, 8)
    header.writeUInt32LE(92, 12)
    header.writeBigUInt64LE(BigInt(mine), 24)
    header.writeBigUInt64LE(BigInt(other), 32)
    header.writeBigUInt64LE(34n, 40)
    header.writeBigUInt64LE(BigInt(last - 33), 48)
    header.writeUInt32LE(0x11223344, 56)
    header.writeBigUInt64LE(BigInt(place), 72)
    header.writeUInt32LE(128, 80)
    header.writeUInt32LE(128, 84)
    entries.copy(image, place * 512)
  }
  seal(image)
  return image
}

/** CRCs made good again, so that what is behind them is looked at. @param {Buffer} image */
function seal(image) {
  for (const at of [512, image.length - 512]) {
    const header = image.subarray(at, at + 92)
    const place = Number(header.readBigUInt64LE(72)) * 512
    const length = header.readUInt32LE(80) * header.readUInt32LE(84)
    if (place + length <= image.length) header.writeUInt32LE(crc32(image.subarray(place, place + length)), 88)
    header.writeUInt32LE(0, 16)
    header.writeUInt32LE(crc32(header), 16)
  }
}

const FIGURES = [
  0,
  1,
  2,
  33,
  34,
  99,
  100,
  101,
  160,
  300,
  3000,
  4000,
  BLOCKS - 1,
  BLOCKS,
  BLOCKS + 1,
  0x7fff_ffff,
  0xffff_ffff,
]
const TYPES = [0, 1, 5, 0xc, 0xf, 0x82, 0x83, 0x85, 0xee, 0xef, 0xff]

/** @param {number} index */
function mutated(index) {
  const random = randomOf(seed + index * 7919)
  const pick = (/** @type {number} */ bound) => Math.floor(random() * bound)
  const of = (/** @type {number[]} */ list) => list[pick(list.length)] ?? 0
  const isGpt = random() < 0.5
  let image = isGpt ? gpt() : mbr()
  const records = [0, 100, 160, 300]
  for (let changes = 1 + pick(4); changes > 0; changes--) {
    if (random() < 0.15) {
      // Any byte of what is read
      const base = isGpt ? of([446, 512, 1024, image.length - 512]) : of(records) * 512 + 440
      image.writeUInt8(pick(256), base + pick(70))
    } else if (isGpt) {
      const copy = of([512, image.length - 512])
      const field = of([24, 32, 40, 48, 72])
      const choice = random()
      if (choice < 0.5) {
        // Both copies, mostly: one that differs alone is only a warning.
        const entry = pick(5)
        const figure = BigInt(of(FIGURES)) + (random() < 0.05 ? 2n ** 63n : 0n)
        const at = entry * 128 + of([32, 40])
        for (const place of random() < 0.8 ? [1024, image.length - 33 * 512] : [1024]) {
          if (entry > 2) LINUX.copy(image, place + entry * 128)
          image.writeBigUInt64LE(figure, place + at)
        }
      } else if (choice < 0.75) image.writeBigUInt64LE(BigInt(of(FIGURES)), copy + field)
      else if (choice < 0.85)
        image.writeUInt32LE(of([0, 1, 4, 127, 128, 129, 256, 300, 0xffff_ffff]), copy + of([80, 84]))
      else bootRecord(image, 0, [[of(TYPES), of([0, 1, 2, 34]), of(FIGURES), of([0, 0, 0, 0x80, 7])]])
    } else {
      const at = of(records) * 512 + 446 + pick(4) * 16
      const field = pick(4)
      if (field === 0) image.writeUInt8(of(TYPES), at + 4)
      else if (field === 1) image.writeUInt32LE(of(FIGURES), at + 8)
      else if (field === 2) image.writeUInt32LE(of(FIGURES), at + 12)
      else image.writeUInt8(of([0, 0x80, 0x80, 0x80, 1]), at)
    }
  }
  if (isGpt && random() < 0.85) seal(image)
  // Cut off, or grown
  if (random() < 0.15) image = Buffer.from(image.subarray(0, (34 + pick(BLOCKS - 34)) * 512))
  else if (random() < 0.1) image = Buffer.concat([image, Buffer.alloc(of([1, 100, 2048]) * 512)])
  return image
}

// ── Who reads them ──

/** @typedef {{ number: number, start: number, size: number }} Part */
/** @typedef {{ kind: string, parts: Part[], found?: any, why?: string }} Reading */

/** @param {Buffer} image @returns {Promise<Reading>} */
async function ours(image) {
  let bytes = 0
  const read = async (/** @type {bigint} */ at, /** @type {number} */ length) => {
    const position = Number(at)
    if (position < 0 || length <= 0 || position + length > image.length) throw new Error(`read of ${length} at ${at}`)
    bytes += length
    return image.subarray(position, position + length)
  }
  try {
    const found = await findTable(read, BigInt(image.length), 512)
    if (bytes > 16 << 20) throw new Error(`${bytes} bytes were read`)
    if (found === undefined) return { kind: 'none', parts: [] }
    const table = describeTable(found, 512)
    return { kind: table.table, parts: table.partitions, found }
  } catch (error) {
    if (!(error instanceof Error && 'reason' in error && error.reason === 'bad-partition-table')) throw error
    return { kind: 'none', parts: [], why: error.message }
  }
}

/** sfdisk says first which logical partitions are empty, and writes names with whatever characters they have. @param {string} text */
function parse(text) {
  return JSON.parse(text.slice(text.indexOf('{')).replaceAll(/"name": ".*"/g, '"name": ""')).partitiontable
}

/** @param {string} path @returns {Reading} */
function bySfdisk(path) {
  const { stdout, status, signal } = spawnSync('sfdisk', ['--json', path], { env, encoding: 'utf8', timeout: 20_000 })
  if (signal) return { kind: 'failed', parts: [], why: signal }
  if (status !== 0) return { kind: 'none', parts: [] }
  const { label, partitions = [] } = parse(stdout)
  const parts = partitions.map((/** @type {any} */ { node, start, size }) => {
    return { number: Number(node.slice(path.length)), start: start * 512, size: size * 512 }
  })
  return { kind: label === 'gpt' ? 'gpt' : 'mbr', parts }
}

/** @param {string} path @returns {Reading} */
function byPartx(path) {
  const words = ['--raw', '--noheadings', '--output', 'NR,START,SECTORS,SCHEME', path]
  const { stdout, signal } = spawnSync('partx', words, { env, encoding: 'utf8', timeout: 20_000 })
  if (signal) return { kind: 'failed', parts: [], why: signal }
  const lines = stdout.split('\n').filter((line) => line !== '')
  const rows = lines.map((line) => line.split(' '))
  const parts = rows.map(([number, start, size]) => ({
    number: Number(number),
    start: Number(start) * 512,
    size: Number(size) * 512,
  }))
  const scheme = rows[0]?.[3]
  return { kind: scheme === 'gpt' ? 'gpt' : scheme === 'dos' ? 'mbr' : 'none', parts }
}

/** @param {string} path @returns {Promise<Reading>} */
async function bySysfs(path) {
  const device = await attach(path, { readOnly: true, partscan: 'kernel' })
  try {
    const name = `loop${device.number}`
    const parts = readdirSync(`/sys/block/${name}`)
      .filter((entry) => entry.startsWith(`${name}p`))
      .map((entry) => {
        const [number, start, size] = ['partition', 'start', 'size'].map((file) =>
          Number(readFileSync(`/sys/block/${name}/${entry}/${file}`, 'utf8')),
        )
        return { number: number ?? 0, start: (start ?? 0) * 512, size: (size ?? 0) * 512 }
      })
      .toSorted((a, b) => a.number - b.number)
    return { kind: parts.length > 0 ? 'some' : 'none', parts }
  } finally {
    await device.detach()
  }
}

// ── What may differ, and why ──

/** @param {Part[]} parts */
const text = (parts) => parts.map(({ number, start, size }) => `${number} ${start / 512}+${size / 512}`).join(', ')
/** @param {Reading} own @param {RegExp} pattern */
const said = (own, pattern) =>
  own.found?.warnings.some((/** @type {any} */ { message }) => pattern.test(message)) ?? false

/** @param {Reading} of */
const primaries = ({ parts }) => text(parts.filter(({ number }) => number <= 4))

/** Of both copies of a GPT, where they belong. @param {Buffer} image */
const headers = (image) =>
  [512, (BLOCKS - 1) * 512, image.length - 512]
    .filter((at) => at + 512 <= image.length)
    .map((at) => image.subarray(at, at + 92))

/** @type {{ name: string, reason: string, of: string[], is: (own: Reading, other: Reading, image: Buffer) => boolean }[]} */
const DIFFERENCES = [
  {
    name: 'gpt-not-for-kernel',
    of: ['kernel'],
    reason:
      'the backup of a damaged GPT, a GPT of an image that was cut, entries of another length: the kernel shows nothing',
    is: (own, other) => own.kind === 'gpt' && !own.found.isForKernel && other.parts.length === 0,
  },
  {
    name: 'chain-that-comes-back',
    of: ['kernel'],
    reason:
      'the kernel goes round until it has 255 partitions, all of them the same few; BLKPG would refuse them as overlapping',
    is: (own, other) => said(own, /comes back to the boot record/) && text(other.parts).startsWith(text(own.parts)),
  },
  {
    name: 'backwards',
    of: ['kernel'],
    reason:
      'an entry of a GPT that ends before it begins: the kernel (7.2) shows a partition of 2 ** 64 sectors less a few',
    is: (own, other) => {
      const possible = other.parts.filter(({ size }) => size < 2 ** 63)
      return said(own, /goes from block \d+ to \d+; it is left out/) && text(possible) === text(own.parts)
    },
  },
  {
    name: 'gpt-not-for-programs',
    of: ['sfdisk', 'partx'],
    reason:
      'a GPT of an image that was cut: both want the usable blocks to be on the disk, and sfdisk then shows the protective MBR',
    is: (own, other) => own.kind === 'gpt' && !own.found.isForKernel && other.kind !== 'gpt',
  },
  {
    name: 'outside-the-usable-blocks',
    of: ['partx'],
    reason:
      'libblkid leaves out what does not lie in the usable blocks of a GPT; the kernel and sfdisk do not ask for them',
    is: (own, other, image) => {
      const header = image.subarray(own.found?.usedBackup ? image.length - 512 : 512)
      const [first, last] = [Number(header.readBigUInt64LE(40)), Number(header.readBigUInt64LE(48))]
      const isInside = (/** @type {Part} */ { start, size }) => start >= first * 512 && start + size <= (last + 1) * 512
      return own.kind === 'gpt' && text(own.parts.filter(isInside)) === text(other.parts)
    },
  },
  {
    name: 'gpt-that-the-kernel-does-not-see',
    of: ['sfdisk', 'partx'],
    reason:
      'no protective partition that begins in block 1, a boot flag that is none, entries of 300 bytes: the kernel shows nothing, nor do we',
    is: (own, other) => own.kind === 'none' && other.kind === 'gpt',
  },
  {
    name: 'logical-partitions',
    of: ['sfdisk', 'partx'],
    reason:
      'in broken chains each program goes its own way: entries 3 and 4, positions beyond 2 ** 32, links back; the kernel goes ours',
    is: (own, other) => {
      return own.kind === 'mbr' && primaries(own) === primaries(other)
    },
  },
  {
    name: 'any-signature-is-an-mbr',
    of: ['sfdisk'],
    reason:
      'sfdisk shows an MBR where the kernel sees none: boot flags that are none, the protective MBR of a GPT that is damaged',
    is: (own, other) => own.kind === 'none' && other.kind === 'mbr',
  },
  {
    name: 'all-or-nothing',
    of: ['partx'],
    reason: 'libblkid gives an MBR up altogether where a part of it cannot be read; the kernel shows the rest',
    is: (own, other) => own.kind === 'mbr' && other.kind === 'none' && own.found.warnings.length > 0,
  },
  {
    name: 'entries-of-another-length',
    of: ['sfdisk', 'partx'],
    reason:
      'entries longer than 128 bytes, which UEFI allows: the kernel and libblkid take none, sfdisk reads them as of 128',
    is: (own, _, image) => own.kind === 'gpt' && headers(image).some((header) => header.readUInt32LE(84) !== 128),
  },
  {
    name: 'header-in-the-usable-blocks',
    of: ['sfdisk', 'partx'],
    reason: 'usable blocks from block 0 on: both take the header for damaged then, the kernel does not look at that',
    is: (own, _, image) => own.kind === 'gpt' && headers(image).some((header) => header.readBigUInt64LE(40) === 0n),
  },
  {
    name: 'copies-that-differ',
    of: ['sfdisk', 'partx'],
    reason:
      'two copies of a GPT, each whole for itself, and one of them refused by a rule that the kernel does not have',
    is: (own, other) => own.kind === 'gpt' && other.kind === 'gpt' && said(own, /the backup GPT|the primary GPT/),
  },
  {
    name: 'boot-sector-of-a-filesystem',
    of: ['kernel'],
    reason:
      'a FAT, NTFS or exFAT on the whole disk has code where the entries would be; partx does not read them either',
    is: (own, _, image) =>
      own.kind === 'none' && own.why === undefined && /FAT|NTFS/.test(image.toString('latin1', 0, 90)),
  },
]

/**
 * sfdisk and partx say what is written, not what is on the disk, and of a container of logical partitions all of it.
 *
 * @param {Reading} other @param {Reading} own @param {Buffer} image @returns {Reading}
 */
function onDisk({ parts, ...rest }, own, image) {
  const end = image.length
  const kept = parts.filter(
    ({ start, size }) => start < end && size > 0 && (rest.kind !== 'gpt' || start + size <= end),
  )
  const containers = new Set(
    own.found?.partitions.filter((/** @type {any} */ one) => one.extended).map((/** @type {any} */ one) => one.number),
  )
  return {
    ...rest,
    parts: kept
      .map((part) => ({
        ...part,
        size: Math.min(part.size, end - part.start, containers.has(part.number) ? 1024 : Infinity),
      }))
      .toSorted((a, b) => a.number - b.number),
  }
}

const path = join(folder, 'table')
/** @type {Record<string, number>} */
const seen = {}
const note = (/** @type {string} */ name) => (seen[name] = (seen[name] ?? 0) + 1)
let unexpected = 0
let tables = 0
const end = performance.now() + Number(values.seconds) * 1000

for (
  let index = Number(values.only ?? 0);
  index < (values.only === undefined ? count : Number(values.only) + 1);
  index++
) {
  if (performance.now() > end) break
  tables++
  const image = mutated(index)
  const own = await ours(image)
  note(own.why === undefined ? `ours: ${own.kind}` : 'ours: refused')
  const shown = { ...own, parts: own.parts.filter(({ number }) => number <= 255) }
  /** @type {[string, Reading][]} */
  const others = []
  const byPrograms = !byKernel && index % every === 0
  if (byKernel || byPrograms) writeFileSync(path, image)
  if (byKernel) others.push(['kernel', await bySysfs(path)])
  if (byPrograms)
    others.push(['sfdisk', onDisk(bySfdisk(path), own, image)], ['partx', onDisk(byPartx(path), own, image)])
  for (const [who, other] of others) {
    if (text(shown.parts) === text(other.parts)) {
      note(`${who}: same`)
      continue
    }
    const difference = DIFFERENCES.find(({ of, is }) => of.includes(who) && is(shown, other, image))
    note(`${who}: ${difference?.name ?? 'UNEXPECTED'}`)
    if (difference) continue
    unexpected++
    const kept = join(tmpdir(), `loopctl-fuzz-${seed}-${index}.img`)
    if (unexpected <= 10) writeFileSync(kept, image)
    console.error(
      `seed ${seed}, table ${index}: ${who} has [${text(other.parts).slice(0, 200)}] (${other.kind} ${other.why ?? ''}), we have [${text(shown.parts).slice(0, 200)}] (${own.kind} ${own.why ?? ''})${unexpected <= 10 ? `: ${kept}` : ''}`,
    )
    for (const { message } of own.found?.warnings ?? []) console.error(`  ${message}`)
  }
}
rmSync(folder, { recursive: true, force: true })
console.log(JSON.stringify({ seed, tables, unexpected, seen }))
process.exitCode = unexpected > 0 ? 1 : 0
