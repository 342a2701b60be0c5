/** device.mount(): every filesystem of this kernel, options, targets, and what is refused. */

import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  chmodSync,
  chownSync,
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { beforeEach, describe, expect, onTestFinished, vi } from 'vitest'
import { attach, open } from '../../lib/index.ts'
import { env, kernelHas, needs, needsKernel, skipForKernel } from '../needs.ts'
import { sfdisk, TWO } from '../kernel/partitioned.ts'
import { countDescriptors, failure } from '../kernel/support.ts'
import { expectDetached, MAKERS, makeFilesystem, mountsUnder, test } from './support.ts'

const ALWAYS = ['ext2', 'ext3', 'ext4'] as const
const PERHAPS = ['xfs', 'btrfs', 'squashfs', 'erofs', 'vfat', 'exfat', 'f2fs', 'iso9660', 'udf'] as const

describe('each filesystem', () => {
  for (const name of [...ALWAYS, ...PERHAPS]) {
    test(`${name}: written, read again, and read-only`, async ({ folder, place }) => {
      if (name !== 'ext2' && name !== 'ext3' && name !== 'ext4') needsKernel(name)
      const image = join(folder, 'image')
      makeFilesystem(name, image)
      const isReadOnly = 'readOnly' in MAKERS[name]
      const device = await attach(image, { readOnly: isReadOnly })
      const descriptors = countDescriptors()
      const mount = await device.mount(place)
      expect(mount).toMatchObject({ path: place, target: place, source: device.path, fsType: name })
      const [listed] = mountsUnder(place)
      expect(listed).toMatchObject({ target: place, source: device.path, fstype: name })
      expect(listed?.options.split(',')).toEqual(expect.arrayContaining(['nosuid', 'nodev', isReadOnly ? 'ro' : 'rw']))
      if (!isReadOnly) writeFileSync(join(place, 'hello'), 'hello\n')
      expect(await mount.unmount()).toBe('unmounted')
      expect(mountsUnder(folder)).toEqual([])
      // A mount with a place holds no descriptor.
      expect(countDescriptors()).toBe(descriptors)

      const again = await device.mount(place, { readOnly: true })
      expect(readFileSync(join(place, 'hello'), 'utf8')).toBe('hello\n')
      expect(() => writeFileSync(join(place, 'more'), '')).toThrow('EROFS')
      await again.unmount()
      expect(await device.detach()).toBe('detached')
      expectDetached(image)
    })
  }

  for (const name of PERHAPS.filter((each) => !kernelHas(each))) {
    test(`${name}, which this kernel does not have`, async ({ folder, place }) => {
      const image = join(folder, 'image')
      makeFilesystem(name, image)
      await using device = await attach(image, { readOnly: true })
      const error = await failure('filesystem-refused', () => device.mount(place))
      expect(error).toMatchObject({ code: 'ENODEV', syscall: 'fsopen', path: device.path })
      expect(error.message).toContain(`this kernel has no filesystem ${name}`)
    })
  }

  test('a device that is read-only is mounted so, and refuses to be mounted otherwise', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'), { readOnly: true })
    const error = await failure('filesystem-refused', () => device.mount(place, { readOnly: false }))
    expect(error).toMatchObject({ code: 'EACCES', hint: 'mount it with readOnly: true' })
    const mount = await device.mount(place)
    expect(mountsUnder(place)[0]?.options).toMatch(/^ro,/)
    await mount.unmount()
  })
})

describe('what is no filesystem', () => {
  test('nothing at all', async ({ image, place }) => {
    await using device = await attach(image('zeros'))
    expect((await failure('unknown-filesystem', () => device.mount(place))).message).toContain('no filesystem on it')
  })

  test.for([
    ['swap', 'swap space'],
    ['crypto_LUKS', 'a LUKS container'],
  ] as const)('%s: it says what there is', async ([name, text], { folder, place }) => {
    makeFilesystem(name, join(folder, name))
    await using device = await attach(join(folder, name))
    const error = await failure('unknown-filesystem', () => device.mount(place))
    expect(error.message).toContain(text)
    expect(error.hint).toBeTruthy()
  })

  test('several: both are told, and the one that is named is mounted', async ({ folder, place }) => {
    needsKernel('btrfs')
    makeFilesystem('btrfs', join(folder, 'two'))
    const fd = openSync(join(folder, 'two'), 'r+')
    writeSync(fd, Buffer.from('XFSB'), 0, 4, 0)
    closeSync(fd)
    await using device = await attach(join(folder, 'two'))
    expect((await failure('unknown-filesystem', () => device.mount(place))).message).toContain('xfs and btrfs')
    const mount = await device.mount(place, { fsType: 'btrfs' })
    await mount.unmount()
  })

  test.for([
    ['ext4', 1024 + 0x78],
    ['xfs', 108],
    ['btrfs', 0x1_0000 + 0x12b],
  ] as const)('%s with a superblock that is damaged: what is wrong with it', async ([name, at], { folder, place }) => {
    if (name !== 'ext4') needsKernel(name)
    const file = join(folder, name)
    makeFilesystem(name, file)
    const fd = openSync(file, 'r+')
    writeSync(fd, Buffer.from('other'), 0, 5, at)
    closeSync(fd)
    await using device = await attach(file)
    const error = await failure('filesystem-refused', () => device.mount(place))
    expect(error.message).toContain(`${name}: the checksum of its superblock is 0x`)
    expect(error.hint).toContain('dmesg')
  })

  test('another filesystem than was said', async ({ folder, place }) => {
    needsKernel('xfs', 'squashfs')
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const xfs = await failure('filesystem-refused', () => device.mount(place, { fsType: 'xfs' }))
    expect(xfs.message).toContain('there is no superblock of xfs, but that of ext4')
    // The one that has words of its own for it
    const squashfs = await failure('filesystem-refused', () => device.mount(place, { fsType: 'squashfs' }))
    expect(squashfs.message).toContain("Can't find a SQUASHFS superblock")
    const none = await failure('filesystem-refused', () => device.mount(place, { fsType: 'nosuchfs' }))
    expect(none.message).toContain('this kernel has no filesystem nosuchfs')
  })

  test('a journal that has to be replayed, on a read-only device', async ({ folder, place }) => {
    const file = join(folder, 'image')
    makeFilesystem('ext4', file)
    {
      await using device = await attach(file)
      await using mount = await device.mount(place)
      writeFileSync(join(mount.path, 'before'), 'x')
      execFileSync('sync', ['-f', mount.path])
      // As a power cut would leave it.
      execFileSync('cp', ['--sparse=always', file, join(folder, 'cut')])
    }
    await using device = await attach(join(folder, 'cut'), { readOnly: true })
    const error = await failure('filesystem-refused', () => device.mount(place))
    expect(error).toMatchObject({ code: 'EROFS' })
    expect(error.message).toContain('its journal has to be replayed')
    expect(error.hint).toContain("'noload'")
    const mount = await device.mount(place, { options: 'noload' })
    expect(existsSync(join(place, 'lost+found'))).toBe(true)
    await mount.unmount()
  })
})

describe('options', () => {
  test('of the mount, of the filesystem, and as a list', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const optionsOf = async (options: string | string[] | undefined) => {
      await using mount = await device.mount(place, { options })
      return mountsUnder(mount.path)[0]?.options.split(',') ?? []
    }
    expect(await optionsOf(undefined)).toEqual(['rw', 'nosuid', 'nodev', 'relatime'])
    expect(await optionsOf('suid,dev')).toEqual(['rw', 'relatime'])
    const flags = 'nosuid,nodev,noexec,noatime,nodiratime'
    expect(await optionsOf('noexec,noatime,nodiratime')).toEqual(['rw', ...flags.split(',')])
    expect(await optionsOf(['ro', 'errors=remount-ro'])).toEqual(
      expect.arrayContaining(['ro', 'nosuid', 'nodev', 'errors=remount-ro']),
    )
    expect(await optionsOf('')).toContain('rw')
  })

  test('that the filesystem does not take: its own words', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const unknown = await failure('filesystem-refused', () => device.mount(place, { options: 'nosuchoption' }))
    expect(unknown).toMatchObject({ code: 'EINVAL', syscall: 'fsconfig' })
    if (unknown.hint?.includes('dmesg')) skipForKernel('words of ext4')
    expect(unknown.message).toContain("ext4: Unknown parameter 'nosuchoption'")
    const wrong = await failure('filesystem-refused', () => device.mount(place, { options: ['errors=maybe'] }))
    expect(wrong.message).toContain("Bad value for 'errors'")
    // Of one text each: nothing is split in a list
    const list = await failure('filesystem-refused', () => device.mount(place, { options: ['noatime,nodev'] }))
    expect(list.message).toContain("Unknown parameter 'noatime,nodev'")
    expect(mountsUnder(folder)).toEqual([])
  })

  test('that are refused before any system call', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const wrong: [unknown, unknown][] = [
      ['', {}],
      ['a\0b', {}],
      [7, {}],
      [undefined, {}],
      [place, { fsType: 'a b' }],
      [place, { options: 7 }],
      [place, { options: [7] }],
      [place, { options: 'a\0b' }],
      [place, { options: 'source=/dev/sda' }],
      [place, { options: '=x' }],
      [place, { options: 'ro', readOnly: false }],
      [place, { readOnly: 'yes' }],
      [place, { partition: {} }],
      [place, { partition: { label: '' } }],
      [place, { makeTarget: 1 }],
      [place, { target: place }],
      [place, { timeout: -1 }],
    ]
    for (const [target, options] of wrong) {
      const call = () => device.mount(target as string, options as object)
      await expect(call(), JSON.stringify([target, options])).rejects.toMatchObject({ code: /^ERR_/ })
    }
    await expect(device.mount(place, { partition: 0 })).rejects.toBeInstanceOf(RangeError)
    await expect(device.mount(place, { partition: { uuid: 'x' } })).rejects.toBeInstanceOf(RangeError)
  })
})

describe('the target', () => {
  test('missing, made where that is asked for, and taken away again where the mount fails', async ({
    folder,
    place,
  }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const target = join(place, 'new')
    const error = await failure('target', () => device.mount(target))
    expect(error).toMatchObject({ code: 'ENOENT', path: target })
    expect(error.hint).toContain('makeTarget')
    await failure('target', () => device.mount(join(target, 'deeper'), { makeTarget: true }))
    await failure('filesystem-refused', () => device.mount(target, { makeTarget: true, fsType: 'xfs' }))
    expect(readdirSync(place)).toEqual([])

    const mount = await device.mount(target, { makeTarget: true })
    expect(mountsUnder(place).map((listed) => listed.target)).toEqual([target])
    await mount.unmount()
    expect(readdirSync(place)).toEqual(['new'])
  })

  test('a file, a path through a file, and the root', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    writeFileSync(join(place, 'file'), '')
    await using device = await attach(join(folder, 'image'))
    expect((await failure('target', () => device.mount(join(place, 'file')))).message).toContain('is not a folder')
    await failure('target', () => device.mount(join(place, 'file', 'x')))
    expect((await failure('target', () => device.mount('/'))).message).toContain('the root')
  })

  test('named in other ways: relative, with slashes and dots', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const before = process.cwd()
    process.chdir(folder)
    onTestFinished(() => process.chdir(before))
    for (const target of ['mnt', './mnt', 'mnt/', 'mnt//', 'mnt/.', `${place}/../mnt`]) {
      const mount = await device.mount(target)
      expect(mount.path, target).toBe(place)
      process.chdir('/')
      expect(await mount.unmount(), target).toBe('unmounted')
      process.chdir(folder)
    }
  })

  test('a link is followed, but not one that others can have put there', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    symlinkSync(place, join(folder, 'absolute'))
    symlinkSync('mnt', join(folder, 'relative'))
    symlinkSync('absolute', join(folder, 'twice'))
    symlinkSync('nowhere', join(folder, 'dangling'))
    symlinkSync('round', join(folder, 'round'))
    for (const link of ['absolute', 'relative', 'twice']) {
      const mount = await device.mount(join(folder, link))
      expect(mount.target).toBe(place)
      await mount.unmount()
    }
    await failure('target', () => device.mount(join(folder, 'dangling')))
    expect((await failure('target', () => device.mount(join(folder, 'round')))).message).toContain('too many')

    const theirs = join(folder, 'theirs')
    mkdirSync(theirs)
    symlinkSync(place, join(theirs, 'link'))
    symlinkSync(join(theirs, 'link'), join(folder, 'through'))
    for (const [mode, owner] of [
      [0o777, 0],
      [0o1777, 0],
      [0o775, 0],
      [0o755, 65_534],
    ] as const) {
      chmodSync(theirs, mode)
      chownSync(theirs, owner, owner)
      for (const link of [join(theirs, 'link'), join(folder, 'through')]) {
        const error = await failure('target', () => device.mount(link))
        expect(error.message, `${mode.toString(8)} ${owner}`).toContain('a symbolic link in a folder that others can')
      }
    }
    chmodSync(theirs, 0o755)
    chownSync(theirs, 0, 0)
    await using mount = await device.mount(join(theirs, 'link'))
    expect(mount.target).toBe(place)
  })

  test('mounted on already: another device on top, but not the same one', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'a'))
    makeFilesystem('ext2', join(folder, 'b'))
    await using a = await attach(join(folder, 'a'))
    await using b = await attach(join(folder, 'b'))
    const below = await a.mount(place)
    expect((await failure('target', () => a.mount(place))).message).toContain('is mounted there already')
    const above = await b.mount(place)
    expect(mountsUnder(place).map(({ fstype }) => fstype)).toEqual(['ext4', 'ext2'])

    const error = await failure('in-use', () => below.unmount())
    expect(error.message).toContain(`${b.path} (ext2) is mounted on top of it`)
    expect(error.holders).toEqual([{ device: a.path, kind: 'mount', mountPoint: place, fsType: 'ext2' }])
    await above.unmount()
    await below.unmount()
  })

  test('a name with spaces, newlines, a backslash and umlauts', async ({ folder, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const target = join(place, 'a b\nc\\040d ü')
    mkdirSync(target)
    const mount = await device.mount(target)
    expect(mount.target).toBe(target)
    const on = await device.holders()
    expect(on.map((holder) => holder.kind)).toEqual(['mount'])
    expect(await device.detach({ unmount: true })).toBe('detached')
    await failure('not-mounted', () => mount.unmount())
  })
})

describe('partitions', () => {
  beforeEach(() => needs('sfdisk'))

  test('by number, label, UUID and type; the kernel is told where it does not know them', async ({
    folder,
    image,
    place,
  }) => {
    const file = image('disk', 8 << 20)
    sfdisk(file, TWO)
    const inner = join(folder, 'inner')
    execFileSync('mkfs.ext4', ['-q', '-F', inner, '2M'], { env })
    const fd = openSync(file, 'r+')
    writeSync(fd, readFileSync(inner), 0, undefined, 4096 * 512)
    closeSync(fd)

    await using device = await attach(file)
    const whole = await failure('unknown-filesystem', () => device.mount(place))
    expect(whole.message).toContain('a partition table: 1 (first), 2 (second)')
    expect((await failure('unknown-filesystem', () => device.mount(place, { partition: 1 }))).path).toBe(
      `${device.path}p1`,
    )
    for (const partition of [3, { label: 'third' }, { label: 'Second' }]) {
      const error = await failure('no-such-partition', () => device.mount(place, { partition }))
      expect(error).toMatchObject({ code: 'ENOENT', path: device.path })
    }
    // What was told to the kernel for a mount that failed is taken back.
    expect(await device.partitions()).toEqual([])

    const uuid = execFileSync('sfdisk', ['--part-uuid', file, '2'], { env, encoding: 'utf8' }).trim()
    for (const partition of [2, { label: 'second' }, { uuid }, { uuid: uuid.toLowerCase() }]) {
      const mount = await device.mount(place, { partition })
      expect(mount).toMatchObject({ source: `${device.path}p2`, fsType: 'ext4' })
      expect(mountsUnder(place)[0]).toMatchObject({ source: `${device.path}p2`, fstype: 'ext4' })
      await mount.unmount()
    }
    const type = '0FC63DAF-8483-4772-8E79-3D69D8477DE4'
    const both = await failure('no-such-partition', () => device.mount(place, { partition: { type } }))
    expect(both.message).toContain('partitions 1, 2')
  })
})

describe('whose device it is', () => {
  test('a handle that is closed, and a free device', async ({ folder, image, place }) => {
    makeFilesystem('ext4', join(folder, 'image'))
    const device = await attach(join(folder, 'image'))
    await device.detach()
    await failure('closed', () => device.mount(place))
    const other = await attach(image('other'))
    const handle = await open(other.number)
    await other.detach({ lazy: true })
    await handle.close()
    const free = await open(other.number)
    await failure('not-attached', () => free.mount(place))
    await free.close()
  })

  test('a node that is that of another device by now', async ({ folder, place }) => {
    needsKernel('btrfs')
    for (const name of ['ext4', 'btrfs'] as const) makeFilesystem(name, join(folder, name))
    // In a mount namespace of its own, so that nobody else sees the node.
    const script = `
      import { attach } from '${new URL('../../dist/index.js', import.meta.url).pathname}'
      import { execFileSync } from 'node:child_process'
      for (const name of ['ext4', 'btrfs']) {
        const device = await attach('${folder}/' + name)
        const other = await attach('${folder}/ext4.copy')
        execFileSync('mount', ['--bind', other.path, device.path])
        const error = await device.mount('${place}').catch((error) => error)
        console.log(name, error.reason)
        execFileSync('umount', [device.path])
        await other.detach()
        await device.detach()
      }`
    execFileSync('cp', [join(folder, 'ext4'), join(folder, 'ext4.copy')])
    const output = execFileSync('unshare', ['--mount', process.execPath, '--input-type=module', '--eval', script], {
      encoding: 'utf8',
    })
    expect(output).toMatch(/^ext4 (replaced|not-a-loop-device)\nbtrfs (replaced|not-a-loop-device)\n$/)
  })

  test('without CAP_SYS_ADMIN: permission, and nothing is left', async ({ folder, place }) => {
    needs('setpriv')
    makeFilesystem('ext4', join(folder, 'image'))
    await using device = await attach(join(folder, 'image'))
    const script = `
      import { open } from '${new URL('../../dist/index.js', import.meta.url).pathname}'
      const device = await open(${device.number})
      for (const target of ['${place}', null]) {
        const error = await device.mount(target).catch((error) => error)
        console.log(error.reason, error.code, error.hint)
      }
      await device.close()`
    const output = execFileSync(
      'setpriv',
      ['--inh-caps=-sys_admin', '--bounding-set=-sys_admin', process.execPath, '--input-type=module', '--eval', script],
      { encoding: 'utf8' },
    )
    expect(output).toBe('permission EPERM run as root or add CAP_SYS_ADMIN\n'.repeat(2))
  })
})

test('a backing file that does not answer: the event loop goes on, and the mount is given up in time', async ({
  folder,
  place,
}) => {
  needsKernel('fuse')
  const slow = join(folder, 'slow')
  mkdirSync(slow)
  const script = fileURLToPath(new URL('../kernel/fixtures/hanging_fs.py', import.meta.url))
  const server = spawn('python3', [script, slow, String(1 << 20)], { stdio: ['pipe', 'pipe', 'inherit'] })
  onTestFinished(() => void server.kill('SIGKILL'))
  const exit = once(server, 'exit')
  try {
    await once(server.stdout, 'data')
    const device = await attach(join(slow, 'image'), { readOnly: true, overlap: 'allow' })
    server.kill('SIGSTOP')
    let turns = 0
    const ticking = setInterval(() => turns++, 1)
    const descriptors = countDescriptors()
    try {
      const error = await failure('timeout', () => device.mount(place, { timeout: 300 }))
      expect(error.message).toContain('did not answer in time')
      const reason = new Error('enough')
      const controller = new AbortController()
      setTimeout(() => controller.abort(reason), 100)
      await expect(device.mount(null, { signal: controller.signal })).rejects.toBe(reason)
    } finally {
      clearInterval(ticking)
      server.kill('SIGCONT')
    }
    expect(turns).toBeGreaterThan(10)
    expect(await device.detach()).toBe('detached')
    await vi.waitFor(() => expect(countDescriptors()).toBe(descriptors - 1))
    expect(mountsUnder(place)).toEqual([])
  } finally {
    execFileSync('umount', ['--lazy', slow])
  }
  await exit
})

test('another mount of the same device is one filesystem, and both are unmounted', async ({ folder, place }) => {
  makeFilesystem('ext4', join(folder, 'image'))
  const other = join(folder, 'other')
  mkdirSync(other)
  await using device = await attach(join(folder, 'image'))
  const [a, b] = [await device.mount(place), await device.mount(other)]
  writeFileSync(join(place, 'x'), 'from a')
  expect(readFileSync(join(other, 'x'), 'utf8')).toBe('from a')
  // The kernel cannot have it read-only once and writable once.
  const error = await failure('in-use', () => device.mount(null, { readOnly: true }))
  expect(error.holders?.map(({ kind }) => kind)).toEqual(['mount', 'mount'])
  expect(await a.unmount()).toBe('unmounted')
  expect(readFileSync(join(other, 'x'), 'utf8')).toBe('from a')
  expect(await b.unmount()).toBe('unmounted')
})

test('moved, renamed or unmounted by somebody else: no other mount is touched', async ({ folder, place }) => {
  for (const name of ['a', 'b']) makeFilesystem('ext2', join(folder, name))
  await using a = await attach(join(folder, 'a'))
  await using b = await attach(join(folder, 'b'))
  const mount = await a.mount(place)
  execFileSync('umount', [place])
  const others = await b.mount(place)
  // It has the place, and can have the number that ours had.
  const error = await failure('not-mounted', () => mount.unmount())
  expect(error.message).toContain('is not mounted there any more')
  expect(mountsUnder(place).map(({ source }) => source)).toEqual([b.path])
  await others.unmount()

  // A mount point cannot be renamed, but the folder that it is in.
  const inside = join(place, 'up', 'target')
  mkdirSync(inside, { recursive: true })
  const renamed = await a.mount(inside)
  renameSync(join(place, 'up'), join(place, 'elsewhere'))
  for (const isThere of [false, true]) {
    if (isThere) mkdirSync(inside, { recursive: true })
    const away = await failure('not-mounted', () => renamed.unmount())
    expect(away.message).toContain(`was moved to ${join(place, 'elsewhere', 'target')}`)
  }
  execFileSync('umount', [join(place, 'elsewhere', 'target')])
})

test('a mount outlives the process that made it', async ({ folder, place }) => {
  makeFilesystem('ext4', join(folder, 'image'))
  const script = `
    import { mountImage } from '${new URL('../../dist/index.js', import.meta.url).pathname}'
    const mount = await mountImage('${folder}/image', '${place}')
    process.stdout.write(mount.source)
    process.stdin.resume()`
  const child = spawn(process.execPath, ['--input-type=module', '--eval', script], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const exit = once(child, 'exit')
  const [source] = (await once(child.stdout, 'data')) as [Buffer]
  child.kill('SIGKILL')
  await exit
  expect(mountsUnder(place)).toMatchObject([{ target: place, source: String(source), fstype: 'ext4' }])
  execFileSync('umount', [place])
  expectDetached(join(folder, 'image'))
})
