import { spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { createRequire } from 'node:module'
import { constants } from 'node:os'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import { describe, expect } from 'vitest'
import { attach } from '../../lib/index.ts'
import { sysfs, test } from './support.ts'

const MiB = 1 << 20
const { EINVAL } = constants.errno

type Call = (...values: unknown[]) => unknown

/** The addon itself, without anything of lib/ around it; loaded only where there is one. */
function load(): Record<string, Call> {
  return createRequire(import.meta.url)('../../build/Release/loopctl.node') as Record<string, Call>
}

function fixture(name: string): URL {
  return new URL(`fixtures/${name}`, import.meta.url)
}

/** A process of its own, since a crash would take this one along. */
function run(name: string, ...values: string[]): { status: number | null; signal: string | null; output: string } {
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, [fileURLToPath(fixture(name)), ...values], {
    encoding: 'utf8',
  })
  return { status, signal, output: stdout + stderr }
}

describe('the addon', () => {
  test('is loaded by several threads at once, each of which calls and ends', async ({ image }) => {
    await using device = await attach(image('disk', 3 * MiB))
    const workers = Array.from(
      { length: 6 },
      () => new Worker(fixture('calls.mjs'), { workerData: { path: device.path } }),
    )
    const ends = await Promise.all(
      workers.map(async (worker) => {
        // an exception in the worker rejects both
        const [[sizes], [code]] = await Promise.all([once(worker, 'message'), once(worker, 'exit')])
        return { sizes: sizes as unknown, code: code as unknown }
      }),
    )
    expect(ends).toEqual(workers.map(() => ({ sizes: [BigInt(3 * MiB)], code: 0 })))
    expect(sysfs(device.number, 'size')).toBe(String((3 * MiB) / 512))

    // and still works in this one
    const bytes = new Uint8Array(8)
    expect(load()['blkGetSize64Sync']?.(device.fd, bytes)).toBe(0)
    expect(new BigUint64Array(bytes.buffer)[0]).toBe(BigInt(3 * MiB))
  })

  test('a thread that is terminated with calls in flight does not take the process along', async ({ image }) => {
    await using device = await attach(image('disk'))
    const terminated = 'terminated 1\n'.repeat(10)
    expect(run('in-flight.mjs', device.path, 'terminate')).toEqual({ status: 0, signal: null, output: terminated })
  })

  test('a process that exits with calls in flight exits as it wants to', async ({ image }) => {
    await using device = await attach(image('disk'))
    expect(run('in-flight.mjs', device.path, 'exit')).toEqual({ status: 0, signal: null, output: 'exiting\n' })
  })

  test('a buffer that is transferred away while its call is in flight is EFAULT, not written to', async ({ image }) => {
    await using device = await attach(image('disk'))
    const { status, signal, output } = run('transfer.mjs', device.path)
    expect({ status, signal }, output).toEqual({ status: 0, signal: null })
    const EFAULT = -14
    const answers = { blkGetSize64: EFAULT, loopGetStatus64: EFAULT }
    expect(JSON.parse(output)).toEqual(
      Object.entries(answers).map(([name, answer]) => ({ name, answer, left: 0, written: false })),
    )
  })

  test('has every call as a promise and at once', () => {
    // Some have nothing to wait for, as what opens a socket and what asks for threads; some nothing but that.
    const alone = /^(?:uevent|sequence|read|lastCallSync|giveUpSync|leaveSync|waitSync|workersSync)/
    const names = Object.keys(load()).filter((name) => !alone.test(name))
    const promised = names.filter((name) => !name.endsWith('Sync'))
    expect(promised.length).toBeGreaterThan(20)
    expect(names.toSorted()).toEqual(promised.flatMap((name) => [name, `${name}Sync`]).toSorted())
  })

  test('reads into and writes from any bytes', async ({ folder }) => {
    const addon = load()
    const fd = addon['openSync']?.(Buffer.from(`${folder}\0`), 0x410002) as number // O_TMPFILE | O_RDWR
    expect(fd).toBeGreaterThan(2)
    const written = Buffer.alloc(10_000)
    for (let i = 0; i < written.length; i++) written[i] = i % 251
    try {
      expect(await addon['pwrite']?.(fd, written.subarray(0, 6_000), 0n)).toBe(6_000)
      expect(await addon['pwrite']?.(fd, Buffer.from(written.subarray(6_000)), 6_000n)).toBe(4_000)
      const read = Buffer.alloc(9_000, 0xaa)
      // from byte 5000 on there are no more than 5000
      expect(await addon['pread']?.(fd, read.subarray(1_000), 5_000n)).toBe(5_000)
      expect(read.subarray(1_000, 6_000).equals(written.subarray(5_000))).toBe(true)
      for (const rest of [read.subarray(0, 1_000), read.subarray(6_000)]) {
        expect(rest.equals(Buffer.alloc(rest.length, 0xaa))).toBe(true)
      }
      expect(await addon['pread']?.(fd, read, 10_000n)).toBe(0)
      expect(await addon['pread']?.(fd, read.subarray(0, 0), 0n)).toBe(0)
    } finally {
      addon['closeSync']?.(fd)
    }
  })

  test('answers the errno of the kernel as a negative number, and throws for none', async ({ image }) => {
    await using device = await attach(image('disk'))
    const addon = load()
    for (const [name, values, answer] of [
      ['blkSszGet', [device.fd], 512],
      ['blkSszGet', [0x7fff_ffff], -9], // EBADF
      ['blkSszGet', [-1], -9],
      ['loopCtlGetFree', [device.fd], -25], // ENOTTY: not the control node
      ['blkGetSize64', [0x7fff_ffff, new Uint8Array(8)], -9],
    ] as const) {
      expect(addon[`${name}Sync`]?.(...values), name).toBe(answer)
      const promise = addon[name]?.(...values)
      expect(promise).toBeInstanceOf(Promise)
      expect(await promise, name).toBe(answer)
    }
  })

  test('a call that fails leaves the buffer as it was', async () => {
    const addon = load()
    const bytes = new Uint8Array(8).fill(0xaa)
    expect(addon['blkGetSize64Sync']?.(0x7fff_ffff, bytes)).toBe(-9)
    expect(await addon['blkGetSize64']?.(0x7fff_ffff, bytes)).toBe(-9)
    expect(bytes).toEqual(new Uint8Array(8).fill(0xaa))
  })

  test('throws a TypeError for wrong types, and attaches nothing', async ({ image }) => {
    await using device = await attach(image('disk'))
    const { fd } = device
    const addon = load()
    const rows: readonly (readonly [name: string, problem: string, values: readonly unknown[]])[] = [
      ['blkGetSize64', 'a buffer that is too small', [fd, new Uint8Array(7)]],
      ['blkGetSize64', 'a buffer that is too large', [fd, new Uint8Array(9)]],
      ['blkGetSize64', 'an empty buffer', [fd, new Uint8Array()]],
      ['blkGetSize64', 'an array of the right size but another type', [fd, new BigUint64Array(1)]],
      ['blkGetSize64', 'no array', [fd, new ArrayBuffer(8)]],
      ['blkGetSize64', 'no buffer', [fd]],
      ['loopGetStatus64', 'a buffer of another struct', [fd, new Uint8Array(304)]],
      ['loopConfigure', 'a buffer of another struct', [fd, new Uint8Array(232)]],
      ['loopSetStatus64', 'a view of other size than its memory', [fd, new Uint8Array(new ArrayBuffer(232), 8)]],
      ['blkPgAddPartition', 'a number for a bigint', [fd, 1, 0, 512n]],
      ['blkPgAddPartition', 'a number for the other bigint', [fd, 1, 0n, 512]],
      ['blkPgAddPartition', 'a negative bigint', [fd, 1, -1n, 512n]],
      ['blkPgAddPartition', 'a bigint beyond 64 bits', [fd, 1, 0n, 2n ** 64n]],
      ['blkPgAddPartition', 'too few arguments', [fd, 1, 0n]],
      ['blkPgDelPartition', 'a bigint for a number', [fd, 1n]],
      ['blkSszGet', 'a fraction', [fd + 0.5]],
      ['blkSszGet', 'NaN', [Number.NaN]],
      ['blkSszGet', 'infinity', [Number.POSITIVE_INFINITY]],
      ['blkSszGet', 'more than 32 bits', [2 ** 31]],
      ['blkSszGet', 'less than 32 bits', [-(2 ** 31) - 1]],
      ['blkSszGet', 'a text', [String(fd)]],
      ['blkSszGet', 'an object', [{ fd }]],
      ['blkSszGet', 'null', [null]],
      ['blkSszGet', 'nothing', []],
      ['blkSszGet', 'too many arguments', [fd, 0]],
      ['blkRoSet', 'a boolean for a number', [fd, true]],
      ['pageSize', 'too many arguments', [0]],
    ]
    const status = await device.status()
    for (const [name, problem, values] of rows) {
      for (const form of [name, `${name}Sync`]) {
        expect(() => addon[form]?.(...values), `${form} of ${problem}`).toThrow(TypeError)
        // its own, naming the call
        expect(() => addon[form]?.(...values), `${form} of ${problem}`).toThrow(`${name}: `)
      }
    }
    for (const [name, call] of Object.entries(addon)) {
      expect(() => call(Symbol('wrong'), Symbol('wrong')), name).toThrow(TypeError)
    }
    expect(await device.status()).toEqual(status)
  })

  test('tells who sent a signal, and passes it on to the handler', () => {
    const script = `
      const { signalSenderSync, exitAtOnceSync } = require('./build/Release/loopctl.node')
      const { signals } = require('node:os').constants
      const said = [0, 99, signals.SIGUSR2].map((number) => signalSenderSync(number))
      process.on('SIGUSR2', () => {
        said.push(signalSenderSync(signals.SIGUSR2))
        console.log(JSON.stringify(said))
        process.on('exit', () => console.log('too late'))
        exitAtOnceSync(7)
      })
      said.push(signalSenderSync(signals.SIGUSR2), signalSenderSync(signals.SIGUSR2))
      process.kill(process.pid, 'SIGUSR2')
      setTimeout(() => {}, 10_000)`
    const { status, stdout, stderr } = spawnSync(process.execPath, ['-e', script], { encoding: 'utf8' })
    expect({ status, stderr }).toEqual({ status: 7, stderr: '' })
    expect(JSON.parse(stdout)).toEqual([-EINVAL, -EINVAL, -EINVAL, 0, 0, 0])
  })
})
