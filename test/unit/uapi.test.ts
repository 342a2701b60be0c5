import * as fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  decodeInfo,
  decodeU64,
  encodeConfig,
  formatDevice,
  LO_FLAGS_AUTOCLEAR,
  LO_FLAGS_DIRECT_IO,
  LO_FLAGS_PARTSCAN,
  LO_FLAGS_READ_ONLY,
  LO_NAME_MAX,
  type LoopInfo64,
  majorOf,
  minorOf,
  newInfo,
  newU64,
  patchInfo,
} from '../../lib/kernel/uapi.ts'

/** Where the fields are in struct loop_info64, in bytes: from <linux/loop.h>. */
const FIELDS: Record<keyof LoopInfo64, [from: number, to: number]> = {
  device: [0, 8],
  inode: [8, 16],
  rdevice: [16, 24],
  offset: [24, 32],
  sizeLimit: [32, 40],
  number: [40, 44],
  // lo_encrypt_type, lo_encrypt_key_size
  flags: [52, 56],
  fileName: [56, 120],
  // lo_crypt_name, lo_encrypt_key, lo_init
}
const INFO_SIZE = 232
const CONFIG_SIZE = 304

const u64 = fc.bigInt({ min: 0n, max: 2n ** 64n - 1n })
const u32 = fc.nat(0xffff_ffff)

/** Any text without a zero. */
const text = fc.string({ unit: 'binary', maxLength: 80, size: 'max' }).map((given) => given.replaceAll('\0', '0'))

/** As many whole characters as 63 bytes hold. */
function fitting(given: string): string {
  let fits = ''
  for (const character of given) {
    if (Buffer.byteLength(fits + character) > LO_NAME_MAX) break
    fits += character
  }
  return fits
}

const BYTE_ORDER_MARK = '\uFEFF'

const fileName = text.map(fitting).filter((name) => !name.startsWith(BYTE_ORDER_MARK))
const members = {
  device: u64,
  inode: u64,
  rdevice: u64,
  offset: u64,
  sizeLimit: u64,
  number: u32,
  flags: u32,
  fileName,
}
const info: fc.Arbitrary<LoopInfo64> = fc.record(members)
const change: fc.Arbitrary<Partial<LoopInfo64>> = fc.record(members, { requiredKeys: [] })

const EXTREMES: LoopInfo64 = {
  device: 2n ** 64n - 1n,
  inode: 2n ** 63n,
  rdevice: 1n,
  offset: 2n ** 64n - 2n,
  sizeLimit: 0n,
  number: 0xffff_ffff,
  flags: 0x8000_0000,
  fileName: 'x'.repeat(63),
}

/** makedev(3) of glibc. */
function makedev(major: bigint, minor: bigint): bigint {
  return ((major & 0xffff_f000n) << 32n) | ((major & 0xfffn) << 8n) | ((minor & 0xffff_ff00n) << 12n) | (minor & 0xffn)
}

describe('struct loop_info64', () => {
  test('what is encoded is decoded, over the whole range of every field', () => {
    fc.assert(
      fc.property(info, (given) => {
        expect(decodeInfo(patchInfo(newInfo(), given))).toEqual(given)
      }),
      { examples: [[EXTREMES]] },
    )
  })

  test('a new one is all zeros, of the size of the struct', () => {
    expect(newInfo()).toEqual(new Uint8Array(INFO_SIZE))
    expect(decodeInfo(newInfo())).toEqual({
      device: 0n,
      inode: 0n,
      rdevice: 0n,
      offset: 0n,
      sizeLimit: 0n,
      number: 0,
      flags: 0,
      fileName: '',
    })
  })

  test('the fields are where the kernel has them, in its byte order', () => {
    const given = { ...EXTREMES, sizeLimit: 12_345n, flags: 5, number: 7, fileName: 'tag' }
    const { buffer } = patchInfo(newInfo(), given)
    const [wide, narrow] = [new BigUint64Array(buffer), new Uint32Array(buffer)]
    expect([...wide.subarray(0, 5)]).toEqual([given.device, given.inode, given.rdevice, given.offset, given.sizeLimit])
    expect([...narrow.subarray(10, 14)]).toEqual([7, 0, 0, 5])
    expect(Buffer.from(buffer, 56, 64).toString()).toBe(`tag${'\0'.repeat(61)}`)
  })

  test('a change leaves every other byte as it was', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: INFO_SIZE, maxLength: INFO_SIZE }), change, (before, named) => {
        const bytes = before.slice()
        expect(patchInfo(bytes, named)).toBe(bytes)
        const touched = Object.keys(named).map((name) => FIELDS[name as keyof LoopInfo64])
        const isTouched = (at: number) => touched.some(([from, to]) => at >= from && at < to)
        const others = (array: Uint8Array) => array.filter((_, at) => !isTouched(at))
        expect(others(bytes)).toEqual(others(before))
        expect(decodeInfo(bytes)).toMatchObject(named)
      }),
      { examples: [[new Uint8Array(INFO_SIZE).fill(0xff), {}]] },
    )
  })

  test('a member that is undefined is left as it was', () => {
    const before = patchInfo(newInfo(), EXTREMES)
    const absent = Object.fromEntries(Object.keys(FIELDS).map((name) => [name, undefined]))
    expect(patchInfo(before.slice(), absent as Partial<LoopInfo64>)).toEqual(before)
  })

  test('works in the middle of a larger buffer', () => {
    const around = new Uint8Array(INFO_SIZE + 20).fill(0xaa)
    const bytes = around.subarray(13, 13 + INFO_SIZE)
    patchInfo(bytes.fill(0), EXTREMES)
    expect(decodeInfo(bytes)).toEqual(EXTREMES)
    expect([...around.subarray(0, 13), ...around.subarray(13 + INFO_SIZE)]).toEqual(
      Array.from({ length: 20 }, () => 0xaa),
    )
  })
})

describe('lo_file_name', () => {
  test('63 bytes of UTF-8 survive', () => {
    for (const name of ['x'.repeat(63), `${'é'.repeat(31)}!`, '€'.repeat(21), `${'😀'.repeat(15)}abc`]) {
      expect(Buffer.byteLength(name)).toBe(63)
      expect(decodeInfo(patchInfo(newInfo(), { fileName: name })).fileName).toBe(name)
    }
  })

  test('what is longer is cut between two characters, and a zero ends it', () => {
    fc.assert(
      fc.property(text, (given) => {
        fc.pre(!given.startsWith(BYTE_ORDER_MARK))
        const bytes = patchInfo(newInfo(), { fileName: given })
        expect(decodeInfo(bytes).fileName).toBe(fitting(given))
        expect(bytes[119]).toBe(0)
      }),
      { examples: [['é'.repeat(32)], [`${'x'.repeat(62)}é`], [`${'x'.repeat(60)}😀`], ['x'.repeat(64)]] },
    )
  })

  test('nothing of a longer name before is left', () => {
    const bytes = patchInfo(newInfo(), { fileName: 'x'.repeat(63) })
    patchInfo(bytes, { fileName: 'y' })
    expect(decodeInfo(bytes).fileName).toBe('y')
    expect(bytes.subarray(56, 120)).toEqual(Uint8Array.from({ length: 64 }, (_, at) => (at === 0 ? 0x79 : 0)))
  })

  test('one without a zero at the end is read to the end of the field', () => {
    const bytes = newInfo().fill(0x7a)
    expect(decodeInfo(bytes).fileName).toBe('z'.repeat(64))
  })

  test('one that begins with a byte order mark keeps it', () => {
    const name = `${BYTE_ORDER_MARK}tag`
    expect(decodeInfo(patchInfo(newInfo(), { fileName: name })).fileName).toBe(name)
  })
})

describe('struct loop_config', () => {
  test('block size and info are in it, and the rest is zero', () => {
    fc.assert(
      fc.property(u32, change, (blockSize, named) => {
        const bytes = encodeConfig(blockSize, named)
        expect(bytes).toHaveLength(CONFIG_SIZE)
        expect([...new Uint32Array(bytes.buffer, 0, 2)]).toEqual([0, blockSize])
        expect(bytes.subarray(8, 8 + INFO_SIZE)).toEqual(patchInfo(newInfo(), named))
        expect(bytes.subarray(8 + INFO_SIZE)).toEqual(new Uint8Array(64))
      }),
    )
  })
})

describe('__u64', () => {
  test('is read in the byte order of the machine', () => {
    fc.assert(
      fc.property(u64, (value) => {
        const bytes = newU64()
        new BigUint64Array(bytes.buffer)[0] = value
        expect(decodeU64(bytes)).toBe(value)
      }),
    )
    expect(decodeU64(newU64())).toBe(0n)
  })
})

describe('flags', () => {
  test('are those of <linux/loop.h>', () => {
    expect([LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN, LO_FLAGS_DIRECT_IO]).toEqual([1, 4, 8, 16])
  })
})

describe('device numbers', () => {
  test('of the devices that one meets', () => {
    // as stat(2) has them; the last three are makedev(3) of glibc
    for (const [device, shown] of [
      [0x0n, '0:0'],
      [0x15n, '0:21'],
      [0x700n, '7:0'],
      [0x707n, '7:7'],
      [0x801n, '8:1'],
      [0xfe00n, '254:0'],
      [0x1_0305n, '259:5'],
      [0x10_0800n, '8:256'],
      [0xfff0_07ffn, '7:1048575'],
      [0xffff_ffffn, '4095:1048575'],
      [0x1000_0000_0000n, '4096:0'],
      [0x1_2678_9ab3_45cdn, '74565:1737075661'],
      [0xffff_ffff_ffff_ffffn, '4294967295:4294967295'],
    ] as const) {
      expect(formatDevice(device)).toBe(shown)
    }
  })

  test('major and minor of 32 bits each are told apart', () => {
    fc.assert(
      fc.property(u32, u32, (major, minor) => {
        const device = makedev(BigInt(major), BigInt(minor))
        expect([majorOf(device), minorOf(device), formatDevice(device)]).toEqual([major, minor, `${major}:${minor}`])
      }),
    )
  })
})
