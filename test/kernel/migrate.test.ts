import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import {
  chmodSync,
  chownSync,
  closeSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { afterEach, describe, expect, onTestFinished } from 'vitest'
import {
  attach,
  type AttachOptions,
  type LoopDevice,
  type LoopErrorReason,
  type MigrateOptions,
  type Progress,
} from '../../lib/index.ts'
import { observe } from '../../lib/kernel/observe-calls.ts'
import { kernelHas, needs, needsKernel, skipForKernel } from '../needs.ts'
import { eachCall, limit, STEP } from '../scale.ts'
import { countDescriptors, failure, removeDevice, sysfs, test, unusedNumber } from './support.ts'

const LONG = { timeout: limit(60_000) }

const KiB = 1 << 10
const MiB = 1 << 20

afterEach(() => observe(undefined))

function run(command: string, ...args: string[]): string {
  return execFileSync(command, args, { encoding: 'utf8', stdio: 'pipe' })
}

/** A filesystem mounted for the length of a block; declared before the devices that have files on it. */
class Mount implements Disposable {
  readonly path: string
  #mounted = true

  constructor(path: string, ...args: string[]) {
    mkdirSync(path)
    run('mount', ...args, path)
    this.path = path
  }

  unmount(): void {
    if (!this.#mounted) return
    run('umount', this.path)
    this.#mounted = false
  }

  [Symbol.dispose](): void {
    this.unmount()
  }
}

function mountTmpfs(path: string, options = 'size=64m'): Mount {
  return new Mount(path, '-t', 'tmpfs', '-o', options, 'tmpfs')
}

/** A filesystem in an image in the folder, mounted with a loop device of mount's own. */
function mountImage(folder: string, type: string, bytes: number): Mount {
  const image = join(folder, `${type}.image`)
  writeFileSync(image, '')
  truncateSync(image, bytes)
  run(`mkfs.${type.replace('-fuse', '')}`, image)
  return new Mount(join(folder, type), '-t', type, '-o', 'loop', image)
}

/** An ext4 image with one file in it: `witness`, of these bytes. */
function makeExt4(path: string, witness: Buffer): string {
  const tree = `${path}.tree`
  mkdirSync(tree)
  writeFileSync(join(tree, 'witness'), witness)
  run('mkfs.ext4', '-q', '-d', tree, path, '8M')
  rmSync(tree, { recursive: true })
  return path
}

/** None of them a zero, which would be the same as a hole. */
function randomData(bytes: number): Buffer {
  return Buffer.from(randomBytes(bytes).map((byte) => byte || 1))
}

/** A file of bytes that are nowhere the same. */
function makeRandom(path: string, bytes = MiB): string {
  writeFileSync(path, randomData(bytes))
  return path
}

/** 64 MiB, with 1 MiB of data at each of three places. */
function makeSparse(path: string): string {
  writeFileSync(path, '')
  truncateSync(path, 64 * MiB)
  const fd = openSync(path, 'r+')
  for (const at of [0, 20 * MiB, 63 * MiB]) writeSync(fd, randomData(MiB), 0, MiB, at)
  closeSync(fd)
  return path
}

/** The bytes the device shows, read from its backing file and not from the cache. */
function shown(device: LoopDevice): Buffer {
  run('blockdev', '--flushbufs', device.path)
  return readFileSync(device.path)
}

/** As another program does it, which keeps to no lock. */
function setOffset(path: string, offset: number): void {
  const script = `
open(my $device, '+<', $ARGV[0]) or die;
my $info = "\\0" x 232;
ioctl($device, 0x4C05, $info) or die;
substr($info, 24, 8) = pack('Q', $ARGV[1]);
ioctl($device, 0x4C04, $info) or die`
  run('perl', '-e', script, path, String(offset))
}

function dropCaches(): void {
  writeFileSync('/proc/sys/vm/drop_caches', '3')
}

function allocated(path: string): number {
  return statSync(path).blocks * 512
}

/** Every name in the folder, with what is under it. */
function listing(folder: string): Record<string, string> | undefined {
  if (!existsSync(folder)) return undefined
  return Object.fromEntries(
    readdirSync(folder).map((name) => {
      const path = join(folder, name)
      const stat = lstatSync(path)
      if (stat.isSymbolicLink()) return [name, `-> ${readlinkSync(path)}`]
      if (!stat.isFile()) return [name, `inode ${stat.ino}`]
      return [name, `inode ${stat.ino} ${createHash('sha1').update(readFileSync(path)).digest('hex')}`]
    }),
  )
}

/** All that a migration that failed must have left as it was. */
function look(device: LoopDevice, folder: string): unknown {
  return {
    backingFile: sysfs(device.number, 'loop/backing_file'),
    diskSeq: sysfs(device.number, 'diskseq'),
    folder: listing(folder),
    descriptors: countDescriptors(),
  }
}

/** It is refused for that reason, and everything is as before. */
async function refused(
  reason: LoopErrorReason,
  device: LoopDevice,
  destination: string,
  options?: MigrateOptions,
): Promise<Error> {
  const before = look(device, dirname(destination))
  const error = await failure(reason, () => device.migrate(destination, options))
  expect(look(device, dirname(destination))).toEqual(before)
  return error
}

/** The copy while a migration is under way, which has no name: by a descriptor of this process. */
function copyFor(destination: string): string {
  const copies = readdirSync('/proc/self/fd').filter((fd) => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`).startsWith(`${dirname(destination)}/#`)
    } catch {
      return false
    }
  })
  expect(copies).toHaveLength(1)
  return `/proc/${process.pid}/fd/${copies[0]}`
}

function folderIn(folder: string, name: string): string {
  const path = join(folder, name)
  mkdirSync(path)
  return path
}

describe('migrate', () => {
  test('the device is backed by a whole copy, and tells how far it is', async ({ folder }) => {
    const source = makeRandom(join(folder, 'disk'), 3 * MiB)
    const bytes = readFileSync(source)
    const place = folderIn(folder, 'place')
    const destination = join(place, 'copy')
    await using device = await attach(source, { readOnly: true, reference: 'tag' })
    const before = await device.status()
    const descriptors = countDescriptors()
    const seen: Progress[] = []
    const result = await device.migrate(relative(process.cwd(), destination), {
      onProgress: (progress) => seen.push(progress),
    })
    expect(countDescriptors()).toBe(descriptors)
    expect(result).toEqual({
      destination,
      bytesCopied: 3 * MiB,
      bytesSparse: 0,
      seconds: expect.any(Number) as number,
      method: expect.stringMatching(/^(reflink|copy_file_range)$/) as string,
      verified: true,
    })
    expect(result.seconds).toBeGreaterThan(0)

    expect(sysfs(device.number, 'loop/backing_file')).toBe(destination)
    expect(device.ref.diskSeq).toBe(Number(sysfs(device.number, 'diskseq')))
    const after = await device.status()
    expect(after).toEqual({
      ...before,
      backingFile: destination,
      backingInode: String(statSync(destination).ino),
      diskSeq: device.ref.diskSeq,
    })
    expect(readFileSync(destination).equals(bytes)).toBe(true)
    expect(readdirSync(place)).toEqual(['copy'])
    expect(statSync(destination).mode).toBe(statSync(source).mode)

    const phases = seen.map(({ phase }) => phase)
    expect(phases.filter((phase, i) => phase !== phases[i - 1])).toEqual(['copy', 'flush', 'verify', 'switch'])
    expect(new Set(seen.map(({ total }) => total))).toEqual(new Set([3 * MiB]))
    for (const phase of new Set(phases)) {
      const copied = seen.filter((progress) => progress.phase === phase).map((progress) => progress.copied)
      expect(copied).toEqual(copied.toSorted((a, b) => a - b))
      expect(copied.at(-1)).toBe(3 * MiB)
    }
    expect(seen.every(({ bytesPerSecond }) => bytesPerSecond >= 0)).toBe(true)

    rmSync(source)
    expect(shown(device).equals(bytes)).toBe(true)
    expect(await device.detach()).toBe('detached')
  })

  test('the medium of the source can be unmounted right afterwards', async ({ folder }) => {
    using medium = mountTmpfs(join(folder, 'medium'))
    const source = makeRandom(join(medium.path, 'disk'))
    const bytes = readFileSync(source)
    const destination = join(folder, 'copy')
    await using device = await attach(source, { readOnly: true })
    expect(() => execFileSync('umount', [medium.path], { stdio: 'ignore' })).toThrow()
    await device.migrate(destination)
    rmSync(source)
    medium.unmount()
    expect(sysfs(device.number, 'loop/backing_file')).toBe(destination)
    expect(shown(device).equals(bytes)).toBe(true)
  })

  test('without verify it does not read back', async ({ folder, image }) => {
    await using device = await attach(image('disk', MiB, 3), { readOnly: true })
    const phases: string[] = []
    const onProgress = ({ phase }: Progress) => phases.push(phase)
    const result = await device.migrate(join(folder, 'copy'), { verify: false, onProgress })
    expect(result.verified).toBe(false)
    expect(phases).not.toContain('verify')
    expect(phases.at(-1)).toBe('switch')
  })

  test('there and back again, through one handle', async ({ folder }) => {
    const source = makeRandom(join(folder, 'disk'))
    const bytes = readFileSync(source)
    await using device = await attach(source, { readOnly: true })
    await device.migrate(join(folder, 'copy'))
    await device.migrate(source, { overwrite: true })
    await Promise.all([device.migrate(join(folder, 'one')), device.migrate(join(folder, 'two'))])
    expect(sysfs(device.number, 'loop/backing_file')).toBe(join(folder, 'two'))
    for (const name of ['disk', 'copy', 'one', 'two']) {
      expect(readFileSync(join(folder, name)).equals(bytes)).toBe(true)
    }
    expect(readdirSync(folder).toSorted()).toEqual(['copy', 'disk', 'one', 'two'])
  })
})

describe('method', () => {
  test('copy_file_range on one filesystem, read-write between two', async ({ folder }) => {
    using medium = mountTmpfs(join(folder, 'medium'))
    const bytes = readFileSync(makeRandom(join(medium.path, 'disk')))
    await using device = await attach(join(medium.path, 'disk'), { readOnly: true })
    const near = join(medium.path, 'near')
    expect(await device.migrate(near)).toMatchObject({ method: 'copy_file_range', bytesCopied: MiB })
    expect(readFileSync(near).equals(bytes)).toBe(true)
    const far = join(folder, 'far')
    expect(await device.migrate(far)).toMatchObject({ method: 'read-write', bytesCopied: MiB, bytesSparse: 0 })
    expect(readFileSync(far).equals(bytes)).toBe(true)
    expect(readdirSync(medium.path).toSorted()).toEqual(['disk', 'near'])
    expect(readdirSync(folder).toSorted()).toEqual(['far', 'medium'])
  })

  for (const type of ['btrfs', 'xfs'] as const) {
    test(`reflink on ${type}`, async ({ folder }) => {
      needsKernel(type)
      needs(`mkfs.${type}`)
      using place = mountImage(folder, type, 400 * MiB)
      const source = makeRandom(join(place.path, 'disk'), 2 * MiB)
      const bytes = readFileSync(source)
      await using device = await attach(source, { readOnly: true })
      const destination = join(place.path, 'copy')
      const result = await device.migrate(destination)
      expect(result).toMatchObject({ method: 'reflink', bytesCopied: 2 * MiB, bytesSparse: 0, verified: true })
      expect(sysfs(device.number, 'loop/backing_file')).toBe(destination)
      expect(readdirSync(place.path).toSorted()).toEqual(['copy', 'disk'])
      rmSync(source)
      expect(readFileSync(destination).equals(bytes)).toBe(true)
      expect(shown(device).equals(bytes)).toBe(true)
      // part of a file is copied
      await using part = await attach(destination, { readOnly: true, offset: MiB })
      const window = join(place.path, 'window')
      expect(await part.migrate(window)).toMatchObject({ method: 'copy_file_range', bytesCopied: MiB })
      expect(shown(part).equals(bytes.subarray(MiB))).toBe(true)
    })
  }

  test('from the device, where the source was unlinked or another file is in its place', async ({ folder }) => {
    const source = makeRandom(join(folder, 'disk'))
    const bytes = readFileSync(source)
    await using device = await attach(source, { readOnly: true })
    rmSync(source)
    const first = join(folder, 'first')
    expect(await device.migrate(first)).toMatchObject({ method: 'device', bytesCopied: MiB, bytesSparse: 0 })
    expect(readFileSync(first).equals(bytes)).toBe(true)

    makeRandom(join(folder, 'other'))
    renameSync(join(folder, 'other'), first)
    const other = readFileSync(first)
    const second = join(folder, 'second')
    expect(await device.migrate(second)).toMatchObject({ method: 'device', bytesCopied: MiB })
    expect(readFileSync(second).equals(bytes)).toBe(true)
    expect(readFileSync(first).equals(other)).toBe(true)

    rmSync(second)
    mkdirSync(second)
    const third = join(folder, 'third')
    expect(await device.migrate(third)).toMatchObject({ method: 'device' })
    expect(shown(device).equals(bytes)).toBe(true)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(third)
    // what only the kernel still had is readable by its owner alone
    expect(statSync(third).mode & 0o777).toBe(0o600)
  })
})

describe('holes', () => {
  const kept = { bytesCopied: 3 * MiB, bytesSparse: 61 * MiB }
  const cases: [string, MigrateOptions, (result: { bytesCopied: number; bytesSparse: number }) => void][] = [
    ['are kept', {}, (result) => expect(result).toMatchObject(kept)],
    [
      'are filled with sparse: false',
      { sparse: false },
      (result) => expect(result).toMatchObject({ bytesCopied: 64 * MiB, bytesSparse: 0 }),
    ],
  ]
  for (const [name, options, check] of cases) {
    for (const how of ['the file', 'the file on another filesystem', 'the device'] as const) {
      test(`${name}, from ${how}`, async ({ folder }) => {
        using medium = mountTmpfs(join(folder, 'medium'))
        const source = makeSparse(join(how === 'the file on another filesystem' ? medium.path : folder, 'disk'))
        const bytes = readFileSync(source)
        await using device = await attach(source, { readOnly: true })
        if (how === 'the device') rmSync(source)
        const destination = join(folder, 'copy')
        const result = await device.migrate(destination, options)
        check(result)
        if (how !== 'the file') expect(result.method).toBe(how === 'the device' ? 'device' : 'read-write')
        expect(statSync(destination).size).toBe(64 * MiB)
        if (options.sparse === false) expect(allocated(destination)).toBeGreaterThanOrEqual(64 * MiB)
        else expect(allocated(destination)).toBeLessThan(4 * MiB)
        expect(readFileSync(destination).equals(bytes)).toBe(true)
        expect(shown(device).equals(bytes)).toBe(true)
      })
    }
  }

  test('an image of nothing but a hole', async ({ folder, image }) => {
    await using device = await attach(image('disk', 64 * MiB), { readOnly: true })
    const result = await device.migrate(join(folder, 'copy'))
    expect(result).toMatchObject({ bytesCopied: 0, bytesSparse: 64 * MiB, verified: true })
    expect(allocated(join(folder, 'copy'))).toBeLessThan(MiB)
    expect(shown(device).equals(Buffer.alloc(64 * MiB))).toBe(true)
  })

  // Bug: xfs shares the blocks in copy_file_range too, holes and all.
  test('on a filesystem that shares blocks, sparse: false allocates all the same', async ({ folder }) => {
    needsKernel('xfs')
    needs('mkfs.xfs')
    using place = mountImage(folder, 'xfs', 400 * MiB)
    await using device = await attach(makeSparse(join(place.path, 'disk')), { readOnly: true })
    const destination = join(place.path, 'copy')
    await device.migrate(destination, { sparse: false })
    expect(allocated(destination)).toBeGreaterThanOrEqual(64 * MiB)
  })

  test('on a filesystem without holes they are zeros', async ({ folder }) => {
    // where the kernel has no vfat, exfat in user space serves
    const type = kernelHas('vfat') ? 'vfat' : 'exfat-fuse'
    if (type === 'vfat') needs('mkfs.vfat')
    else {
      if (!kernelHas('fuse')) skipForKernel('vfat')
      needs('mkfs.exfat', 'mount.exfat-fuse')
    }
    using place = mountImage(folder, type, 128 * MiB)
    const source = makeSparse(join(folder, 'disk'))
    const bytes = readFileSync(source)
    await using device = await attach(source, { readOnly: true })
    const destination = join(place.path, 'copy')
    expect(await device.migrate(destination)).toMatchObject({ ...kept, method: 'read-write' })
    expect(readFileSync(destination).equals(bytes)).toBe(true)
    expect(shown(device).equals(bytes)).toBe(true)
    expect(readdirSync(place.path)).toEqual(['copy'])
    // there are no hard links either
    await refused('destination-exists', device, join(place.path, 'copy'))
  })
})

describe('a window', () => {
  const offset = 64 * KiB
  const sizeLimit = 512 * KiB
  for (const how of ['the file', 'the file on another filesystem', 'the device'] as const) {
    test(`is at the same place in the copy, and all that is copied from ${how}`, async ({ folder }) => {
      using medium = mountTmpfs(join(folder, 'medium'))
      const source = makeRandom(join(how === 'the file on another filesystem' ? medium.path : folder, 'disk'))
      const bytes = readFileSync(source)
      await using device = await attach(source, { readOnly: true, offset, sizeLimit })
      const window = bytes.subarray(offset, offset + sizeLimit)
      expect(shown(device).equals(window)).toBe(true)
      if (how === 'the device') rmSync(source)
      const destination = join(folder, 'copy')
      const totals: number[] = []
      const onProgress = ({ total }: Progress) => totals.push(total)
      expect(await device.migrate(destination, { onProgress })).toMatchObject({
        bytesCopied: sizeLimit,
        bytesSparse: 0,
      })
      expect(new Set(totals)).toEqual(new Set([sizeLimit]))

      const copy = readFileSync(destination)
      expect(copy.length).toBe(offset + sizeLimit)
      expect(copy.subarray(0, offset).equals(Buffer.alloc(offset))).toBe(true)
      expect(copy.subarray(offset).equals(window)).toBe(true)
      expect(allocated(destination)).toBeLessThan(offset + sizeLimit)
      expect(shown(device).equals(window)).toBe(true)
      expect(await device.status()).toMatchObject({ offset, sizeLimit, size: sizeLimit, backingFile: destination })
    })
  }

  test('no sector, no byte: what is no whole sector at the end is not shown, and need not be copied', async ({
    folder,
  }) => {
    const source = makeRandom(join(folder, 'disk'), 10_000)
    const bytes = readFileSync(source)
    await using device = await attach(source, { readOnly: true, offset: 512 })
    await device.migrate(join(folder, 'copy'))
    expect(shown(device).equals(bytes.subarray(512, 512 + 18 * 512))).toBe(true)
    expect(readFileSync(join(folder, 'copy')).subarray(512, 9728).equals(bytes.subarray(512, 9728))).toBe(true)
  })
})

describe('what is refused changes nothing', () => {
  test('a destination that exists', async ({ folder, image }) => {
    const place = folderIn(folder, 'place')
    const file = join(place, 'file')
    writeFileSync(file, 'precious')
    await using device = await attach(image('disk'), { readOnly: true })
    const error = await refused('destination-exists', device, file)
    expect(error).toMatchObject({ code: 'EEXIST', path: file, hint: 'overwrite: true replaces a file' })
    expect(readFileSync(file, 'utf8')).toBe('precious')
  })

  test('one that comes to exist in the meantime', async ({ folder, image }) => {
    const destination = join(folderIn(folder, 'place'), 'copy')
    const source = image('disk')
    await using device = await attach(source, { readOnly: true })
    const onProgress = ({ phase }: Progress) => {
      if (phase === 'switch') writeFileSync(destination, 'precious')
    }
    const error = await failure('destination-exists', () => device.migrate(destination, { onProgress }))
    expect(error).toMatchObject({ code: 'EEXIST', path: destination })
    expect(readdirSync(dirname(destination))).toEqual(['copy'])
    expect(readFileSync(destination, 'utf8')).toBe('precious')
    expect(sysfs(device.number, 'loop/backing_file')).toBe(source)
  })

  test('the very file, by whichever name', async ({ folder, image }) => {
    const source = image('disk', MiB, 5)
    const hard = join(folder, 'hard')
    linkSync(source, hard)
    await using device = await attach(source, { readOnly: true })
    for (const destination of [source, hard]) {
      for (const overwrite of [false, true]) {
        const error = await refused('destination-exists', device, destination, { overwrite })
        expect(error).toMatchObject({ code: 'EEXIST', path: destination })
        expect(error.message).toContain('is the file that the device is backed by')
      }
    }
  })

  test('what is not a regular file', async ({ folder, image }) => {
    const place = folderIn(folder, 'place')
    writeFileSync(join(place, 'file'), 'precious')
    symlinkSync('file', join(place, 'link'))
    symlinkSync('nowhere', join(place, 'dangling'))
    mkdirSync(join(place, 'folder'))
    run('mkfifo', join(place, 'fifo'))
    await using device = await attach(image('disk'), { readOnly: true })
    for (const [name, type] of [
      ['link', 'a symbolic link'],
      ['dangling', 'a symbolic link'],
      ['folder', 'a directory'],
      ['fifo', 'not a regular file'],
    ] as const) {
      const path = join(place, name)
      expect(await refused('destination-exists', device, path)).toMatchObject({ code: 'EEXIST', path })
      const error = await refused('not-a-file-or-block-device', device, path, { overwrite: true })
      expect(error).toMatchObject({ code: 'EINVAL', path })
      expect(error.message).toContain(`is ${type}, and is not replaced`)
    }
  })

  test('a folder that is missing, or none', async ({ folder, image }) => {
    const source = image('disk')
    await using device = await attach(source, { readOnly: true })
    const missing = await refused('no-such-file', device, join(folder, 'missing', 'copy'))
    expect(missing).toMatchObject({ code: 'ENOENT' })
    expect(missing.message).toContain('the folder does not exist')
    expect(existsSync(join(folder, 'missing'))).toBe(false)
    const before = look(device, folder)
    expect(await failure('no-such-file', () => device.migrate(join(source, 'copy')))).toMatchObject({ code: 'ENOTDIR' })
    expect(look(device, folder)).toEqual(before)
  })

  test('a filesystem that is read-only', async ({ folder, image }) => {
    using place = mountTmpfs(join(folder, 'place'), 'ro')
    await using device = await attach(image('disk'), { readOnly: true })
    const error = await refused('permission', device, join(place.path, 'copy'))
    expect(error).toMatchObject({ code: 'EROFS' })
    expect(error.message).toContain('read-only')
  })

  test('a full filesystem, found out before', async ({ folder }) => {
    using place = mountTmpfs(join(folder, 'place'), 'size=512k')
    await using device = await attach(makeRandom(join(folder, 'disk')), { readOnly: true })
    const phases: string[] = []
    const onProgress = ({ phase, copied }: Progress) => phases.push(`${phase} ${copied}`)
    const error = await refused('no-space', device, join(place.path, 'copy'), { onProgress })
    expect(error).toMatchObject({ code: 'ENOSPC', syscall: 'statfs' })
    expect(error.message).toContain(`needs ${MiB} bytes`)
    expect(phases).toEqual(['copy 0'])
    // what is not copied needs no room
    await using sparse = await attach(makeSparse(join(folder, 'sparse')), { readOnly: true, sizeLimit: 4 * MiB })
    await refused('no-space', sparse, join(place.path, 'copy'))
    await using hole = await attach(join(folder, 'sparse'), { readOnly: true, offset: MiB, sizeLimit: 4 * MiB })
    expect(await hole.migrate(join(place.path, 'copy'))).toMatchObject({ bytesCopied: 0 })
  })

  test('a full filesystem, found out in the middle', async ({ folder }) => {
    using place = mountTmpfs(join(folder, 'place'), 'size=3m')
    const source = makeRandom(join(folder, 'disk'), 8 * MiB)
    await using device = await attach(source, { readOnly: true })
    rmSync(source)
    const free = run('stat', '-f', '-c', '%a', place.path)
    let copied = 0
    const onProgress = (progress: Progress) => {
      copied = progress.copied
    }
    const error = await refused('no-space', device, join(place.path, 'copy'), { onProgress })
    expect(error).toMatchObject({ code: 'ENOSPC', syscall: 'write' })
    expect(copied).toBeGreaterThan(0)
    expect(run('stat', '-f', '-c', '%a', place.path)).toBe(free)
    const filled = await refused('no-space', device, join(place.path, 'copy'), { sparse: false })
    expect(filled).toMatchObject({ code: 'ENOSPC', syscall: 'statfs' })
  })

  test('a writable device', async ({ folder, image }) => {
    const place = folderIn(folder, 'place')
    await using device = await attach(image('disk'))
    const error = await refused('not-read-only', device, join(place, 'copy'))
    expect(error).toMatchObject({ code: 'EINVAL', path: device.path, hint: 'attach with readOnly: true' })
  })

  test('a source that somebody can write through another device', async ({ folder, image }) => {
    const place = folderIn(folder, 'place')
    const source = image('disk')
    await using device = await attach(source, { readOnly: true })
    const other = run('losetup', '--find', '--show', source).trim()
    try {
      const error = await refused('overlap', device, join(place, 'copy'))
      expect(error).toMatchObject({ code: 'EBUSY', path: device.path })
      expect(error.message).toContain(other)
    } finally {
      run('losetup', '--detach', other)
    }
    await device.migrate(join(place, 'copy'))
  })

  test('K2: a device with a mounted ext4, which goes on reading', async ({ folder }) => {
    const place = folderIn(folder, 'place')
    const witness = randomBytes(64 * KiB)
    await using device = await attach(makeExt4(join(folder, 'disk'), witness), { readOnly: true })
    using mount = new Mount(join(folder, 'mnt'), '-o', 'ro', device.path)
    const error = await refused('would-shut-down-filesystem', device, join(place, 'copy'))
    expect(error).toMatchObject({ code: 'EBUSY', path: device.path })
    expect(Reflect.get(error, 'holders')).toContainEqual({
      device: device.path,
      kind: 'mount',
      mountPoint: mount.path,
      fsType: 'ext4',
    })
    dropCaches()
    expect(readFileSync(join(mount.path, 'witness')).equals(witness)).toBe(true)
  })

  test('wrong arguments', async ({ folder, image }) => {
    await using device = await attach(image('disk'), { readOnly: true })
    const destination = join(folder, 'copy')
    const before = look(device, folder)
    const cases: [string, ...unknown[]][] = [
      ['ERR_INVALID_ARG_VALUE', ''],
      ['ERR_INVALID_ARG_VALUE', `${folder}/`],
      ['ERR_INVALID_ARG_VALUE', `${destination}\0`],
      ['ERR_INVALID_ARG_TYPE', 7],
      ['ERR_INVALID_ARG_TYPE'],
      ['ERR_INVALID_ARG_TYPE', Buffer.from(destination)],
      ['ERR_INVALID_ARG_VALUE', destination, { sprase: true }],
      ['ERR_INVALID_ARG_TYPE', destination, 7],
      ['ERR_INVALID_ARG_TYPE', destination, { verify: 1 }],
      ['ERR_INVALID_ARG_TYPE', destination, { sparse: 'yes' }],
      ['ERR_INVALID_ARG_TYPE', destination, { overwrite: null }],
      ['ERR_INVALID_ARG_TYPE', destination, { force: 0 }],
      ['ERR_INVALID_ARG_TYPE', destination, { onProgress: true }],
      ['ERR_INVALID_ARG_TYPE', destination, { signal: true }],
    ]
    const calls: string[] = []
    observe((call) => calls.push(call))
    for (const [code, ...given] of cases) {
      const [destinationGiven, optionsGiven] = given
      let error: unknown
      try {
        await device.migrate(destinationGiven as never, optionsGiven as never)
      } catch (caught) {
        error = caught
      }
      expect(error, JSON.stringify(given)).toBeInstanceOf(TypeError)
      expect(error).toMatchObject({ code })
    }
    observe(undefined)
    expect(calls).toEqual([])
    expect(look(device, folder)).toEqual(before)
  })

  test('a handle that is closed', async ({ folder, image }) => {
    const device = await attach(image('disk'), { readOnly: true })
    await device.detach()
    await failure('closed', () => device.migrate(join(folder, 'copy')))
    expect(readdirSync(folder)).toEqual(['disk'])
  })
})

describe('another file at the destination', () => {
  test('that came between the copy and the switch is neither switched to nor removed', async ({ folder }) => {
    const place = folderIn(folder, 'place')
    const destination = join(place, 'copy')
    const foreign = join(folder, 'foreign')
    writeFileSync(foreign, 'precious')
    const disk = makeRandom(join(folder, 'disk'), MiB)
    await using device = await attach(disk, { readOnly: true })
    let named = false
    observe((call) => {
      if (call === 'linkFile') named = true
      if (!named || call !== 'openat') return
      observe(undefined)
      renameSync(foreign, destination)
    })
    const error = await device.migrate(destination).catch((caught: unknown) => caught)
    observe(undefined)
    expect(error).toMatchObject({ reason: 'content-differs' })
    expect(readFileSync(destination, 'utf8')).toBe('precious')
    expect(readdirSync(place)).toEqual(['copy'])
    expect(sysfs(device.number, 'loop/backing_file')).toBe(disk)
  })
})

describe('verify', () => {
  test('a byte that is not what was copied is found, and nothing is switched', async ({ folder }) => {
    const place = folderIn(folder, 'place')
    const destination = join(place, 'copy')
    await using device = await attach(makeRandom(join(folder, 'disk'), 3 * MiB), { readOnly: true })
    const at = 2 * MiB + 5
    const flip = ({ phase, copied, total }: Progress) => {
      if (phase !== 'flush' || copied !== total) return
      const fd = openSync(copyFor(destination), 'r+')
      const byte = Buffer.alloc(1)
      readSync(fd, byte, 0, 1, at)
      writeSync(fd, Buffer.from([~byte.readUInt8() & 0xff]), 0, 1, at)
      closeSync(fd)
    }
    const error = await refused('content-differs', device, destination, { onProgress: flip })
    expect(error).toMatchObject({ code: 'EILSEQ' })
    expect(error.message).toContain(`differs from ${join(folder, 'disk')} at byte ${at}`)
    // not even a file that was to be replaced is touched
    writeFileSync(destination, 'precious')
    await refused('content-differs', device, destination, { onProgress: flip, overwrite: true })

    rmSync(destination)
    expect(await device.migrate(destination, { onProgress: flip, verify: false })).toMatchObject({ verified: false })
    expect(sysfs(device.number, 'loop/backing_file')).toBe(destination)
    expect(readFileSync(destination).equals(readFileSync(join(folder, 'disk')))).toBe(false)
    expect(readdirSync(place)).toEqual(['copy'])
  })
})

describe('verify, of holes', () => {
  const cases: [string, number, (draft: string, at: number) => void][] = [
    [
      'data where there was a hole',
      40 * MiB,
      (draft, at) => {
        const fd = openSync(draft, 'r+')
        writeSync(fd, '!', at)
        closeSync(fd)
      },
    ],
    [
      'a hole where there was data',
      20 * MiB + 64 * KiB,
      (draft, at) => run('fallocate', '--punch-hole', '--offset', String(at), '--length', String(64 * KiB), draft),
    ],
  ]
  for (const [name, at, spoil] of cases) {
    for (const from of ['file', 'device'] as const) {
      test(`${name}, copied from the ${from}`, async ({ folder }) => {
        const source = makeSparse(join(folder, 'disk'))
        await using device = await attach(source, { readOnly: true })
        if (from === 'device') rmSync(source)
        const destination = join(folderIn(folder, 'place'), 'copy')
        const onProgress = ({ phase, copied, total }: Progress) => {
          if (phase === 'flush' && copied === total) spoil(copyFor(destination), at)
        }
        const error = await refused('content-differs', device, destination, { onProgress })
        expect(error.message).toContain(`at byte ${at}`)
      })
    }
  }
})

describe('overwrite', () => {
  test('replaces the file in one step', async ({ folder }) => {
    const place = folderIn(folder, 'place')
    const destination = join(place, 'copy')
    writeFileSync(destination, 'old')
    const old = openSync(destination, 'r')
    try {
      const source = makeRandom(join(folder, 'disk'))
      await using device = await attach(source, { readOnly: true })
      const seen = new Set<string>()
      const onProgress = () => seen.add(readFileSync(destination, 'utf8'))
      await device.migrate(destination, { overwrite: true, onProgress })
      expect(seen).toEqual(new Set(['old']))
      expect(readFileSync(old, 'utf8')).toBe('old')
      expect(readFileSync(destination).equals(readFileSync(source))).toBe(true)
      expect(sysfs(device.number, 'loop/backing_file')).toBe(destination)
      expect(readdirSync(place)).toEqual(['copy'])
      expect(statSync(destination).nlink).toBe(1)
    } finally {
      closeSync(old)
    }
  })

  test('where there is nothing it is as without', async ({ folder, image }) => {
    const place = folderIn(folder, 'place')
    await using device = await attach(image('disk'), { readOnly: true })
    await device.migrate(join(place, 'copy'), { overwrite: true })
    expect(sysfs(device.number, 'loop/backing_file')).toBe(join(place, 'copy'))
    expect(readdirSync(place)).toEqual(['copy'])
  })

  // Bug: what has no second name is unlinked when the switch fails. So on vfat, too, where nothing has one.
  test('a file that can have no second name is back after a switch that fails', async ({ folder }) => {
    using place = mountImage(folder, 'ext4', 64 * MiB)
    const mountPoint = folderIn(folder, 'mnt')
    const destination = join(place.path, 'copy')
    writeFileSync(destination, 'old')
    const links = folderIn(place.path, 'links')
    for (let i = 1; i < 65_000; i++) linkSync(destination, join(links, String(i)))
    expect(() => linkSync(destination, join(links, 'one more'))).toThrow('EMLINK')
    await using device = await attach(makeExt4(join(folder, 'disk'), randomBytes(KiB)), { readOnly: true })
    const onProgress = ({ phase }: Progress) => {
      if (phase === 'switch') run('mount', '-o', 'ro', device.path, mountPoint)
    }
    try {
      await failure('would-shut-down-filesystem', () => device.migrate(destination, { overwrite: true, onProgress }))
    } finally {
      spawnSync('umount', [mountPoint])
    }
    expect(existsSync(destination)).toBe(true)
  })

  for (const there of [true, false]) {
    test(`a switch that fails leaves ${there ? 'the old file' : 'nothing'}`, async ({ folder }) => {
      const place = folderIn(folder, 'place')
      const destination = join(place, 'copy')
      if (there) writeFileSync(destination, 'old')
      const mountPoint = folderIn(folder, 'mnt')
      const witness = randomBytes(64 * KiB)
      await using device = await attach(makeExt4(join(folder, 'disk'), witness), { readOnly: true })
      const onProgress = ({ phase }: Progress) => {
        if (phase === 'switch') run('mount', '-o', 'ro', device.path, mountPoint)
      }
      try {
        for (const overwrite of there ? [true] : [true, false]) {
          await refused('would-shut-down-filesystem', device, destination, { overwrite, onProgress })
          dropCaches()
          expect(readFileSync(join(mountPoint, 'witness')).equals(witness)).toBe(true)
          run('umount', mountPoint)
        }
        expect(readdirSync(place)).toEqual(there ? ['copy'] : [])
      } finally {
        spawnSync('umount', [mountPoint])
      }
    })
  }
})

describe('other filesystems', () => {
  // Bug: LOOP_SET_DIRECT_IO fails after the switch, and the file that backs the device by then is unlinked.
  test('direct I/O that the destination cannot do does not cost the device its file', async ({ folder, image }) => {
    await using disk = await attach(image('4K disk', 64 * MiB), { blockSize: 4096 })
    run('mkfs.ext4', '-q', disk.path)
    using place = new Mount(join(folder, 'place'), disk.path)
    await using device = await attach(image('disk', MiB, 1), { readOnly: true, directIO: true })
    await device.migrate(join(place.path, 'copy')).catch(() => undefined)
    expect(existsSync(sysfs(device.number, 'loop/backing_file') ?? '')).toBe(true)
  })

  // Bug: where statfs knows no size (0 blocks in all) that is taken for no room.
  test('one that does not say how much room it has', async ({ folder, image }) => {
    using place = new Mount(join(folder, 'place'), '-t', 'ramfs', 'ramfs')
    await using device = await attach(image('disk', MiB, 1), { readOnly: true })
    await device.migrate(join(place.path, 'copy'))
  })
})

describe('names beside the destination', () => {
  test('that look like ours are neither trusted, locked nor removed', async ({ folder, image }) => {
    const place = folderIn(folder, 'place')
    const destination = join(place, 'copy')
    const planted = ['.copy.loopctl-0123456789ab', '.copy.loopctl-was-0123456789ab', 'copy.loopctl-0123456789ab']
    for (const name of planted) writeFileSync(join(place, name), name)
    symlinkSync('/nowhere', join(place, '.copy.loopctl-ffffffffffff'))
    const before = listing(place)
    const locked = openSync(join(place, '.copy.loopctl-0123456789ab'), 'r')
    try {
      const holder = spawnSync('flock', ['3'], { stdio: ['ignore', 'inherit', 'inherit', locked] })
      expect(holder.status).toBe(0)
      await using device = await attach(image('disk'), { readOnly: true })
      for (const overwrite of [false, true]) {
        await device.migrate(destination, { overwrite })
        await device.changeBackingFile(image('disk'))
        const { copy, ...others } = listing(place) ?? {}
        expect(copy).toBeDefined()
        expect(others).toEqual(before)
      }
    } finally {
      closeSync(locked)
    }
  })

  test('are none while it copies, and the copy is for its owner only', async ({ folder }) => {
    const place = folderIn(folder, 'place')
    const destination = join(place, 'copy')
    await using device = await attach(makeRandom(join(folder, 'disk')), { readOnly: true })
    const seen = new Set<string>()
    const onProgress = () => {
      const { mode, nlink } = statSync(copyFor(destination))
      seen.add(`${readdirSync(place).length} names, mode ${(mode & 0o777).toString(8)}, ${nlink} links`)
    }
    await device.migrate(destination, { onProgress })
    expect(seen).toEqual(new Set(['0 names, mode 600, 0 links']))
    expect(spawnSync('flock', ['--nonblock', destination, 'true']).status).toBe(0)
  })
})

describe('a rival', () => {
  test('that migrates to the same place is refused while the first is under way', async ({ folder, image }) => {
    const place = folderIn(folder, 'place')
    const destination = join(place, 'copy')
    writeFileSync(destination, 'old')
    const bytes = readFileSync(makeRandom(join(folder, 'disk')))
    await using device = await attach(join(folder, 'disk'), { readOnly: true })
    await using rival = await attach(image('other', MiB, 2), { readOnly: true })
    let error: unknown
    const onProgress = async ({ phase }: Progress) => {
      if (phase !== 'flush' || error !== undefined) return
      error = 'under way'
      error = await rival.migrate(destination, { overwrite: true }).catch((caught: unknown) => caught)
    }
    const rivalry: Promise<void>[] = []
    await device.migrate(destination, {
      overwrite: true,
      onProgress: (progress) => {
        rivalry.push(onProgress(progress))
      },
    })
    await Promise.all(rivalry)
    // as soon as it has looked, before or after the other's switch
    expect(error).toMatchObject({ code: 'EBUSY', reason: expect.stringMatching(/^(contention|overlap)$/) as string })
    expect(readFileSync(destination).equals(bytes)).toBe(true)
    expect(readdirSync(place)).toEqual(['copy'])
    expect(sysfs(rival.number, 'loop/backing_file')).toBe(join(folder, 'other'))
  })

  test('that has locked the file which is to be replaced: contention, and nothing is changed', async ({
    folder,
    image,
  }) => {
    const destination = join(folderIn(folder, 'place'), 'copy')
    writeFileSync(destination, 'old')
    await using device = await attach(image('disk'), { readOnly: true })
    const holder = spawn('flock', [destination, 'sh', '-c', 'echo locked; read line'], {
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    const ended = once(holder, 'exit')
    try {
      await once(holder.stdout, 'data')
      const error = await refused('contention', device, destination, { overwrite: true })
      expect(error).toMatchObject({ code: 'EBUSY', path: destination })
    } finally {
      holder.stdin.end()
      await ended
    }
    await device.migrate(destination, { overwrite: true })
  })

  test('finds the file that is replaced locked from the first to the last progress', async ({ folder, image }) => {
    const destination = join(folderIn(folder, 'place'), 'copy')
    writeFileSync(destination, 'old')
    await using device = await attach(image('disk', MiB, 1), { readOnly: true })
    const answers: (number | null)[] = []
    const onProgress = () => answers.push(spawnSync('flock', ['--nonblock', destination, 'true']).status)
    await device.migrate(destination, { overwrite: true, onProgress })
    expect(new Set(answers)).toEqual(new Set([1]))
  })
})

describe('who may do what with the copy', () => {
  const cases: [mode: number, umask: number, copy: number][] = [
    [0o666, 0o022, 0o644],
    [0o777, 0o000, 0o755],
    [0o640, 0o022, 0o640],
    [0o644, 0o077, 0o600],
    [0o4755, 0o022, 0o755],
  ]
  for (const [mode, umask, copy] of cases) {
    test(`a source of mode ${mode.toString(8)} with umask ${umask.toString(8)}`, async ({ folder, image }) => {
      const source = image('disk')
      chmodSync(source, mode)
      chownSync(source, 1234, 4321)
      chmodSync(source, mode)
      const destination = join(folder, 'copy')
      await using device = await attach(source, { readOnly: true })
      const before = process.umask(umask)
      try {
        await device.migrate(destination)
      } finally {
        process.umask(before)
      }
      const stat = statSync(destination)
      expect({ mode: (stat.mode & 0o7777).toString(8), uid: stat.uid, gid: stat.gid }).toEqual({
        mode: copy.toString(8),
        uid: 1234,
        gid: 4321,
      })
    })
  }

  test('the owner of a file on a read-only filesystem could not write to it, and gets no copy to write to', async ({
    folder,
  }) => {
    using medium = mountTmpfs(join(folder, 'medium'))
    const source = makeRandom(join(medium.path, 'disk'))
    chownSync(source, 1234, 4321)
    chmodSync(source, 0o666)
    run('mount', '-o', 'remount,ro', medium.path)
    const destination = join(folder, 'copy')
    await using device = await attach(source, { readOnly: true })
    await device.migrate(destination)
    expect(statSync(destination)).toMatchObject({ uid: process.getuid?.(), gid: 4321 })
  })
})

describe('a destination that somebody uses', () => {
  for (const readOnly of [false, true]) {
    test(`another device has it attached, ${readOnly ? 'read-only' : 'for writing'}`, async ({ folder, image }) => {
      const destination = join(folderIn(folder, 'place'), 'copy')
      writeFileSync(destination, Buffer.alloc(MiB, 2))
      await using device = await attach(image('disk', MiB, 1), { readOnly: true })
      await using other = await attach(destination, { readOnly })
      const error = await refused('overlap', device, destination, { overwrite: true })
      expect(error.message).toContain(other.path)
      await device.migrate(destination, { overwrite: true, overlap: 'allow' })
      expect((await other.status()).backingDeleted).toBe(true)
      expect(sysfs(device.number, 'loop/backing_file')).toBe(destination)
    })
  }

  test('it is in use as swap', async ({ folder, image }) => {
    const destination = join(folderIn(folder, 'place'), 'swap file')
    writeFileSync(destination, Buffer.alloc(MiB, 2), { mode: 0o600 })
    run('mkswap', destination)
    run('swapon', destination)
    try {
      await using device = await attach(image('disk', MiB, 1), { readOnly: true })
      const error = await refused('overlap', device, destination, { overwrite: true })
      expect(error.message).toContain('swap')
    } finally {
      run('swapoff', destination)
    }
  })
})

describe('what others change meanwhile', () => {
  const cases: [string, (path: string, file: string) => void, string][] = [
    ['the offset', (path) => setOffset(path, 4096), 'its offset from 0 to 4096'],
    [
      'the size',
      (path, file) => {
        truncateSync(file, 2 * MiB)
        run('losetup', '--set-capacity', path)
      },
      'its size',
    ],
  ]
  for (const [name, change, told] of cases) {
    test(`${name}: replaced, and the device is as they left it`, async ({ folder }) => {
      const source = makeRandom(join(folder, 'disk'))
      const place = folderIn(folder, 'place')
      await using device = await attach(source, { readOnly: true })
      const onProgress = ({ phase }: Progress) => {
        if (phase === 'switch') change(device.path, source)
      }
      const error = await failure('replaced', () => device.migrate(join(place, 'copy'), { onProgress }))
      expect(error).toMatchObject({ code: 'ESTALE', path: device.path })
      expect(error.message).toContain(told)
      expect(sysfs(device.number, 'loop/backing_file')).toBe(source)
      expect(readdirSync(place)).toEqual([])
    })
  }

  test('a change between the last look and the switch is found by the read-back, and taken back', async ({
    folder,
  }) => {
    const source = makeRandom(join(folder, 'disk'))
    const place = folderIn(folder, 'place')
    await using device = await attach(source, { readOnly: true })
    observe((call) => {
      if (call !== 'loopChangeFd') return
      observe(undefined)
      setOffset(device.path, 4096)
    })
    await failure('replaced', () => device.migrate(join(place, 'copy')))
    expect(sysfs(device.number, 'loop/backing_file')).toBe(source)
    expect(shown(device).equals(readFileSync(source).subarray(4096))).toBe(true)
    expect(readdirSync(place)).toEqual([])
  })
})

/** Whatever the machine does, a time of 10 ms is up then. */
function spend20ms(): void {
  const until = performance.now() + 20
  while (performance.now() < until);
}

describe('a timeout', () => {
  test('ends it, and leaves nothing', async ({ folder }) => {
    const destination = join(folderIn(folder, 'place'), 'copy')
    await using device = await attach(makeRandom(join(folder, 'disk'), 8 * MiB), { readOnly: true })
    const error = await refused('timeout', device, destination, { timeout: 10, onProgress: spend20ms })
    expect(error).toMatchObject({ code: 'ETIMEDOUT' })
    await device.migrate(destination, { timeout: limit(60_000) })
  })
})

describe('given up', () => {
  for (const phase of ['copy', 'flush', 'verify', 'switch'] as const) {
    test(`from onProgress in ${phase}, by the signal or by an exception`, async ({ folder }) => {
      const destination = join(folderIn(folder, 'place'), 'copy')
      writeFileSync(destination, 'old')
      await using device = await attach(makeRandom(join(folder, 'disk'), 3 * MiB), { readOnly: true })
      const before = look(device, dirname(destination))
      const reason = new Error('enough')
      for (const which of ['first', 'last']) {
        const giveUp = (how: () => void) => (progress: Progress) => {
          if (progress.phase === phase && (which === 'first' || progress.copied === progress.total)) how()
        }
        const thrown = giveUp(() => {
          throw reason
        })
        await expect(device.migrate(destination, { overwrite: true, onProgress: thrown })).rejects.toBe(reason)
        // A call that was given up on closes its descriptors when it has come back.
        await expect.poll(() => look(device, dirname(destination))).toEqual(before)

        // the switch has begun when it is told of: then only an exception comes in time
        if (phase === 'switch') continue
        const controller = new AbortController()
        const aborted = giveUp(() => controller.abort(reason))
        const { signal } = controller
        await expect(device.migrate(destination, { overwrite: true, signal, onProgress: aborted })).rejects.toBe(reason)
        // A call that was given up on closes its descriptors when it has come back.
        await expect.poll(() => look(device, dirname(destination))).toEqual(before)
      }
    })
  }

  test('once the switch has begun the signal is without effect', async ({ folder, image }) => {
    await using device = await attach(image('disk'), { readOnly: true })
    const controller = new AbortController()
    const onProgress = ({ phase }: Progress) => {
      if (phase === 'switch') controller.abort()
    }
    const destination = join(folderIn(folder, 'place'), 'copy')
    await device.migrate(destination, { onProgress, signal: controller.signal })
    expect(controller.signal.aborted).toBe(true)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(destination)
    expect(readdirSync(dirname(destination))).toEqual(['copy'])
  })

  test('before it has begun', async ({ folder, image }) => {
    const source = image('disk')
    await using device = await attach(source, { readOnly: true })
    const reason = new Error('enough')
    const signal = AbortSignal.abort(reason)
    await expect(device.migrate(join(folder, 'copy'), { signal })).rejects.toBe(reason)
    expect(readdirSync(folder)).toEqual(['disk'])
  })

  const cases: [string, AttachOptions, MigrateOptions, 'file' | 'device'][] = [
    // Without the look at all other devices, which makes more calls than all the rest.
    ['a plain one', {}, { overlap: 'allow' }, 'file'],
    ['one that replaces a file', {}, { overlap: 'allow', overwrite: true }, 'file'],
    ['from the device', { offset: 512 }, { overlap: 'allow', verify: false }, 'device'],
    ['of a stack', { swappable: true }, { overlap: 'allow' }, 'file'],
  ]
  for (const [name, attachOptions, options, from] of cases) {
    test(`at its k-th call, for every k: ${name}`, LONG, async ({ folder }) => {
      const bytes = randomBytes(256 * KiB)
      const source = join(folder, 'disk')
      const place = folderIn(folder, 'place')
      const destination = join(place, 'copy')
      const original = options.overwrite === true ? { copy: 'old' } : {}
      // One that no other program is offered: attached a hundred times, it would often be another's first.
      const number = unusedNumber()
      onTestFinished(() => removeDevice(number))

      /** One migration with a source of its own; what it ended with, and the calls that it made. */
      const migrate = async (giveUpAt: number, reason: Error) => {
        rmSync(place, { recursive: true })
        mkdirSync(place)
        for (const [file, content] of Object.entries(original)) writeFileSync(join(place, file), content)
        writeFileSync(source, bytes)
        await using device = await attach(source, { ...attachOptions, number, readOnly: true })
        const lower = (await device.status()).lower ?? device.number
        if (from === 'device') rmSync(source)
        const present = sysfs(lower, 'loop/backing_file')
        const descriptors = countDescriptors()
        const controller = new AbortController()
        const calls: string[] = []
        observe((call) => {
          // One for each process or device of the machine, whose number is never the same.
          if (call === 'processUse' || call === 'existsSync') return
          calls.push(call)
          if (calls.length === giveUpAt) controller.abort(reason)
        })
        let error: unknown
        try {
          await device.migrate(destination, { ...options, signal: controller.signal })
        } catch (caught) {
          error = caught
        }
        observe(undefined)
        const offset = attachOptions.offset === undefined ? 0 : Number(attachOptions.offset)
        const message = `call ${giveUpAt}: ${calls[giveUpAt - 1]}`
        expect(countDescriptors(), message).toBe(descriptors)
        expect(shown(device).equals(bytes.subarray(offset)), message).toBe(true)
        const files = readdirSync(place)
        if (error === undefined) {
          expect(sysfs(lower, 'loop/backing_file'), message).toBe(destination)
          expect(files, message).toEqual(['copy'])
          expect(readFileSync(destination).subarray(offset).equals(bytes.subarray(offset)), message).toBe(true)
        } else {
          expect(error, message).toBe(reason)
          expect(calls, message).not.toContain('loopChangeFd')
          expect(sysfs(lower, 'loop/backing_file'), message).toBe(present)
          expect(Object.fromEntries(files.map((file) => [file, readFileSync(join(place, file), 'utf8')]))).toEqual(
            original,
          )
        }
        return { calls, error }
      }

      const { calls, error } = await migrate(0, new Error('never'))
      expect(error).toBe(undefined)
      expect(calls).toContain('loopChangeFd')
      let rejected = 0
      for (const k of eachCall(calls.length)) {
        const outcome = await migrate(k, new Error(`enough at ${k}`))
        if (outcome.error !== undefined) rejected++
      }
      // all that comes before the copy has the destination's name
      const begun = calls.indexOf('linkFile')
      expect(begun).toBeGreaterThan(0)
      expect(rejected * STEP).toBeGreaterThan(begun / 2)
      expect(rejected).toBeLessThan(calls.indexOf('loopChangeFd'))
    })
  }
})

describe('a swappable stack', () => {
  test('the lower device is migrated, under a mounted ext4', async ({ folder }) => {
    using medium = mountTmpfs(join(folder, 'medium'))
    const witness = randomBytes(2 * MiB)
    const source = makeExt4(join(medium.path, 'disk'), witness)
    const place = folderIn(folder, 'place')
    const destination = join(place, 'copy')
    await using device = await attach(source, { readOnly: true, swappable: true })
    const { lower = -1, diskSeq, ...before } = await device.status()
    expect(sysfs(device.number, 'loop/backing_file')).toBe(`/dev/loop${lower}`)
    expect(sysfs(lower, 'loop/backing_file')).toBe(source)
    using mount = new Mount(join(folder, 'mnt'), '-o', 'ro', device.path)
    expect(await device.migrate(destination)).toMatchObject({ destination, method: 'read-write', verified: true })

    expect(sysfs(lower, 'loop/backing_file')).toBe(destination)
    expect(sysfs(device.number, 'loop/backing_file')).toBe(`/dev/loop${lower}`)
    expect(await device.status()).toEqual({ ...before, lower, diskSeq })
    expect(readdirSync(place)).toEqual(['copy'])
    rmSync(source)
    medium.unmount()
    dropCaches()
    expect(readFileSync(join(mount.path, 'witness')).equals(witness)).toBe(true)
    mount.unmount()
    expect(await device.detach()).toBe('detached')
    expect(sysfs(lower, 'loop/backing_file')).toBe(undefined)
  })
})
