/** What TypeScript makes of the errors. The compiler is the judge: `npm run check:types`. */

import { describe, expect, expectTypeOf, test } from 'vitest'
import { LoopError, type LoopErrorReason } from '../../lib/index.ts'

/** Every reason; that one is missing or too many does not compile. */
function isKnown(reason: LoopErrorReason): boolean {
  switch (reason) {
    case 'permission':
    case 'no-loop-driver':
    case 'node-missing':
    case 'no-such-device':
    case 'device-exists':
    case 'not-attached':
    case 'already-attached':
    case 'detaching':
    case 'in-use':
    case 'not-read-only':
    case 'size-mismatch':
    case 'would-shut-down-filesystem':
    case 'no-such-file':
    case 'backing-not-writable':
    case 'not-a-file-or-block-device':
    case 'backed-by-itself':
    case 'backing-loop-not-attached':
    case 'overlap':
    case 'direct-io-unavailable':
    case 'block-size':
    case 'dirty-cache':
    case 'replaced':
    case 'contention':
    case 'content-differs':
    case 'destination-exists':
    case 'bad-partition-table':
    case 'no-such-partition':
    case 'partscan-off':
    case 'not-a-loop-device':
    case 'closed':
    case 'timeout':
    case 'unsupported-kernel':
    case 'unsupported-platform':
    case 'resources':
    case 'no-space':
    case 'io':
    case 'unknown':
      return true
    default: {
      const never: never = reason
      return never
    }
  }
}

/** With `in-use` left out. */
function isOther(reason: Extract<LoopErrorReason, 'overlap' | 'closed' | 'in-use'>): boolean {
  // oxlint-disable-next-line typescript/switch-exhaustiveness-check -- that it is not exhaustive is the point
  switch (reason) {
    case 'overlap':
    case 'closed':
      return true
    default: {
      // @ts-expect-error -- 'in-use' is left
      const never: never = reason
      return never
    }
  }
}

/** As a caller has it: of a type that does not say the reason. */
function make(reason: LoopErrorReason): LoopError {
  return new LoopError({ reason, errno: -16, syscall: 'ioctl', detail: 'refused' })
}

describe('LoopErrorReason', () => {
  test('is a closed union, over which a switch is exhaustive', () => {
    expectTypeOf(isKnown).parameter(0).toEqualTypeOf<LoopErrorReason>()
    expect(isKnown(make('in-use').reason)).toBe(true)
    expect(isKnown('no reason' as LoopErrorReason)).toBe('no reason')
  })

  test('a switch that leaves one out does not compile', () => {
    expect(isOther('in-use')).toBe('in-use')
  })

  test('a text that is none does not compile', () => {
    // @ts-expect-error -- there is no such reason
    expect(LoopError.is(make('in-use'), 'inuse')).toBe(false)
  })
})

describe('LoopError.is', () => {
  test('of a reason narrows to an error of that reason', () => {
    const error: unknown = make('in-use')
    if (!LoopError.is(error, 'in-use')) expect.fail('it is one')
    expectTypeOf(error).toExtend<LoopError>()
    expectTypeOf(error.reason).toEqualTypeOf<'in-use'>()
    expectTypeOf(error.holders).toEqualTypeOf<LoopError['holders']>()
    expect(error.reason satisfies 'in-use').toBe('in-use')
  })

  test('of a reason leaves another reason possible where it is false', () => {
    const error = make('closed')
    if (LoopError.is(error, 'in-use')) expect.fail('it is not')
    expectTypeOf(error).toEqualTypeOf<LoopError>()
    expect(error.reason).toBe('closed')
  })

  test('of one of several narrows to those', () => {
    const wanted = 'closed' as 'closed' | 'replaced'
    const error: unknown = make('closed')
    if (!LoopError.is(error, wanted)) expect.fail('it is one')
    expectTypeOf(error.reason).toEqualTypeOf<'closed' | 'replaced'>()
    expect(error.reason).toBe('closed')
  })

  test('without one narrows to a LoopError of any', () => {
    const error: unknown = make('io')
    if (!LoopError.is(error)) expect.fail('it is one')
    expectTypeOf(error).toExtend<LoopError>()
    expectTypeOf(error.reason).toEqualTypeOf<LoopErrorReason>()
    expect(error.reason).toBe('io')
  })
})
