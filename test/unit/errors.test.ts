import { readFileSync } from 'node:fs'
import { constants } from 'node:os'
import { getSystemErrorMap, inspect } from 'node:util'
import { describe, expect, test } from 'vitest'
import { errnoDescription, errnoName, LoopError, type LoopErrorFields, refusal } from '../../lib/errors/errors.ts'
import { LoopError as PublicLoopError } from '../../lib/index.ts'

const EINVAL = -22
const EBUSY = -16

const FULL: LoopErrorFields = {
  reason: 'size-mismatch',
  errno: EINVAL,
  syscall: 'ioctl',
  ioctl: 'LOOP_CHANGE_FD',
  path: '/dev/loop7',
  backingFile: '/images/new',
  detail: 'new backing file is 4096 bytes larger (10240, must be 6144)',
  hint: 'make it as long as the old one',
  holders: [{ device: '/dev/loop7', kind: 'mount', mountPoint: '/mnt', fsType: 'ext4' }],
}

const LEAST: LoopErrorFields = { reason: 'in-use', errno: EBUSY, syscall: 'ioctl', detail: 'it is in use' }

const OPTIONAL = ['ioctl', 'path', 'backingFile', 'hint', 'holders', 'cause'] as const

function messageOf(fields: LoopErrorFields): string {
  return new LoopError(fields).message
}

/** The members that are the error's own and enumerable: what a spread takes, and JSON. */
function membersOf(error: LoopError): object {
  return Object.fromEntries(Object.entries(error))
}

describe('LoopError', () => {
  test('is an Error that carries what it was made of', () => {
    const { detail, ...members } = FULL
    const error = new LoopError(FULL)
    expect(error).toBeInstanceOf(Error)
    expect(error).toMatchObject({ ...members, code: 'EINVAL' })
    expect(error.message).toContain(detail)
    expect(PublicLoopError).toBe(LoopError)
  })

  test('the message is code, call, path and what happened', () => {
    expect(messageOf(FULL)).toBe(
      'EINVAL: LOOP_CHANGE_FD /dev/loop7: new backing file is 4096 bytes larger (10240, must be 6144)',
    )
    expect(messageOf(LEAST)).toBe('EBUSY: ioctl: it is in use')
    expect(messageOf({ ...LEAST, syscall: 'open', path: '/dev/loop7' })).toBe('EBUSY: open /dev/loop7: it is in use')
    expect(messageOf({ ...LEAST, ioctl: 'LOOP_CLR_FD' })).toBe('EBUSY: LOOP_CLR_FD: it is in use')
  })

  test('what is absent is no property', () => {
    const given = { ...LEAST, ...Object.fromEntries(OPTIONAL.map((name) => [name, undefined])) }
    for (const error of [new LoopError(LEAST), new LoopError(given)]) {
      expect(Object.keys(error).toSorted()).toEqual(['code', 'errno', 'reason', 'syscall'])
      for (const name of OPTIONAL) expect(error).not.toHaveProperty(name)
    }
  })

  test('its own members survive JSON and spread; name, message and stack are as with other errors', () => {
    const { detail: _, ...members } = FULL
    const error = new LoopError(FULL)
    expect(JSON.parse(JSON.stringify(error))).toEqual({ ...members, code: 'EINVAL' })
    expect(membersOf(error)).toEqual({ ...members, code: 'EINVAL' })
  })

  test('its name is LoopError, once, and not a property of each', () => {
    const error = new LoopError(FULL)
    expect(error.name).toBe('LoopError')
    expect(Object.hasOwn(error, 'name')).toBe(false)
    expect(error.stack).toMatch(/^LoopError: EINVAL: LOOP_CHANGE_FD \/dev\/loop7: /)
    expect(String(error)).toBe(`LoopError: ${error.message}`)
    expect(inspect(error)).toContain("reason: 'size-mismatch'")
  })

  test('the cause is kept', () => {
    const cause = new Error('before')
    expect(new LoopError({ ...LEAST, cause }).cause).toBe(cause)
  })

  test('LoopError.is tells LoopErrors, and their reason where one is named', () => {
    const error = new LoopError(LEAST)
    expect(LoopError.is(error)).toBe(true)
    expect(LoopError.is(error, 'in-use')).toBe(true)
    expect(LoopError.is(error, 'permission')).toBe(false)
    const alike = Object.assign(new Error(error.message), membersOf(error))
    for (const other of [alike, new TypeError('x'), membersOf(error), null, undefined, 'in-use']) {
      expect(LoopError.is(other)).toBe(false)
      expect(LoopError.is(other, 'in-use')).toBe(false)
    }
  })
})

function read(path: string): string {
  return readFileSync(new URL(`../../${path}`, import.meta.url), 'utf8')
}

test('docs/errors.md explains each reason, and no other', () => {
  const [, union = ''] = /type LoopErrorReason =((?:\s+\| '[a-z-]+')+)/.exec(read('lib/errors/errors.ts')) ?? []
  const reasons = [...union.matchAll(/'([a-z-]+)'/g)].map(([, reason]) => reason)
  const [, table = ''] = read('docs/errors.md').split('## Reasons')
  const rows = [...table.matchAll(/^\| `([a-z-]+)` +\| \S.*\| \S.*\|$/gm)].map(([, reason]) => reason)
  expect(reasons.length).toBeGreaterThan(30)
  expect(rows).toEqual(reasons)
})

describe('refusal', () => {
  for (const [reason, code] of [
    ['in-use', 'EBUSY'],
    ['contention', 'EBUSY'],
    ['would-shut-down-filesystem', 'EBUSY'],
    ['replaced', 'ESTALE'],
    ['closed', 'EBADF'],
    ['timeout', 'ETIMEDOUT'],
    ['content-differs', 'EILSEQ'],
    ['size-mismatch', 'EINVAL'],
    ['bad-partition-table', 'EINVAL'],
    ['no-such-partition', 'ENOENT'],
    ['block-size', 'EINVAL'],
    ['not-a-loop-device', 'ENOTTY'],
  ] as const) {
    test(`${reason} is ${code}`, () => {
      expect(refusal(reason, 'ioctl', 'refused')).toMatchObject({ reason, code, errno: -constants.errno[code] })
    })
  }

  for (const reason of ['unsupported-kernel', 'unsupported-platform'] as const) {
    test(`${reason} has the number of ENOTSUP`, () => {
      expect(refusal(reason, 'load', 'refused')).toMatchObject({ reason, errno: -95 })
    })

    test(`${reason} has the code ENOTSUP`, () => {
      expect(refusal(reason, 'load', 'refused')).toMatchObject({ code: 'ENOTSUP' })
    })
  }

  test('says more where there is more to say', () => {
    const error = refusal('in-use', 'ioctl', 'refused', { path: '/dev/loop7', ioctl: 'LOOP_CLR_FD', hint: 'wait' })
    expect({ ...membersOf(error), message: error.message }).toEqual({
      code: 'EBUSY',
      errno: -16,
      syscall: 'ioctl',
      ioctl: 'LOOP_CLR_FD',
      path: '/dev/loop7',
      reason: 'in-use',
      hint: 'wait',
      message: 'EBUSY: LOOP_CLR_FD /dev/loop7: refused',
    })
  })
})

describe('errnoName', () => {
  test('of the errnos that the loop driver answers with', () => {
    for (const [errno, name] of [
      [-1, 'EPERM'],
      [-2, 'ENOENT'],
      [-6, 'ENXIO'],
      [-9, 'EBADF'],
      [-11, 'EAGAIN'],
      [-13, 'EACCES'],
      [-15, 'ENOTBLK'],
      [-16, 'EBUSY'],
      [-17, 'EEXIST'],
      [-19, 'ENODEV'],
      [-22, 'EINVAL'],
      [-25, 'ENOTTY'],
      [-28, 'ENOSPC'],
      [-30, 'EROFS'],
      [-110, 'ETIMEDOUT'],
      [-116, 'ESTALE'],
      [-117, 'EUCLEAN'],
      [-123, 'ENOMEDIUM'],
      [-124, 'EMEDIUMTYPE'],
    ] as const) {
      expect(errnoName(errno)).toBe(name)
    }
  })

  test('is the name that Node has', () => {
    const differing = [...getSystemErrorMap()].filter(([errno, [name]]) => errnoName(errno) !== name)
    expect(differing).toEqual([])
  })

  test('is the name that Node has where node:os has none: disks answer EREMOTEIO', () => {
    expect(errnoName(-121)).toBe('EREMOTEIO')
  })

  test('of an unknown number is that number', () => {
    expect(errnoName(-524)).toBe('E524')
    expect(errnoName(-4096)).toBe('E4096')
  })
})

describe('errnoDescription', () => {
  test('is Node’s, and something for what Node does not know', () => {
    expect(errnoDescription(EBUSY)).toBe('resource busy or locked')
    expect(errnoDescription(-2)).toBe('no such file or directory')
    expect(errnoDescription(-524)).toBe('unknown error')
  })
})
