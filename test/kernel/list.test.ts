import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach, list, LoopControl, type LoopInfo } from '../../lib/index.ts'
import { readInfo } from '../../lib/observe/list.ts'
import { sysfs, test, unusedNumber } from './support.ts'

const ROUNDS = 200

type Read = (...lists: unknown[]) => Buffer | Promise<Buffer>

const addon = createRequire(import.meta.url)('../../build/Release/loopctl.node') as Record<
  'sysfsRead' | 'sysfsReadSync',
  Read
>

function texts(...values: string[]): Buffer {
  return Buffer.from(values.map((value) => `${value}\0`).join(''))
}

/** What comes back: the bytes of each file, or its negative errno. */
function decode(answer: Buffer): (string | number)[] {
  const { buffer, byteOffset, byteLength } = answer
  const view = new DataView(buffer, byteOffset, byteLength)
  const found: (string | number)[] = []
  for (let at = 0; at < byteLength;) {
    const length = view.getInt32(at, new Uint8Array(new Uint16Array([1]).buffer)[0] === 1)
    at += 4
    found.push(length < 0 ? length : answer.toString('utf8', at, at + length))
    at += Math.max(0, length)
  }
  return found
}

const ENOENT = -2
const EISDIR = -21
const ENAMETOOLONG = -36

describe('sysfsRead', () => {
  for (const name of ['sysfsRead', 'sysfsReadSync'] as const) {
    const read = async (...lists: Buffer[]) => decode(await addon[name](...lists))

    test(`${name}: the files as they are, in the order asked for`, async ({ image }) => {
      await using device = await attach(image('disk'))
      await using other = await attach(image('other'), { readOnly: true })
      const directories = [device, other].map(({ number }) => `/sys/block/loop${number}`)
      const files = ['loop/backing_file', 'size', 'ro', 'uevent', 'size']
      expect(await read(texts(...directories), texts(...files))).toEqual(
        directories.flatMap((directory) => files.map((file) => readFileSync(join(directory, file), 'utf8'))),
      )
      expect(await read(texts(), texts('size'))).toEqual([])
      expect(await read(texts('/sys/block'), texts())).toEqual([])
    })

    test(`${name}: for what cannot be read the errno, and the others all the same`, async ({ image }) => {
      const number = unusedNumber()
      await using control = await LoopControl.open()
      await control.add(number)
      await control.remove(number)
      await using device = await attach(image('disk'))
      const directories = texts(`/sys/block/loop${number}`, `/sys/block/loop${device.number}`)
      expect(await read(directories, texts('size', 'nothing', 'loop'))).toEqual([
        ENOENT,
        ENOENT,
        ENOENT,
        '2048\n',
        ENOENT,
        EISDIR,
      ])
    })

    test(`${name}: a TypeError for wrong arguments`, () => {
      const given = texts('size')
      for (const lists of [
        [],
        [given],
        [given, given, given],
        [given, 'size\0'],
        ['/sys\0', given],
        [given, Buffer.from('not ended')],
        [Buffer.from('not ended'), given],
        [given, new Uint16Array(1)],
        [given, new ArrayBuffer(1)],
        [given, null],
      ]) {
        expect(() => addon[name](...lists)).toThrow(TypeError)
        expect(() => addon[name](...lists)).toThrow('sysfsRead: ')
      }
    })
  }

  test('the lists may be changed while it is under way', async () => {
    const [directories, names] = [texts('/sys/kernel'), texts('fscaps')]
    const answer = addon.sysfsRead(directories, names)
    directories.fill(0xff)
    names.fill(0xff)
    expect(decode(await answer)).toEqual([readFileSync('/sys/kernel/fscaps', 'utf8')])
  })
})

describe('list', () => {
  test('a path that is too long for sysfs: attached, without a path', async ({ folder }) => {
    const deep = (name: string) => join(folder, name, ...Array.from({ length: 9 }, () => 'd'.repeat(250)))
    for (const name of ['a', 'b']) mkdirSync(deep(name), { recursive: true })
    const file = join(deep('b'), 'disk')
    writeFileSync(file, Buffer.alloc(4096))
    await using device = await attach(file)
    const moved = join(deep('a'), 'b')
    renameSync(join(folder, 'b'), moved)
    try {
      const files = await addon.sysfsRead(texts(`/sys/block/loop${device.number}/loop`), texts('backing_file'))
      expect(decode(files)).toEqual([ENAMETOOLONG])
      const row = (await list()).find(({ number }) => number === device.number)
      expect(row).toMatchObject({ attached: true, backingFile: null, backingDeleted: false, size: 4096 })
    } finally {
      renameSync(moved, join(folder, 'b'))
    }
    expect((await device.status()).backingFile).toBe(file)
  })

  test('without a descriptor to be had it rejects, and says of no device that it is free or gone', async ({
    image,
  }) => {
    await using device = await attach(image('disk'))
    // One is left: for a directory, and not for a file in it.
    const script = `
      import { closeSync, openSync } from 'node:fs'
      import { list, LoopError } from './dist/index.js'
      const before = await list()
      const taken = []
      try { for (;;) taken.push(openSync('/dev/null')) } catch {}
      closeSync(taken.pop())
      const answer = await list().catch((error) => error)
      for (const fd of taken) closeSync(fd)
      console.log(JSON.stringify([before.map(({ number }) => number), LoopError.is(answer, 'resources'), answer.code]))`
    const output = execFileSync(
      'bash',
      ['-c', 'ulimit -n 128 && exec "$@"', 'bash', process.execPath, '--input-type=module', '-e', script],
      { encoding: 'utf8' },
    )
    expect(JSON.parse(output)).toEqual([expect.arrayContaining([device.number]), true, 'EMFILE'])
  })

  test('a name with bytes of its own: newlines, and letters of other alphabets', async ({ image }) => {
    const file = image('дискета\n\n')
    await using device = await attach(file)
    expect((await list()).find(({ number }) => number === device.number)?.backingFile).toBe(file)
  })

  test('each row is of one attachment, while devices come and go', async ({ folder, image }) => {
    // One device, attached to files of different sizes in turn
    const number = unusedNumber()
    const files = Array.from({ length: 4 }, (_, i) => image(`disk-${i}`, (i + 1) * 4096))
    const known = new Map<number | undefined, { file: string | undefined; size: number }>()
    const rows: LoopInfo[] = []
    const state = { isOver: false }
    const churn = async () => {
      for (let i = 0; i < ROUNDS; i++) {
        const file = files[i % files.length]
        await using device = await attach(file ?? '', { number, overlap: 'allow', readOnly: i % 2 === 0 })
        known.set(device.ref.diskSeq, { file, size: ((i % files.length) + 1) * 4096 })
        if (i === 0) expect(sysfs(number, 'loop/backing_file')).toBe(file)
      }
      state.isOver = true
    }
    const look = async () => {
      for (let i = 0; !state.isOver; i++) {
        const seen = i % 20 === 0 ? await list() : [await readInfo(number)]
        rows.push(...seen.filter((row) => row !== undefined).filter((row) => row.backingFile?.startsWith(folder)))
      }
    }
    await using control = await LoopControl.open()
    try {
      await Promise.all([churn(), look()])
      expect(known.size).toBe(ROUNDS)
      expect(rows.length).toBeGreaterThan(0)
      for (const { diskSeq, backingFile, size, readOnly } of rows) {
        const { file, size: whole } = known.get(diskSeq) ?? {}
        expect({ diskSeq, backingFile }).toEqual({ diskSeq, backingFile: file })
        // Set after the file, by the same LOOP_CONFIGURE
        expect([0, whole]).toContain(size)
        if (size !== 0) expect(readOnly).toBe(files.indexOf(backingFile ?? '') % 2 === 0)
      }
    } finally {
      await control.remove(number)
    }
  })
})
