import { describe, expect, test } from 'vitest'
import { mountOf, parseMounts } from '../../lib/kernel/mountinfo.ts'

/** A line of mountinfo with that mount point and those optional fields. */
function line(mountPoint: string, optional = ''): string {
  return `36 35 7:1 / ${mountPoint} rw,noatime ${optional}- ext4 /dev/loop1 rw,errors=continue`
}

function mountPointOf(escaped: string): string | undefined {
  const mounts = parseMounts(line(escaped))
  expect(mounts).toHaveLength(1)
  return mounts[0]?.mountPoint
}

describe('parseMounts', () => {
  test('device, mount point and type, in the order of the file', () => {
    const text = `22 27 0:21 / /proc rw,relatime - proc proc rw
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
90 27 7:1048575 / /media/cd ro,relatime shared:5 - squashfs /dev/loop1048575 ro
`
    expect(parseMounts(text)).toEqual([
      { id: 22, device: '0:21', mountPoint: '/proc', fsType: 'proc', source: 'proc', options: ['rw', 'relatime'] },
      { id: 36, device: '98:0', mountPoint: '/mnt2', fsType: 'ext3', source: '/dev/root', options: ['rw', 'noatime'] },
      {
        id: 90,
        device: '7:1048575',
        mountPoint: '/media/cd',
        fsType: 'squashfs',
        source: '/dev/loop1048575',
        options: ['ro', 'relatime'],
      },
    ])
  })

  test('no optional field, one, and several', () => {
    const mount = {
      id: 36,
      device: '7:1',
      mountPoint: '/mnt',
      fsType: 'ext4',
      source: '/dev/loop1',
      options: ['rw', 'noatime'],
    }
    for (const optional of ['', 'shared:1 ', 'shared:1 master:2 ', 'shared:1 master:2 propagate_from:3 unbindable ']) {
      expect(parseMounts(line('/mnt', optional)), optional).toEqual([mount])
    }
  })

  test('a dash as root, mount point or source is not the separator', () => {
    const text = '36 35 7:1 - - rw - ext4 - rw'
    expect(parseMounts(text)).toEqual([
      { id: 36, device: '7:1', mountPoint: '-', fsType: 'ext4', source: '-', options: ['rw'] },
    ])
  })

  test('an escaped space, tab, newline and backslash', () => {
    expect(mountPointOf(String.raw`/a\040b`)).toBe('/a b')
    expect(mountPointOf(String.raw`/a\011b`)).toBe('/a\tb')
    expect(mountPointOf(String.raw`/a\012b`)).toBe('/a\nb')
    expect(mountPointOf(String.raw`/a\134b`)).toBe('/a\\b')
    expect(mountPointOf(String.raw`/\040\011\012\134\040`)).toBe('/ \t\n\\ ')
  })

  test('an escaped backslash does not begin another escape', () => {
    expect(mountPointOf(String.raw`/a\134040b`)).toBe(String.raw`/a\040b`)
    expect(mountPointOf(String.raw`/a\134134b`)).toBe(String.raw`/a\134b`)
  })

  test('what only looks like an escape stays', () => {
    for (const path of [String.raw`/a\04`, String.raw`/a\980b`, String.raw`/a\n`, '/a\\']) {
      expect(mountPointOf(path)).toBe(path)
    }
  })

  test('other characters stay as they are', () => {
    for (const path of ['/ünïcode', '/€😀', '/a#b', "/a'b", '/a\rb', '/a\u00A0b']) expect(mountPointOf(path)).toBe(path)
  })

  test('several mounts at one place, and of one device, are all there', () => {
    expect(parseMounts([line('/a'), line('/a'), line('/b')].join('\n')).map(({ mountPoint }) => mountPoint)).toEqual([
      '/a',
      '/a',
      '/b',
    ])
  })

  test('malformed lines are ignored, and the others are not', () => {
    const text = [
      '',
      'garbage',
      '-',
      '- - - - - - -',
      '36 35 7:2 / /no/separator rw,noatime shared:1 ext4 /dev/loop2 rw',
      '36 35 7:3 / - ext4 /dev/loop3 rw',
      '36 35 7:4 / /nothing/behind rw -',
      '36 35 7:5 / /no/type rw - ',
      '36 35 7:6 /  rw shared:1 - ext4 /dev/loop6 rw',
      line('/good'),
      '36 35 ',
    ]
    expect(parseMounts(text.join('\n'))).toMatchObject([{ device: '7:1', mountPoint: '/good', fsType: 'ext4' }])
  })

  test('an empty text is no mounts', () => {
    expect(parseMounts('')).toEqual([])
    expect(parseMounts('\n')).toEqual([])
  })
})

describe('mountOf', () => {
  const mounts = parseMounts([line('/'), line('/dev'), line('/dev/shm'), line('/dev')].join('\n'))

  test('is the deepest mount above the path, and of two on one another the upper', () => {
    expect(mountOf('/dev/loop7', mounts)).toBe(mounts[3])
    expect(mountOf('/dev/shm/x', mounts)).toBe(mounts[2])
    expect(mountOf('/device', mounts)).toBe(mounts[0])
    expect(mountOf('/dev', [])).toBe(undefined)
  })
})
