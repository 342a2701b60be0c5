import { inspect } from 'node:util'
import * as fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  checkBackingFile,
  checkBlockSize,
  checkBoolean,
  checkBytes,
  checkDescriptor,
  checkFunction,
  checkInteger,
  checkLoopNumber,
  checkOptions,
  checkReference,
  checkSignal,
  checkTimeout,
  checkU64,
} from '../../lib/common/arguments.ts'
import { type AttachOptions, attach, find, list, LoopControl, open } from '../../lib/index.ts'
import { checkDeviceRef } from '../../lib/handle/open.ts'

const TYPE = { name: 'TypeError', code: 'ERR_INVALID_ARG_TYPE' }
const VALUE = { name: 'TypeError', code: 'ERR_INVALID_ARG_VALUE' }
const RANGE = { name: 'RangeError', code: 'ERR_OUT_OF_RANGE' }

const MAX = Number.MAX_SAFE_INTEGER

/** What it throws. */
function thrown(call: () => unknown): unknown {
  try {
    call()
  } catch (error) {
    return error
  }
  return expect.fail('it did not throw')
}

/** What is said of a wrong offset. */
function messageFor(offset: unknown): string {
  return (thrown(() => checkBytes('offset', offset)) as Error).message
}

/** What it rejects with; that it throws instead fails the test. */
async function rejection(call: () => Promise<unknown>): Promise<unknown> {
  let promise: Promise<unknown>
  try {
    promise = call()
  } catch (error) {
    return expect.fail(`it threw instead of rejecting: ${String(error)}`)
  }
  return promise.then(
    (value) => expect.fail(`it resolved to ${JSON.stringify(value)}`),
    (error: unknown) => error,
  )
}

describe('options', () => {
  test('none are no options', () => {
    expect(checkOptions<{ a?: number }>(undefined, ['a'])).toEqual({})
  })

  test('members that are undefined count as absent, also unknown ones', () => {
    const given = { a: 1, b: undefined, c: undefined }
    const checked = checkOptions<{ a?: number; b?: undefined }>(given, ['a', 'b'])
    expect(Object.keys(checked)).toEqual(['a'])
  })

  test('false, 0, null and empty strings are present', () => {
    const given = { a: false, b: 0, c: null, d: '' }
    expect(checkOptions(given, ['a', 'b', 'c', 'd'])).toEqual(given)
  })

  test('an unknown name is refused, and named', () => {
    const error = thrown(() => checkOptions({ readonly: true }, ['readOnly' as never]))
    expect(error).toMatchObject({ ...VALUE, message: 'options has no member "readonly"' })
  })

  test('names of Object.prototype are no options', () => {
    for (const name of ['toString', 'constructor', '__proto__']) {
      const given: object = Object.fromEntries([[name, 1]])
      expect(thrown(() => checkOptions(given, []))).toMatchObject(VALUE)
    }
  })

  test('anything but an object is refused', () => {
    for (const value of [null, 1, 'text', true, [], () => {}, 1n]) {
      expect(thrown(() => checkOptions(value as object, []))).toMatchObject(TYPE)
    }
  })
})

describe('Bytes', () => {
  test('number and bigint are the same bytes', () => {
    fc.assert(
      fc.property(fc.maxSafeNat(), (bytes) => {
        expect(checkBytes('offset', bytes)).toBe(BigInt(bytes))
        expect(checkBytes('offset', BigInt(bytes))).toBe(BigInt(bytes))
      }),
    )
  })

  test('0 and Number.MAX_SAFE_INTEGER are the bounds', () => {
    for (const bytes of [0, 0n, -0]) expect(checkBytes('offset', bytes)).toBe(0n)
    for (const bytes of [MAX, BigInt(MAX)]) expect(checkBytes('offset', bytes)).toBe(9_007_199_254_740_991n)
    for (const bytes of [-1, -1n, MAX + 1, BigInt(MAX) + 1n, 2n ** 64n, -(2n ** 63n), Infinity, -Infinity]) {
      expect(
        thrown(() => checkBytes('offset', bytes)),
        String(bytes),
      ).toMatchObject(RANGE)
    }
  })

  test('fractions and NaN are out of range', () => {
    for (const bytes of [0.5, 4096.000001, NaN]) {
      expect(
        thrown(() => checkBytes('offset', bytes)),
        String(bytes),
      ).toMatchObject(RANGE)
    }
  })

  test('other types are refused', () => {
    for (const value of ['4096', true, null, undefined, {}, [4096]]) {
      expect(thrown(() => checkBytes('offset', value))).toMatchObject(TYPE)
    }
  })

  test('the message names the argument and what was given', () => {
    const range = 'offset must be a whole number of bytes from 0 to Number.MAX_SAFE_INTEGER'
    expect(messageFor(-1)).toBe(`${range}, not -1`)
    expect(messageFor(-1n)).toBe(`${range}, not -1n`)
    expect(messageFor('a "b"')).toBe('offset must be a number or bigint, not "a \\"b\\""')
    expect(messageFor('x'.repeat(50))).toBe(`offset must be a number or bigint, not "${'x'.repeat(40)}..."`)
    expect(messageFor(null)).toBe('offset must be a number or bigint, not null')
    expect(messageFor({})).toBe('offset must be a number or bigint, not a value of type object')
  })
})

describe('numbers', () => {
  test('checkInteger has both bounds in it', () => {
    fc.assert(
      fc.property(fc.integer(), fc.nat(), fc.integer(), (min, span, value) => {
        const max = min + span
        const check = () => checkInteger('n', value, min, max)
        if (value >= min && value <= max) expect(check()).toBe(value)
        else expect(thrown(check)).toMatchObject(RANGE)
      }),
    )
    for (const value of [3, 7]) expect(checkInteger('n', value, 3, 7)).toBe(value)
    for (const value of [2, 8, 3.5, NaN, Infinity]) {
      expect(thrown(() => checkInteger('n', value, 3, 7))).toMatchObject(RANGE)
    }
    for (const value of ['3', 3n, null, undefined, true]) {
      expect(thrown(() => checkInteger('n', value, 3, 7))).toMatchObject(TYPE)
    }
  })

  test('timeouts and descriptors fit 31 bits, loop numbers 20', () => {
    for (const [check, max] of [
      [checkTimeout, 0x7fff_ffff],
      [(value: unknown) => checkDescriptor('fd', value), 0x7fff_ffff],
      [checkLoopNumber, 1_048_575],
    ] as const) {
      expect([check(0), check(max)]).toEqual([0, max])
      for (const value of [-1, max + 1, 0.5]) expect(thrown(() => check(value))).toMatchObject(RANGE)
      expect(thrown(() => check('0'))).toMatchObject(TYPE)
    }
  })

  test('a block size is a power of two from 512 to the maximum', () => {
    const good = [512, 1024, 2048, 4096]
    for (const value of good) expect(checkBlockSize('blockSize', value, 4096)).toBe(value)
    for (const value of [0, -512, 1, 256, 511, 513, 1000, 4095, 8192, 512.5, NaN, Infinity, 2 ** 40]) {
      expect(
        thrown(() => checkBlockSize('blockSize', value, 4096)),
        String(value),
      ).toMatchObject(RANGE)
    }
    for (const value of ['512', 512n, null, undefined]) {
      expect(thrown(() => checkBlockSize('blockSize', value, 4096))).toMatchObject(TYPE)
    }
  })

  test('a u64 is a bigint, with a maximum where there is one', () => {
    fc.assert(
      fc.property(fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }), (value) => {
        expect(checkU64('inode', value)).toBe(value)
      }),
    )
    for (const value of [-1n, 2n ** 64n]) expect(thrown(() => checkU64('inode', value))).toMatchObject(RANGE)
    expect(checkU64('offset', 2n ** 63n - 1n, 2n ** 63n - 1n)).toBe(2n ** 63n - 1n)
    expect(thrown(() => checkU64('offset', 2n ** 63n, 2n ** 63n - 1n))).toMatchObject(RANGE)
    for (const value of [0, '0', null, undefined]) {
      expect(thrown(() => checkU64('inode', value))).toMatchObject(TYPE)
    }
  })
})

describe('other values', () => {
  test('a boolean is true or false', () => {
    expect([checkBoolean('readOnly', true), checkBoolean('readOnly', false)]).toEqual([true, false])
    for (const value of [0, 1, 'true', null, undefined, Object(true)]) {
      expect(thrown(() => checkBoolean('readOnly', value))).toMatchObject(TYPE)
    }
  })

  test('a reference has at most 63 bytes of UTF-8, and no zero', () => {
    for (const text of ['', 'x', 'x'.repeat(63), `${'é'.repeat(31)}!`, '€'.repeat(21)]) {
      expect(checkReference(text)).toBe(text)
    }
    for (const text of ['x'.repeat(64), 'é'.repeat(32), `${'€'.repeat(21)}!`, '😀'.repeat(16)]) {
      expect(
        thrown(() => checkReference(text)),
        text,
      ).toMatchObject(RANGE)
    }
    for (const text of ['\0', 'a\0b']) expect(thrown(() => checkReference(text))).toMatchObject(VALUE)
    for (const value of [1, null, undefined, Buffer.from('x')]) {
      expect(thrown(() => checkReference(value))).toMatchObject(TYPE)
    }
  })

  test('a signal is an AbortSignal', () => {
    const { signal } = new AbortController()
    expect(checkSignal(signal)).toBe(signal)
    for (const value of [null, undefined, {}, new AbortController(), new EventTarget(), 'abort']) {
      expect(thrown(() => checkSignal(value))).toMatchObject(TYPE)
    }
  })

  test('a function is a function', () => {
    expect(checkFunction('onProgress', thrown)).toBe(thrown)
    for (const value of [null, {}, 'call']) {
      expect(thrown(() => checkFunction('onProgress', value))).toMatchObject(TYPE)
    }
  })
})

describe('a backing file', () => {
  test('is a path, a file URL, a descriptor or what has one', () => {
    const bytes = Buffer.from([0x2f, 0xff, 0xfe])
    expect(checkBackingFile('relative')).toEqual({ path: 'relative' })
    expect(checkBackingFile(bytes)).toEqual({ path: bytes })
    expect(checkBackingFile(new URL('file:///a%20b/%C3%A9'))).toEqual({ path: '/a b/é' })
    expect(checkBackingFile(0)).toEqual({ fd: 0 })
    expect(checkBackingFile({ fd: 7 })).toEqual({ fd: 7 })
  })

  test('is not empty, and has no zero byte', () => {
    for (const value of ['', Buffer.alloc(0), 'a\0b', Buffer.from('a\0b'), new URL('file:///a%00b')]) {
      expect(thrown(() => checkBackingFile(value))).toMatchObject(VALUE)
    }
  })

  test('another URL is refused with Node’s own code', () => {
    for (const url of ['http://localhost/a', 'file://elsewhere/a']) {
      const error = thrown(() => checkBackingFile(new URL(url)))
      expect(error).toBeInstanceOf(TypeError)
      expect(error).toHaveProperty('code', expect.stringMatching(/^ERR_INVALID_(?:URL_SCHEME|FILE_URL_HOST)$/))
    }
  })

  test('other types are refused', () => {
    for (const value of [
      null,
      undefined,
      true,
      1n,
      {},
      [],
      new Uint8Array(1),
      { path: '/a' },
      { fd: '7' },
      { fd: null },
    ]) {
      expect(thrown(() => checkBackingFile(value))).toMatchObject(TYPE)
    }
    for (const value of [-1, 1.5, NaN, 2 ** 31, { fd: -1 }]) {
      expect(thrown(() => checkBackingFile(value))).toMatchObject(RANGE)
    }
  })
})

describe('a device', () => {
  test('is a number, a name, a path or an identity', () => {
    for (const ref of [7, 'loop7', '/dev/loop7', { number: 7 }, { number: 7, diskSeq: undefined }]) {
      expect(checkDeviceRef(ref)).toEqual({ number: 7 })
      expect(Object.keys(checkDeviceRef(ref))).toEqual(['number'])
    }
    expect(checkDeviceRef({ number: 7, diskSeq: 12, path: '/dev/loop9' })).toEqual({ number: 7, diskSeq: 12 })
    expect([0, 'loop0', '/dev/loop0'].map(checkDeviceRef)).toEqual([{ number: 0 }, { number: 0 }, { number: 0 }])
    expect([1_048_575, '/dev/loop1048575'].map(checkDeviceRef)).toEqual([{ number: 1_048_575 }, { number: 1_048_575 }])
  })

  test('or the path of a link, which is looked up', async () => {
    expect(checkDeviceRef('/dev/disk/by-label/root')).toEqual({ link: '/dev/disk/by-label/root' })
    expect(await rejection(() => open('/dev/null'))).toMatchObject({ reason: 'not-a-loop-device', path: '/dev/null' })
    expect(await rejection(() => open('/nowhere/x'))).toMatchObject({ reason: 'no-such-device', path: '/nowhere/x' })
  })

  test('every number has its name and its path', () => {
    fc.assert(
      fc.property(fc.nat(1_048_575), (number) => {
        expect(checkDeviceRef(`loop${number}`)).toEqual({ number })
        expect(checkDeviceRef(`/dev/loop${number}`)).toEqual({ number })
      }),
    )
  })

  const refused: [value: unknown, error: typeof TYPE][] = [
    ['/dev/loop07', VALUE],
    ['loop00', VALUE],
    ['loop7p1', VALUE],
    ['/dev/loop7p1', VALUE],
    ['/dev/loop-control', VALUE],
    ['', VALUE],
    ['loop', VALUE],
    ['7', VALUE],
    ['../loop7', VALUE],
    ['/dev/loop7\n', VALUE],
    [' loop7', VALUE],
    ['/dev/loop٧', VALUE],
    [-1, RANGE],
    [1_048_576, RANGE],
    ['/dev/loop1048576', RANGE],
    [`loop${'9'.repeat(30)}`, RANGE],
    [1.5, RANGE],
    [NaN, RANGE],
    [{ number: -1 }, RANGE],
    [{ number: 7, diskSeq: -1 }, RANGE],
    [{ number: 7, diskSeq: MAX + 1 }, RANGE],
    [{ number: '7' }, TYPE],
    [{ number: 7, diskSeq: '12' }, TYPE],
    [{ number: 7, diskSeq: null }, TYPE],
    [{}, TYPE],
    [[], TYPE],
    [null, TYPE],
    [undefined, TYPE],
    [7n, TYPE],
    [true, TYPE],
  ]
  for (const [value, error] of refused) {
    const shown = typeof value === 'bigint' ? '7n' : JSON.stringify(value)
    test(`is not ${shown}: open rejects with ${error.code}`, async () => {
      expect(thrown(() => checkDeviceRef(value))).toMatchObject(error)
      expect(await rejection(() => open(value as string))).toMatchObject(error)
    })
  }
})

describe('attach', () => {
  // Were it opened first, the error would be no-such-file.
  const MISSING = '/nonexistent/loopctl'

  const wrong: [options: Record<string, unknown>, error: typeof TYPE][] = [
    [{ readonly: true }, VALUE],
    [{ directIo: true }, VALUE],
    [{ size: 1 }, VALUE],
    [{ overlap: 'perhaps' }, VALUE],
    [{ reference: 'a\0b' }, VALUE],
    [{ reference: '\ud800' }, VALUE],
    [{ readOnly: 1 }, TYPE],
    [{ readOnly: null }, TYPE],
    [{ offset: '4096' }, TYPE],
    [{ offset: null }, TYPE],
    [{ sizeLimit: true }, TYPE],
    [{ blockSize: '512' }, TYPE],
    [{ blockSize: 512n }, TYPE],
    [{ directIO: 'yes' }, TYPE],
    [{ directIO: 1 }, TYPE],
    [{ partscan: 'yes' }, TYPE],
    [{ autoclear: 0 }, TYPE],
    [{ number: '7' }, TYPE],
    [{ number: 7n }, TYPE],
    [{ reference: 7 }, TYPE],
    [{ signal: {} }, TYPE],
    [{ signal: new AbortController() }, TYPE],
    [{ timeout: '5' }, TYPE],
    [{ offset: -1 }, RANGE],
    [{ offset: -1n }, RANGE],
    [{ offset: 0.5 }, RANGE],
    [{ offset: MAX + 1 }, RANGE],
    [{ sizeLimit: BigInt(MAX) + 1n }, RANGE],
    [{ blockSize: 1000 }, RANGE],
    [{ blockSize: 256 }, RANGE],
    [{ blockSize: 131_072 }, RANGE],
    [{ number: -1 }, RANGE],
    [{ number: 1_048_576 }, RANGE],
    [{ reference: 'x'.repeat(64) }, RANGE],
    [{ timeout: -1 }, RANGE],
    [{ timeout: 2 ** 31 }, RANGE],
    [{ timeout: Infinity }, RANGE],
  ]
  for (const [options, error] of wrong) {
    const [[name, value] = []] = Object.entries(options)
    test(`${name}: ${inspect(value).slice(0, 30)} is ${error.code}, before the file is looked at`, async () => {
      expect(await rejection(() => attach(MISSING, options as AttachOptions))).toMatchObject(error)
    })
  }

  test('a signal that is null, 0, false or empty is refused as well', async () => {
    for (const signal of [null, 0, false, '']) {
      expect(await rejection(() => attach(MISSING, { signal: signal as never })), String(signal)).toMatchObject(TYPE)
      expect(await rejection(() => open(1_048_575, { signal: signal as never })), String(signal)).toMatchObject(TYPE)
    }
  })

  test('options that are none at all', async () => {
    for (const options of [null, 1, 'x', []]) {
      expect(await rejection(() => attach(MISSING, options as AttachOptions))).toMatchObject(TYPE)
    }
  })

  test('a file that is none', async () => {
    for (const file of [null, undefined, {}, true]) {
      expect(await rejection(() => attach(file as string))).toMatchObject(TYPE)
    }
    for (const file of ['', 'a\0b']) expect(await rejection(() => attach(file))).toMatchObject(VALUE)
    for (const file of [-1, { fd: -1 }]) expect(await rejection(() => attach(file))).toMatchObject(RANGE)
  })

  test('with every option undefined it gets as far as the file', async () => {
    const options: Required<AttachOptions> = {
      readOnly: undefined,
      offset: undefined,
      sizeLimit: undefined,
      blockSize: undefined,
      directIO: undefined,
      partscan: undefined,
      partition: undefined,
      createNode: undefined,
      autoclear: undefined,
      number: undefined,
      overlap: undefined,
      swappable: undefined,
      lock: undefined,
      reference: undefined,
      signal: undefined,
      timeout: undefined,
    }
    // Where there is no loop driver for this system that is the error: no wrong argument either.
    const reason = process.platform === 'linux' ? 'no-such-file' : 'unsupported-platform'
    expect(await rejection(() => attach(MISSING, options))).toMatchObject({ name: 'LoopError', reason })
  })
})

describe('open, find and list', () => {
  test('unknown option names are refused', async () => {
    expect(await rejection(() => open(7, { timeOut: 1 } as object))).toMatchObject(VALUE)
    expect(await rejection(() => list({ All: true } as object))).toMatchObject(VALUE)
  })

  test('options of a wrong type are refused', async () => {
    expect(await rejection(() => open(7, { signal: {} as AbortSignal }))).toMatchObject(TYPE)
    expect(await rejection(() => open(7, null as never))).toMatchObject(TYPE)
    for (const all of [1, 'yes', null]) {
      expect(await rejection(() => list({ all: all as never }))).toMatchObject(TYPE)
    }
    expect(await rejection(() => list(true as never))).toMatchObject(TYPE)
  })

  test('what cannot be found is refused', async () => {
    for (const what of [null, undefined, {}, true, { reference: 7 }, { reference: undefined }, { fd: 'x' }]) {
      expect(await rejection(() => find(what as string)), JSON.stringify(what)).toMatchObject(TYPE)
    }
    for (const what of ['', 'a\0b', { reference: '\0' }]) {
      expect(await rejection(() => find(what)), JSON.stringify(what)).toMatchObject(VALUE)
    }
    for (const what of [-1, { fd: 1.5 }, { reference: 'x'.repeat(64) }]) {
      expect(await rejection(() => find(what)), JSON.stringify(what)).toMatchObject(RANGE)
    }
  })
})

describe('LoopControl', () => {
  // Not opened: whatever it did beyond looking at its arguments would be another TypeError, without a code.
  const control = Object.create(LoopControl.prototype) as LoopControl

  test('add and remove refuse what is no number of a device', async () => {
    for (const number of ['7', 7n, null, {}]) {
      expect(await rejection(() => control.add(number as number))).toMatchObject(TYPE)
      expect(await rejection(() => control.remove(number as number))).toMatchObject(TYPE)
    }
    for (const number of [-1, 1_048_576, 1.5, NaN]) {
      expect(await rejection(() => control.add(number))).toMatchObject(RANGE)
      expect(await rejection(() => control.remove(number))).toMatchObject(RANGE)
    }
    expect(await rejection(() => control.remove(undefined as never))).toMatchObject(TYPE)
  })

  test('remove refuses wrong options', async () => {
    for (const [options, error] of [
      [{ force: true }, VALUE],
      [{ timeout: '1' }, TYPE],
      [{ signal: {} }, TYPE],
      [null, TYPE],
      [{ timeout: -1 }, RANGE],
    ] as const) {
      expect(await rejection(() => control.remove(7, options as object))).toMatchObject(error)
    }
  })
})
