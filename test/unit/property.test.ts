/**
 * Every public function with arguments of every shape. What is wrong is judged here by the documented API, not by the
 * library's own checks: a TypeError or RangeError with one of Node's codes, and no system call before it.
 */

import { closeSync, openSync } from 'node:fs'
import { pathToFileURL } from 'node:url'
import * as fc from 'fast-check'
import { afterEach, describe, expect, test } from 'vitest'
import * as loopctl from '../../lib/index.ts'
import * as ioctl from '../../lib/ioctl.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'

const { LoopControl, LoopDevice, LoopError } = loopctl

type Code = 'ERR_INVALID_ARG_TYPE' | 'ERR_INVALID_ARG_VALUE' | 'ERR_OUT_OF_RANGE'
const TYPE = 'ERR_INVALID_ARG_TYPE'
const VALUE = 'ERR_INVALID_ARG_VALUE'
const RANGE = 'ERR_OUT_OF_RANGE'
const CLASSES: Record<Code, typeof TypeError> = { [TYPE]: TypeError, [VALUE]: TypeError, [RANGE]: RangeError }

// ── what is right, and what is wrong

/** A value that an argument must not have, and the codes that may be the answer. */
interface Wrong {
  value: unknown
  codes: Code[]
}

/** What an argument can be: values that are right, and values that are wrong. */
interface Kind {
  right: fc.Arbitrary<unknown>
  wrong: fc.Arbitrary<Wrong>
  /** The members that it is asked for, where it can be an object. */
  asked?: string[]
}

/** Looks like `value` to whoever converts it. */
function convertible(value: unknown): fc.Arbitrary<unknown> {
  return fc.constantFrom<unknown>(
    { valueOf: () => value, toString: () => value },
    { [Symbol.toPrimitive]: () => value },
    [value],
    () => value,
    Object(value),
  )
}

function refuse(): never {
  throw new Error('nobody may ask for it')
}

/** Of every type, and nothing in them that an argument could want. */
const junk = fc.oneof(
  fc.constantFrom<unknown>(
    undefined,
    null,
    true,
    false,
    0,
    -0,
    -1,
    0.5,
    NaN,
    Infinity,
    -Infinity,
    Number.MAX_VALUE,
    Number.MIN_VALUE,
    Number.MAX_SAFE_INTEGER + 1,
    2 ** 31,
    2 ** 32,
    0n,
    -1n,
    2n ** 53n,
    2n ** 63n,
    2n ** 64n,
    2n ** 200n,
    '',
    '\0',
    'a\0b',
    '\ud800',
    'x\udfff',
    '4096',
    'true',
    '__proto__',
    Symbol('wrong'),
    Symbol.iterator,
    [],
    [512],
    {},
    Object.create(null),
    new Date(0),
    new Map(),
    /x/,
    new Error('an error'),
    Promise.resolve(1),
    new AbortController(),
    new EventTarget(),
    new Uint8Array(8),
    new ArrayBuffer(8),
    Map,
    refuse,
  ),
  fc.double(),
  fc.bigInt(),
  fc.string({ unit: 'binary' }),
  fc.anything({ withBigInt: true, withBoxedValues: true, withNullPrototype: true, withTypedArray: true, maxDepth: 1 }),
  fc.oneof(convertible(512), convertible('/image'), convertible(true), convertible(512n)),
  fc.constantFrom<object>(
    { toString: refuse, valueOf: refuse, [Symbol.toPrimitive]: refuse, toJSON: refuse },
    new Proxy({}, {}),
    new Proxy(() => {}, {}),
  ),
)

/** `judge` answers nothing for what is right. */
function kind(
  right: fc.Arbitrary<unknown>,
  near: fc.Arbitrary<unknown>,
  judge: (value: unknown) => Code[] | undefined,
): Kind {
  const wrong = fc
    .oneof(near, junk)
    .map((value) => ({ value, codes: judge(value) ?? [] }))
    .filter(({ codes }) => codes.length > 0)
  return { right, wrong }
}

const boolean = kind(fc.boolean(), fc.constantFrom(0, 1, 'true', ''), (value) =>
  typeof value === 'boolean' ? undefined : [TYPE],
)

function integer(min: number, max: number): Kind {
  const edges = fc.constantFrom(min, max, ...(min <= 0 ? [-0] : []))
  return kind(
    fc.oneof(fc.integer({ min, max }), edges),
    fc.constantFrom(min - 1, max + 1, min + 0.5, BigInt(min), String(min), String(max)),
    (value) => {
      if (typeof value !== 'number') return [TYPE]
      return Number.isInteger(value) && value >= min && value <= max ? undefined : [RANGE]
    },
  )
}

function bigint(max: bigint): Kind {
  return kind(
    fc.oneof(fc.bigInt({ min: 0n, max }), fc.constantFrom(0n, max)),
    fc.constantFrom(-1n, max + 1n, Number(max), 0),
    (value) => {
      if (typeof value !== 'bigint') return [TYPE]
      return value >= 0n && value <= max ? undefined : [RANGE]
    },
  )
}

const MAX = Number.MAX_SAFE_INTEGER

const bytes = kind(
  fc.oneof(fc.maxSafeNat(), fc.maxSafeNat().map(BigInt), fc.constantFrom(0, -0, 0n, MAX, BigInt(MAX))),
  fc.constantFrom(-1, -1n, MAX + 1, BigInt(MAX) + 1n, 0.5, '4096', '4K'),
  (value) => {
    if (typeof value === 'bigint') return value >= 0n && value <= BigInt(MAX) ? undefined : [RANGE]
    if (typeof value !== 'number') return [TYPE]
    return Number.isSafeInteger(value) && value >= 0 ? undefined : [RANGE]
  },
)

// What is more than the page size and no more than 65 536 depends on the machine, and on the kernel.
const blockSize = kind(
  fc.constantFrom(512, 1024, 2048, 4096),
  fc.constantFrom(0, 1, 256, 511, 513, 1536, 4095, 131_072, 2 ** 32 + 512, 2 ** 40, -512, -4096, 512.5, 512n, '512'),
  (value) => {
    if (typeof value !== 'number') return [TYPE]
    return [512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536].includes(value) ? undefined : [RANGE]
  },
)

const tag = kind(
  fc.string({ unit: 'grapheme', maxLength: 63 }).filter((text) => Buffer.byteLength(text) <= 63 && !/\0/.test(text)),
  fc.oneof(
    fc.string({ unit: 'grapheme', minLength: 64, maxLength: 300 }),
    fc.constantFrom('x'.repeat(64), 'é'.repeat(32), 'a\0', '\ud83d', '\ude00\ud83d', 'x'.repeat(100_000)),
  ),
  (value) => {
    if (typeof value !== 'string') return [TYPE]
    const codes: Code[] = []
    if (value.includes('\0') || /\p{Surrogate}/u.test(value)) codes.push(VALUE)
    if (Buffer.byteLength(value) > 63) codes.push(RANGE)
    return codes.length > 0 ? codes : undefined
  },
)

function oneOf(...words: unknown[]): Kind {
  const near = fc.constantFrom(...words.map((word) => `${String(word)} `), ...words.map((word) => [word]))
  return kind(fc.constantFrom(...words), near, (value) => (words.includes(value) ? undefined : [TYPE, VALUE]))
}

const signal = kind(
  fc.constantFrom(new AbortController().signal, AbortSignal.any([])),
  fc.constantFrom<unknown>(
    { aborted: false },
    { aborted: true },
    { aborted: false, addEventListener: () => {} },
    { aborted: false, addEventListener: true, removeEventListener: true, throwIfAborted: true, reason: undefined },
    AbortSignal,
    new AbortController(),
  ),
  (value) => (value instanceof AbortSignal ? undefined : [TYPE]),
)

const callback = kind(
  fc.constantFrom(() => {}, refuse),
  fc.constantFrom({}, 'log'),
  (value) => (typeof value === 'function' ? undefined : [TYPE]),
)

const descriptor = integer(0, 0x7fff_ffff)
const deviceNumber = integer(0, 1_048_575)
const timeout = integer(0, 0x7fff_ffff)

const path = fc.string({ unit: 'grapheme', minLength: 1 }).filter((text) => !text.includes('\0'))

const withDescriptor = (value: unknown) => ({ fd: value })

const backingFile: Kind = {
  asked: ['fd'],
  right: fc.oneof(
    path,
    path.map((text) => Buffer.from(text)),
    fc.constantFrom(Buffer.from([0xff, 0xfe]), new URL('file:///a%20b/%C3%A9?query#hash')),
    path.map((text) => pathToFileURL(text)),
    descriptor.right,
    descriptor.right.map(withDescriptor),
    descriptor.right.map((fd) => Object.assign(Object.create({ path: '/image' }) as object, { fd })),
  ),
  wrong: fc.oneof(
    descriptor.wrong.filter(({ value }) => typeof value === 'number'),
    descriptor.wrong.map(({ value, codes }) => ({ value: withDescriptor(value), codes })),
    fc
      .constantFrom('', Buffer.alloc(0), 'a\0b', Buffer.from('a\0'), new URL('file:///a%00b'))
      .map((value) => ({ value, codes: [VALUE] as Code[] })),
    fc.string().map((text) => ({ value: `${text}\0`, codes: [VALUE] as Code[] })),
    fc
      .constantFrom('file:///%ff', 'file:///a%', 'file:///%C3', 'file:///%ED%A0%80')
      .map((text) => ({ value: new URL(text), codes: [VALUE] as Code[] })),
    junk
      .filter((value) => !['number', 'string'].includes(typeof value) && !Buffer.isBuffer(value) && !has(value, 'fd'))
      .map((value) => ({ value, codes: [TYPE] as Code[] })),
    fc
      .constantFrom<unknown>(new String('/image'), Symbol('/image'), { path: '/image' }, new Uint8Array([0x2f, 0x61]))
      .map((value) => ({ value, codes: [TYPE] as Code[] })),
  ),
}

function has(value: unknown, name: string): boolean {
  return typeof value === 'object' && value !== null && name in value
}

const diskSeq = integer(0, MAX)
const absent = fc.constant(undefined)

const deviceRef: Kind = {
  asked: ['number'],
  right: fc.oneof(
    deviceNumber.right,
    deviceNumber.right.map((number) => `loop${Number(number)}`),
    deviceNumber.right.map((number) => `/dev/loop${Number(number)}`),
    fc.record(
      { number: deviceNumber.right, diskSeq: fc.oneof(diskSeq.right, absent), path: fc.anything() },
      { requiredKeys: ['number'] },
    ),
  ),
  wrong: fc.oneof(
    deviceNumber.wrong.filter(({ value }) => typeof value !== 'string' && !has(value, 'number')),
    deviceNumber.wrong.map(({ value, codes }) => ({ value: { number: value }, codes })),
    diskSeq.wrong
      .filter(({ value }) => value !== undefined)
      .map(({ value, codes }) => ({ value: { number: 7, diskSeq: value }, codes })),
    fc
      .oneof(
        fc.string({ unit: 'binary' }),
        fc.constantFrom('7', 'loop', 'loop07', '/dev/loop7p1', '/dev/loop-control', 'loop7\n', '../loop7'),
      )
      .filter((text) => !/^(?:\/dev\/)?loop\d+$/.test(text) || /loop0\d/.test(text))
      // Any other path may be a link to a device.
      .filter((text) => !/^\/(?!dev\/loop)/.test(text))
      .map((value) => ({ value, codes: [VALUE] as Code[] })),
    fc
      .bigInt({ min: 1_048_576n, max: 2n ** 80n })
      .chain((number) => fc.constantFrom(`loop${number}`, `/dev/loop${number}`))
      .map((value) => ({ value, codes: [RANGE] as Code[] })),
  ),
}

/** A path as text. */
const textPath = kind(
  path,
  fc.constantFrom<unknown>('', '\0', 'a\0b', Buffer.from('/mnt'), pathToFileURL('/mnt'), 7, { fd: 7 }),
  (value) => {
    if (typeof value !== 'string') return [TYPE]
    return value === '' || value.includes('\0') ? [VALUE] : undefined
  },
)

/** What a device is found by. */
const sought: Kind = {
  asked: ['reference', 'mountPoint', 'fd'],
  right: fc.oneof(
    backingFile.right,
    tag.right.map((reference) => ({ reference })),
    textPath.right.map((mountPoint) => ({ mountPoint })),
  ),
  wrong: fc.oneof(
    backingFile.wrong.filter(({ value }) => !has(value, 'reference') && !has(value, 'mountPoint')),
    tag.wrong.map(({ value, codes }) => ({ value: { reference: value }, codes })),
    textPath.wrong.map(({ value, codes }) => ({ value: { mountPoint: value }, codes })),
  ),
}

/** Null: a private mount. */
const target: Kind = {
  right: fc.oneof(textPath.right, fc.constant(null)),
  wrong: textPath.wrong.filter(({ value }) => value !== null),
}
const optionalTarget: Kind = { ...target, wrong: target.wrong.filter(({ value }) => value !== undefined) }

const uuid = '0fc63daf-8483-4772-8e79-3d69d8477de4'
const partitionRef: Kind = {
  asked: ['label', 'uuid', 'type'],
  right: fc.oneof(
    fc.integer({ min: 1, max: 128 }),
    path.map((label) => ({ label })),
    fc.constantFrom({ uuid }, { uuid: uuid.toUpperCase() }, { uuid: '1a2b3c4d-05' }, { type: uuid }, { type: '0x83' }),
  ),
  wrong: fc.constantFrom<Wrong>(
    { value: 0, codes: [RANGE] },
    { value: -1, codes: [RANGE] },
    { value: 1.5, codes: [RANGE] },
    { value: '1', codes: [TYPE] },
    { value: null, codes: [TYPE] },
    { value: {}, codes: [VALUE] },
    { value: { label: '' }, codes: [VALUE] },
    { value: { label: 7 }, codes: [TYPE] },
    { value: { label: 'a', uuid }, codes: [VALUE] },
    { value: { uuid: 'x' }, codes: [RANGE] },
    { value: { type: '' }, codes: [RANGE] },
    { value: { name: 'a' }, codes: [VALUE] },
  ),
}

const fsType = kind(fc.constantFrom('ext4', 'fuse.x', 'a-b_c'), fc.constantFrom('', 'a b', 'ext4\0', '/'), (value) =>
  typeof value === 'string' && /^[\w.-]+$/.test(value) ? undefined : [TYPE],
)

const mountOptions: Kind = {
  right: fc.constantFrom<unknown>('', 'noatime', 'suid,dev,errors=remount-ro', [], ['a=b,c', 'nosuid'], '__proto__'),
  wrong: fc.oneof(
    fc.constantFrom<Wrong>(
      { value: 'a\0', codes: [VALUE] },
      { value: 'source=/dev/sda', codes: [VALUE] },
      { value: ['source'], codes: [VALUE] },
      { value: '=a', codes: [VALUE] },
      { value: ['a', 7], codes: [TYPE] },
    ),
    junk
      .filter((value) => typeof value !== 'string' && !Array.isArray(value))
      .map((value) => ({ value, codes: [TYPE] as Code[] })),
  ),
}

const destination = kind(
  path.filter((text) => !/(?:^|\/)\.{0,2}$/.test(text)).map((text) => `/${text}`),
  fc.constantFrom<unknown>(
    '',
    '/',
    'folder/',
    '/.',
    'folder/..',
    'a\0b',
    Buffer.from('/copy'),
    pathToFileURL('/copy'),
    7,
    { fd: 7 },
  ),
  (value) => {
    if (typeof value !== 'string') return [TYPE]
    return /(?:^|\/)\.{0,2}$/.test(value) || value.includes('\0') ? [VALUE] : undefined
  },
)

// ── objects of options

type Members = Record<string, Kind>

/** The same members in another object. */
const shapes: ((members: object) => object)[] = [
  (members) => members,
  (members) => Object.freeze({ ...members }),
  (members) => Object.assign(Object.create(null) as object, members),
  (members) => new Proxy({ ...members }, {}),
  (members) =>
    Object.defineProperties(
      {},
      Object.fromEntries(
        Object.entries(members).map(([name, value]) => [
          name,
          { get: (): unknown => value, enumerable: true, configurable: true },
        ]),
      ),
    ),
]

function shaped(members: fc.Arbitrary<object>): fc.Arbitrary<object> {
  return fc.tuple(members, fc.constantFrom(...shapes)).map(([given, shape]) => shape(given))
}

function rightMembers(members: Members, required: string[]): fc.Arbitrary<Record<string, unknown>> {
  const values = Object.entries(members).map(
    ([name, { right }]) => [name, required.includes(name) ? right : fc.oneof(right, absent)] as const,
  )
  return fc.record(Object.fromEntries(values), { requiredKeys: required })
}

/** One or more members with a wrong value; undefined is none, but where the member has to be there. */
function withWrongMembers(members: Members, required: string[]): fc.Arbitrary<Wrong> {
  const wrong = fc
    .subarray(Object.keys(members), { minLength: 1, maxLength: Math.min(3, Object.keys(members).length) })
    .chain((names) =>
      fc.tuple(
        ...names.map((name) =>
          (members[name] ?? boolean).wrong
            .filter(({ value }) => value !== undefined || required.includes(name))
            .map(({ value, codes }) => ({ name, value, codes })),
        ),
      ),
    )
  return fc.tuple(rightMembers(members, required), wrong, fc.constantFrom(...shapes)).map(([right, list, shape]) => ({
    value: shape({ ...right, ...Object.fromEntries(list.map(({ name, value }) => [name, value])) }),
    codes: list.flatMap(({ codes }) => codes),
  }))
}

/** An object of options: of any of these members, some of which may be required. */
function object(members: Members, required: string[] = [], optional = true): Kind {
  const known = Object.keys(members)
  const typo = fc.constantFrom(...known).chain((name) => fc.constantFrom(name.toUpperCase(), `${name} `, `${name}s`))
  const unknown = fc
    .oneof(typo, fc.string(), fc.constantFrom('__proto__', 'constructor', 'toString', '0', ''))
    .filter((name) => !known.includes(name))
  const right = rightMembers(members, required)
  return {
    asked: known,
    right: optional
      ? fc.oneof({ weight: 9, arbitrary: shaped(right) }, { weight: 1, arbitrary: absent })
      : shaped(right),
    wrong: fc.oneof(
      { weight: 6, arbitrary: withWrongMembers(members, required) },
      {
        weight: 2,
        arbitrary: fc
          .tuple(
            right,
            unknown,
            junk.filter((value) => value !== undefined),
          )
          .map(([given, name, value]) => {
            const codes: Code[] = [VALUE]
            // Not by assignment, which for __proto__ is another thing.
            return { value: Object.fromEntries([...Object.entries(given), [name, value]]), codes }
          }),
      },
      {
        weight: 2,
        arbitrary: junk
          .filter(
            (value) =>
              (value !== undefined || !optional) &&
              (typeof value !== 'object' || value === null || Array.isArray(value)),
          )
          .map((value) => ({ value, codes: [TYPE] as Code[] })),
      },
    ),
  }
}

/** `'auto'` too. */
const attachBlockSize: Kind = { ...blockSize, right: fc.oneof(blockSize.right, fc.constant('auto')) }

const attachMembers: Members = {
  readOnly: boolean,
  offset: bytes,
  sizeLimit: bytes,
  blockSize: attachBlockSize,
  directIO: oneOf(true, false, 'prefer'),
  partscan: oneOf(true, false, 'kernel', 'user'),
  createNode: oneOf('auto', false),
  autoclear: boolean,
  number: deviceNumber,
  overlap: oneOf('refuse', 'allow', 'reuse'),
  reference: tag,
  lock: boolean,
  signal,
  timeout,
}

const attachOptions: Kind = {
  asked: [...Object.keys(attachMembers), 'swappable'],
  right: object(attachMembers).right,
  // Where a stack is asked for, its own conditions may be the first to be missed.
  wrong: fc.oneof(
    { weight: 8, arbitrary: object(attachMembers).wrong },
    { weight: 1, arbitrary: boolean.wrong.filter(({ value }) => value !== undefined).map(inSwappable) },
    {
      weight: 1,
      arbitrary: fc
        .constantFrom<object>({}, { readOnly: false }, { readOnly: undefined }, { readOnly: true, overlap: 'reuse' })
        .map((members) => ({ value: { swappable: true, ...members }, codes: [VALUE] as Code[] })),
    },
  ),
}

const mountMembers: Members = { fsType, readOnly: boolean, options: mountOptions, makeTarget: boolean, signal, timeout }

/** Autoclear can only be on, and a partition says what offset and size limit are. */
const { autoclear: _, ...windowMembers } = attachMembers
const mountImageMembers: Members = { ...windowMembers, ...mountMembers }

const size512 = kind(
  fc.nat(1 << 30).map((blocks) => blocks * 512),
  fc.constantFrom(1, 511, 513n, -512, '512', 0.5),
  (value) => {
    if (typeof value !== 'number' && typeof value !== 'bigint') return [TYPE]
    return value >= 0 && value <= MAX && Number(value) % 512 === 0 ? undefined : [RANGE]
  },
)

function inSwappable({ value, codes }: Wrong): Wrong {
  return { value: { readOnly: true, swappable: value }, codes }
}

const LLONG_MAX = 2n ** 63n - 1n
const u64 = bigint(2n ** 64n - 1n)
const u32 = integer(0, 0xffff_ffff)
const i63 = bigint(LLONG_MAX)

const infoMembers: Members = {
  device: u64,
  inode: u64,
  rdevice: u64,
  // The kernel's loff_t is signed.
  offset: i63,
  sizeLimit: i63,
  number: u32,
  flags: u32,
  fileName: tag,
}
const info = object(infoMembers, [], false)
const config = object({ fd: descriptor, blockSize, info: { right: info.right, wrong: info.wrong } }, ['fd'], false)
const partitionNumber = integer(1, 0x7fff_ffff)
const partition = object({ number: partitionNumber, start: i63, length: i63 }, ['number', 'start', 'length'], false)
const changeMembers: Members = { verify: boolean, force: boolean, onProgress: callback, signal }

/** How long it may take, of what has a limit of time. */
const wait = object({ signal, timeout })

// ── every public function

interface Row {
  call: (...values: unknown[]) => unknown
  kinds: Kind[]
}

type Callable = (...values: never[]) => unknown

/** Called with what no caller's TypeScript would let pass. */
function untyped(call: Callable, self?: object): Row['call'] {
  return (...values) => Reflect.apply(call, self, values) as unknown
}

const REACHED = new Error('it went past its checks')

/** Over a handle on which any operation fails. */
const reject = () => Promise.reject(REACHED)
const device = Reflect.construct(LoopDevice, [{ run: reject, close: reject }]) as loopctl.LoopDevice

const raw: Record<string, Kind[]> = {
  loopCtlAdd: [descriptor, integer(-1, 1_048_575)],
  loopCtlRemove: [descriptor, deviceNumber],
  loopCtlGetFree: [descriptor],
  loopSetFd: [descriptor, descriptor],
  loopChangeFd: [descriptor, descriptor],
  loopClrFd: [descriptor],
  loopConfigure: [descriptor, config],
  loopGetStatus64: [descriptor],
  loopSetStatus64: [descriptor, info],
  loopSetCapacity: [descriptor],
  loopSetDirectIo: [descriptor, boolean],
  loopSetBlockSize: [descriptor, blockSize],
  blkGetSize64: [descriptor],
  blkGetDiskSeq: [descriptor],
  blkSszGet: [descriptor],
  blkRoGet: [descriptor],
  blkRoSet: [descriptor, boolean],
  blkFlsBuf: [descriptor],
  blkRrPart: [descriptor],
  blkPgAddPartition: [descriptor, partition],
  blkPgResizePartition: [descriptor, partition],
  blkPgDelPartition: [descriptor, partitionNumber],
}

const topLevel: Record<string, Kind[]> = {
  attach: [backingFile, attachOptions],
  open: [deviceRef, wait],
  list: [object({ all: boolean, signal, timeout })],
  find: [sought, object({ unconfirmed: boolean, signal, timeout })],
  readPartitionTable: [backingFile, object({ blockSize, timeout, signal })],
  watch: [object({ signal })],
  mountImage: [backingFile, optionalTarget, object(mountImageMembers)],
  createImage: [textPath, bytes, object({ allocate: boolean, overwrite: boolean, signal, timeout })],
  withDevice: [backingFile, attachOptions, callback],
}

const methods: Record<string, Kind[]> = {
  setStatus: [
    object({ offset: bytes, sizeLimit: bytes, autoclear: boolean, partscan: oneOf(true), reference: tag }, [], false),
    object({ overlap: oneOf('refuse', 'allow'), signal, timeout }),
  ],
  status: [wait],
  changeBackingFile: [backingFile, object(changeMembers)],
  migrate: [destination, object({ ...changeMembers, sparse: boolean, overwrite: boolean })],
  refreshCapacity: [wait],
  setDirectIO: [boolean, wait],
  setBlockSize: [blockSize, wait],
  partitions: [wait],
  rescanPartitions: [object({ mode: oneOf('kernel', 'user'), timeout, signal })],
  detach: [object({ lazy: boolean, force: boolean, timeout, signal, unmount: boolean, onUnmount: callback })],
  mount: [target, object({ ...mountMembers, partition: partitionRef })],
  grow: [size512, object({ partition: oneOf('last'), signal, timeout })],
  lock: [wait],
  holders: [wait],
  flush: [wait],
  release: [wait],
  close: [wait],
}

const controlMethods: Record<string, Kind[]> = {
  add: [
    {
      right: fc.oneof(deviceNumber.right, absent),
      wrong: deviceNumber.wrong.filter(({ value }) => value !== undefined),
    },
    wait,
  ],
  remove: [deviceNumber, wait],
  getFree: [wait],
  close: [wait],
}

function member(of: object, name: string): Callable {
  return Reflect.get(of, name) as Callable
}

const rows: [name: string, row: Row][] = [
  ...Object.entries(topLevel).map(([name, kinds]): [string, Row] => [
    name,
    { call: name === 'watch' ? watchOnce : untyped(member(loopctl, name)), kinds },
  ]),
  ...Object.entries(raw).flatMap(([name, kinds]) =>
    [name, `${name}Sync`].map((each): [string, Row] => [each, { call: untyped(member(ioctl, each)), kinds }]),
  ),
  ...Object.entries(methods).map(([name, kinds]): [string, Row] => [
    `LoopDevice.${name}`,
    { call: untyped(member(LoopDevice.prototype, name), device), kinds },
  ]),
  ['LoopControl.open', { call: untyped(member(LoopControl, 'open'), LoopControl), kinds: [wait] }],
  ...Object.entries(controlMethods).map(([name, kinds]): [string, Row] => [
    `LoopControl.${name}`,
    { call: (...values) => withControl(name, values), kinds },
  ]),
]

/** What it gives is no promise: the first event is. */
function watchOnce(...values: unknown[]): unknown {
  return (untyped(loopctl.watch)(...values) as ReturnType<typeof loopctl.watch>).next()
}

/** The others reject. */
function isThrowing(name: string): boolean {
  return name.endsWith('Sync') || name === 'watch'
}

/** Over a descriptor of another file, for which no call is made. */
async function withControl(name: string, values: unknown[]): Promise<unknown> {
  const fd = openSync(process.execPath, 'r')
  try {
    const control = Reflect.construct(LoopControl, [fd]) as object
    const promise = untyped(member(LoopControl.prototype, name), control)(...values)
    expect(promise).toBeInstanceOf(Promise)
    return await promise
  } finally {
    closeSync(fd)
  }
}

// ── what comes of a call

interface Outcome {
  error: unknown
  threw: boolean
  /** The names of the system calls that it would have made. */
  calls: string[]
}

/** Makes the call; none of its system calls happens. */
async function outcomeOf(call: () => unknown): Promise<Outcome> {
  const calls: string[] = []
  observe((name) => {
    // It asks the C library for a constant.
    if (name === 'pageSizeSync') return
    calls.push(name)
    throw REACHED
  })
  let threw = true
  try {
    const result = call()
    threw = false
    return { error: new Error(`it gave ${String(await result)}`), threw, calls }
  } catch (error) {
    return { error, threw, calls }
  } finally {
    observe(undefined)
  }
}

afterEach(() => observe(undefined))

/** Out of every wrong call, whatever it was. */
function expectRefusal({ error, threw, calls }: Outcome, name: string, codes: Code[]): void {
  expect(calls, 'system calls before the arguments were checked').toEqual([])
  const code = (error as { code?: unknown }).code as Code
  expect(codes, String(error)).toContain(code)
  expect(error).toBeInstanceOf(CLASSES[code])
  expect((error as Error).message.length).toBeLessThan(300)
  expect(threw, 'threw').toBe(isThrowing(name))
}

function expectAccepted({ error, calls }: Outcome): void {
  if (LoopError.is(error, 'unsupported-platform')) return
  if (error !== REACHED) expect(error).toBeInstanceOf(LoopError)
  if (error !== REACHED) expect(calls).not.toEqual([])
}

/** The arguments of a call that is right but for one of them. */
function callsWithOneWrong(kinds: Kind[]): fc.Arbitrary<{ values: unknown[]; codes: Code[] }> {
  return fc
    .tuple(
      fc.nat(kinds.length - 1).chain((index) => fc.tuple(fc.constant(index), (kinds[index] ?? boolean).wrong)),
      ...kinds.map(({ right }) => right),
    )
    .map(([[index, { value, codes }], ...values]) => ({ values: values.with(index, value), codes }))
}

const RUNS = { numRuns: 120 }

function functionsOf(module: object): string[] {
  return Object.entries(module)
    .filter(([, value]) => typeof value === 'function')
    .map(([name]) => name)
}

/** Those that take arguments. */
function methodsOf(prototype: object): string[] {
  return Object.getOwnPropertyNames(prototype).filter((name) => {
    const value: unknown = Object.getOwnPropertyDescriptor(prototype, name)?.value
    return name !== 'constructor' && typeof value === 'function' && value.length > 0
  })
}

test('every public function is here', () => {
  const classes = ['LoopControl', 'LoopDevice', 'LoopError']
  const withoutArguments = ['doctor']
  const wanted = [...Object.keys(topLevel), ...classes, ...withoutArguments]
  expect(functionsOf(loopctl).toSorted()).toEqual(wanted.toSorted())
  expect(functionsOf(ioctl).toSorted()).toEqual(
    Object.keys(raw)
      .flatMap((name) => [name, `${name}Sync`])
      .toSorted(),
  )
  expect(methodsOf(LoopDevice.prototype).toSorted()).toEqual(Object.keys(methods).toSorted())
  expect(methodsOf(LoopControl.prototype).toSorted()).toEqual(Object.keys(controlMethods).toSorted())
})

describe.each(rows)('%s', (name, { call, kinds }) => {
  test('refuses one wrong argument, before any system call', async () => {
    await fc.assert(
      fc.asyncProperty(callsWithOneWrong(kinds), async ({ values, codes }) => {
        expectRefusal(await outcomeOf(() => call(...values)), name, codes)
      }),
      RUNS,
    )
  })

  test('takes what is right', async () => {
    await fc.assert(
      fc.asyncProperty(fc.tuple(...kinds.map(({ right }) => right)), async (values) => {
        expectAccepted(await outcomeOf(() => call(...values)))
      }),
      RUNS,
    )
  })
})

// ── objects that fight back

const hostile = rows.flatMap(([name, { call, kinds }]) =>
  kinds.flatMap(({ asked }, index) =>
    asked ? [{ title: `${name}, argument ${index + 1}`, name, call, kinds, index, asked }] : [],
  ),
)

const OWN = new Error('of the object itself')

function throwOwn(): never {
  throw OWN
}

const TRAPS = ['get', 'has', 'ownKeys', 'getOwnPropertyDescriptor', 'getPrototypeOf', 'isExtensible'] as const

function trapped(): object {
  return new Proxy({}, Object.fromEntries(TRAPS.map((trap) => [trap, throwOwn])))
}

function revoked(): object {
  const { proxy, revoke } = Proxy.revocable({}, {})
  revoke()
  return proxy
}

/** Makers of them, since fast-check asks of every value that it makes whether it can be cloned. */
type Maker = () => object

function forged(type: { prototype: object }): Maker {
  return () => Object.create(type.prototype) as object
}

describe.each(hostile)('$title', ({ name, call, kinds, index, asked }) => {
  const rights = fc.tuple(...kinds.map(({ right }) => right))

  async function outcomeWith(values: unknown[], make: Maker): Promise<Outcome> {
    const given = values.with(index, make())
    return outcomeOf(() => call(...given))
  }

  test('what a getter or a trap of it throws comes out, before any system call', async () => {
    const makers = asked.map(
      (key): Maker =>
        () =>
          Object.defineProperty({}, key, { get: throwOwn, enumerable: true }),
    )
    await fc.assert(
      fc.asyncProperty(rights, fc.constantFrom(trapped, ...makers), async (values, make) => {
        const { error, threw, calls } = await outcomeWith(values, make)
        expect(error).toBe(OWN)
        expect(calls).toEqual([])
        expect(threw, 'threw').toBe(isThrowing(name))
      }),
      { numRuns: 30 },
    )
  })

  test('a revoked proxy or a forged instance is a TypeError, before any system call', async () => {
    const forgeries: Maker[] = [forged(URL), forged(Buffer), () => new Proxy(new URL('file:///image'), {})]
    const isFile = asked.length < 3 && asked.includes('fd')
    await fc.assert(
      fc.asyncProperty(rights, fc.constantFrom(revoked, ...(isFile ? forgeries : [])), async (values, make) => {
        const { error, calls } = await outcomeWith(values, make)
        expect(error).toBeInstanceOf(TypeError)
        expect(calls).toEqual([])
      }),
      { numRuns: 30 },
    )
  })
})

test('LoopError.is answers of everything, and throws for nothing', () => {
  fc.assert(
    fc.property(junk, fc.oneof(junk, fc.constant('closed')), (error, reason) => {
      expect(LoopError.is(error, reason as loopctl.LoopErrorReason)).toBe(false)
    }),
  )
})
