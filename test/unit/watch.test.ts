import { describe, expect, test } from 'vitest'
import { parseUevent } from '../../lib/kernel/uevent.ts'
import type { LoopInfo } from '../../lib/observe/list.ts'
import { compare, type Hint, type Known, know } from '../../lib/observe/events.ts'

/** As the kernel sends it. */
function message(header: string, ...fields: string[]): Buffer {
  return Buffer.from([header, ...fields].map((line) => `${line}\0`).join(''))
}

function ofLoop(number: number, action: string, ...more: string[]): Buffer {
  const path = `/devices/virtual/block/loop${number}`
  return message(
    `${action}@${path}`,
    `ACTION=${action}`,
    `DEVPATH=${path}`,
    'SUBSYSTEM=block',
    ...more,
    'MAJOR=7',
    `MINOR=${number}`,
    `DEVNAME=loop${number}`,
    'DEVTYPE=disk',
    'DISKSEQ=12',
    'SEQNUM=4711',
  )
}

describe('parseUevent', () => {
  test('tells the action, the device, and that its medium is another', () => {
    expect(parseUevent(ofLoop(7, 'change'))).toEqual({
      action: 'change',
      number: 7,
      mediaChange: false,
      diskSeq: 12,
    })
    expect(parseUevent(ofLoop(1_048_575, 'add'))).toMatchObject({ action: 'add', number: 1_048_575 })
    expect(parseUevent(ofLoop(7, 'change', 'DISK_MEDIA_CHANGE=1'))).toMatchObject({ mediaChange: true })
    expect(parseUevent(ofLoop(7, 'change', 'DISK_MEDIA_CHANGE=0'))).toMatchObject({ mediaChange: false })
  })

  test.each<[what: string, bytes: Buffer]>([
    ['nothing', Buffer.alloc(0)],
    ['a header only', message('change@/devices/virtual/block/loop7')],
    ['a partition', message('add@/x', 'ACTION=add', 'SUBSYSTEM=block', 'DEVNAME=loop7p1', 'DEVTYPE=partition')],
    ['another disk', message('add@/x', 'ACTION=add', 'SUBSYSTEM=block', 'DEVNAME=sda', 'DEVTYPE=disk')],
    ['loop-control', message('add@/x', 'ACTION=add', 'SUBSYSTEM=misc', 'DEVNAME=loop-control')],
    ['the queue of one', message('add@/x', 'ACTION=add', 'SUBSYSTEM=bdi', 'DEVNAME=loop7')],
    ['one without an action', message('add@/x', 'SUBSYSTEM=block', 'DEVNAME=loop7')],
    ['bytes that are no text', Buffer.from([0xff, 0, 0xfe, 0x3d, 0])],
    ['a name without a line of its own', message('add@/x', 'ACTION=add', 'SUBSYSTEM=block', 'X=DEVNAME=loop7')],
  ])('is not taken in by %s', (_, bytes) => {
    expect(parseUevent(bytes)).toBeUndefined()
  })
})

const free: LoopInfo = {
  number: 7,
  path: '/dev/loop7',
  device: '7:7',
  diskSeq: 10,
  attached: false,
  backingFile: null,
  backingDeleted: false,
  offset: 0,
  sizeLimit: 0,
  size: 0,
  blockSize: 512,
  readOnly: false,
  autoclear: false,
  partscan: false,
  directIO: false,
}
const attached: LoopInfo = { ...free, diskSeq: 11, attached: true, backingFile: '/a', size: 1 << 20 }
const readOnly: LoopInfo = { ...attached, readOnly: true }

function known(info: LoopInfo): Known {
  return { info, going: false, hasBlockSize: true }
}

/** With the number that it had when it was attached, and after that. */
const DETACHED: Hint = { removed: [], detached: [11] }
const REMOVED: Hint = { removed: [12], detached: [] }

const add = (info: LoopInfo) => ({ type: 'add', number: 7, info })
const attach = (info: LoopInfo) => ({ type: 'attach', number: 7, info })
const detach = (info: LoopInfo) => ({ type: 'detach', number: 7, info })

function types(was: LoopInfo, now: LoopInfo, hint?: Hint): string[] {
  return compare(7, known(was), now, hint).map(({ type }) => type)
}

describe('compare', () => {
  test('nothing where nothing changed, whatever the uevents said', () => {
    for (const info of [free, attached, readOnly]) {
      for (const hint of [undefined, DETACHED, REMOVED]) {
        expect(compare(7, known(info), { ...info }, hint)).toEqual([])
      }
    }
    expect(compare(7, undefined, undefined, REMOVED)).toEqual([])
  })

  test('add, attach, detach, remove, alone and together', () => {
    const remove = { type: 'remove', number: 7 }
    const later = { ...attached, diskSeq: 20, size: 512 }
    expect(compare(7, undefined, free)).toEqual([add(free)])
    expect(compare(7, undefined, attached)).toEqual([add(attached), attach(attached)])
    expect(compare(7, known(free), attached)).toEqual([attach(attached)])
    // As it was last seen attached
    expect(compare(7, known(attached), { ...free, diskSeq: 12 })).toEqual([detach(attached)])
    expect(compare(7, known(attached), undefined)).toEqual([detach(attached), remove])
    expect(compare(7, known(free), undefined)).toEqual([remove])
    expect(compare(7, known(attached), later)).toEqual([detach(attached), attach(later)])
    expect(compare(7, known(attached), later, REMOVED)).toEqual([detach(attached), remove, add(later), attach(later)])
    expect(compare(7, known(free), { ...free, diskSeq: 20 }, REMOVED)).toEqual([remove, add({ ...free, diskSeq: 20 })])
  })

  test('resize is another size, change anything else of an attached device', () => {
    const grown = { ...attached, size: 1 << 21 }
    expect(compare(7, known(attached), grown)).toEqual([{ type: 'resize', number: 7, info: grown }])
    for (const change of [
      { offset: 512 },
      { sizeLimit: 512 },
      { blockSize: 4096 },
      { readOnly: true },
      { autoclear: true },
      { partscan: true },
      { directIO: true },
      { backingFile: '/renamed' },
      { backingDeleted: true },
      { lower: 3 },
    ]) {
      const now = { ...attached, ...change }
      expect(compare(7, known(attached), now)).toEqual([{ type: 'change', number: 7, info: now }])
    }
    const both = { ...attached, offset: 512, size: 512 }
    expect(compare(7, known(attached), both).map(({ type }) => type)).toEqual(['change', 'resize'])
  })

  test('LOOP_CHANGE_FD is a change, unless the kernel spoke of another medium or more than the file is another', () => {
    const changed = { ...readOnly, diskSeq: 12, backingFile: '/b' }
    expect(types(readOnly, changed)).toEqual(['change'])
    expect(types(readOnly, changed, DETACHED)).toEqual(['detach', 'attach'])
    // What was detached or removed afterwards is no part of it.
    expect(types(readOnly, changed, { removed: [12], detached: [12] })).toEqual(['change'])
    expect(types(readOnly, { ...changed, offset: 512 })).toEqual(['detach', 'attach'])
    expect(types(readOnly, { ...changed, size: 512 })).toEqual(['detach', 'attach'])
    expect(types(attached, { ...attached, diskSeq: 12, backingFile: '/b' })).toEqual(['detach', 'attach'])
  })

  test('a free device has an attachment between two looks told as a change, and none told twice', () => {
    const later = { ...free, diskSeq: 12 }
    expect(compare(7, known(free), later)).toEqual([{ type: 'change', number: 7, info: later }])
    // The number of a detached device is a new one a moment after it is free.
    const first = { ...free, diskSeq: 11 }
    expect(compare(7, known(attached), first)).toHaveLength(1)
    const between = know(known(attached), first)
    expect(between.going).toBe(true)
    expect(compare(7, between, later)).toEqual([])
    expect(know(between, first).going).toBe(true)
    const after = know(between, later)
    expect(after.going).toBe(false)
    expect(compare(7, after, { ...free, diskSeq: 14 })).toHaveLength(1)
  })
})
