/**
 * Which file is the same file, for everything that decides by that: a table. Each row is a way in which a file is attached
 * and then named; each cell says what has to be answered. Sameness is told by numbers: device and inode of a file, the
 * device number of a block device. A path is for showing only.
 */

import { execFileSync, spawnSync } from 'node:child_process'
import { linkSync, mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect } from 'vitest'
import { attach, find, list, LoopError, open } from '../../lib/index.ts'
import { blkPgAddPartitionSync, blkPgDelPartitionSync } from '../../lib/ioctl.ts'
import { needs, needsKernel } from '../needs.ts'
import { sysfs, test } from './support.ts'

const MiB = 1 << 20

/** What a row has made. The devices have names: `device` is the one in question, `lower` that below it. */
class Scene {
  readonly folder: string
  readonly numbers = new Map<string, number>()
  /** The name by which the file is asked for. */
  asked = ''
  readonly #undo: (() => unknown)[] = []

  constructor(folder: string) {
    this.folder = folder
  }

  path(...names: string[]): string {
    return join(this.folder, ...names)
  }

  makeFolder(...names: string[]): string {
    mkdirSync(this.path(...names), { recursive: true })
    return this.path(...names)
  }

  image(...names: string[]): string {
    writeFileSync(this.path(...names), Buffer.alloc(MiB))
    return this.path(...names)
  }

  later(undo: () => unknown): void {
    this.#undo.push(undo)
  }

  run(command: string, ...words: string[]): string {
    return execFileSync(command, words, { encoding: 'utf8' }).trim()
  }

  mount(target: string, ...options: string[]): void {
    this.run('mount', ...options, target)
    this.later(() => this.run('umount', target))
  }

  /** Attaches, as this process. */
  async attach(name: string, file: string): Promise<number> {
    const { number } = await attach(file, { autoclear: false, overlap: 'allow' }).then(async (device) => {
      await device.release()
      return device
    })
    this.#note(name, number)
    return number
  }

  /** Attaches, as somebody in a mount namespace that the script has made. */
  attachElsewhere(name: string, script: string, file: string): void {
    const lines = `${script}; losetup --find --show "$1"`
    const path = this.run('unshare', '--mount', '--propagation', 'private', 'sh', '-euc', lines, 'sh', file)
    this.#note(name, Number(path.slice('/dev/loop'.length)))
  }

  /** It is this row's attachment, and no later one of the device, that is detached in the end. */
  #note(name: string, number: number): void {
    const diskSeq = sysfs(number, 'diskseq')
    this.numbers.set(name, number)
    this.later(async () => {
      if (sysfs(number, 'loop/backing_file') === undefined || sysfs(number, 'diskseq') !== diskSeq) return
      await using device = await open(number)
      await device.detach()
    })
  }

  /** The names of the devices of these numbers, one that is none of this row's left out. */
  names(numbers: readonly (number | undefined)[]): string {
    const own = [...this.numbers].filter(([, number]) => numbers.includes(number)).map(([name]) => name)
    return own.length === 0 ? '-' : own.join(', ')
  }

  async end(): Promise<void> {
    for (const undo of this.#undo.toReversed()) await undo()
  }
}

// ── the columns

const COLUMNS = {
  'find': async (scene: Scene) => scene.names((await find(scene.asked)).map(({ number }) => number)),

  'attach guard': async ({ asked }: Scene) => {
    try {
      await (await attach(asked)).detach()
      return 'attached'
    } catch (error) {
      return LoopError.is(error, 'overlap') ? 'refused' : String(error)
    }
  },

  'reuse': async (scene: Scene) => {
    try {
      await using device = await attach(scene.asked, { overlap: 'reuse' })
      return device.owned ? 'attached' : `shares ${scene.names([device.number])}`
    } catch (error) {
      return LoopError.is(error, 'overlap') ? 'refused' : String(error)
    }
  },

  'list.lower': async (scene: Scene) => {
    const own = (await list()).find(({ number }) => number === scene.numbers.get('device'))
    return scene.names([own?.lower])
  },

  'holders': async (scene: Scene) => {
    await using device = await open(scene.numbers.get('lower') ?? scene.numbers.get('device') ?? -1)
    return scene.names((await device.holders()).map((holder) => (holder.kind === 'loop' ? holder.number : undefined)))
  },

  // The last one: it changes something.
  'detach --file': async (scene: Scene) => {
    const words = ['dist/cli/main.js', 'detach', '--timeout', '500', '--file', scene.asked]
    const { status, stderr } = spawnSync(process.execPath, words, { encoding: 'utf8' })
    const gone = [...scene.numbers.values()].filter((number) => sysfs(number, 'loop/backing_file') === undefined)
    const others = stderr.replaceAll(scene.asked, '')
    const told = [...scene.numbers.values()].filter((number) => new RegExp(`/dev/loop${number}\\b`).test(others))
    if (gone.length > 0) return `detaches ${scene.names(gone)}, exit ${status}`
    return `names ${scene.names(told)}, exit ${status}`
  },
}

type Column = keyof typeof COLUMNS
type Cells = Record<Column, [answer: string, why: string]>

/** A file on top of which there is nothing. */
const NO_STACK = {
  'list.lower': ['-', 'it is backed by a file'],
  'holders': ['-', 'nothing is on top of it'],
} satisfies Partial<Cells>

const SAME_FILE: Cells = {
  'find': ['device', 'device and inode are the same'],
  'attach guard': ['refused', 'two writers'],
  'reuse': ['shares device', 'the same file, and the same window'],
  'detach --file': ['detaches device, exit 0', 'LOOP_GET_STATUS64 confirms the file'],
  ...NO_STACK,
}

const ANOTHER_FILE: Cells = {
  'find': ['-', 'it is another file'],
  'attach guard': ['attached', 'it is another file'],
  'reuse': ['attached', 'there is no attachment of it to be shared'],
  'detach --file': ['names -, exit 1', 'nothing of the file is attached'],
  ...NO_STACK,
}

const SAME_BLOCK_DEVICE: Cells = {
  ...SAME_FILE,
  'find': ['device', 'the same device number, by whatever node'],
  'list.lower': ['lower', 'the device number is that of a loop device'],
  'holders': ['device', 'it is a plain opener, seen by its own device number'],
}

// ── the rows

interface Row {
  row: string
  cells: Cells
  make: (scene: Scene) => Promise<void> | void
  needs?: () => void
}

function makeNode(scene: Scene, number: number): string {
  const node = scene.path('node')
  scene.run('mknod', node, 'b', ...String(sysfs(number, 'dev')).split(':'))
  return node
}

/** A merged folder; the file `disk` is in the lower one. */
function makeOverlay(scene: Scene): { merged: string; upper: string } {
  const [lower, upper, work, merged] = ['lower', 'upper', 'work', 'merged'].map((name) =>
    scene.makeFolder('layers', name),
  )
  // A filesystem of its own: overlayfs takes no upper folder on some.
  scene.mount(scene.path('layers'), '-t', 'tmpfs', 'tmpfs')
  for (const name of ['lower', 'upper', 'work', 'merged']) scene.makeFolder('layers', name)
  scene.image('layers', 'lower', 'disk')
  scene.mount(String(merged), '-t', 'overlay', 'overlay', '-o', `lowerdir=${lower},upperdir=${upper},workdir=${work}`)
  return { merged: String(merged), upper: String(upper) }
}

/** A btrfs that is mounted, with the file `disk` in the subvolume `a`; answers the device. */
async function makeBtrfs(scene: Scene): Promise<string> {
  const image = scene.path('btrfs.img')
  writeFileSync(image, '')
  scene.run('truncate', '--size', '128M', image)
  scene.run('mkfs.btrfs', '--quiet', image)
  const device = await attach(image)
  scene.later(() => device.detach())
  scene.mount(scene.makeFolder('btrfs'), device.path)
  scene.run('btrfs', 'subvolume', 'create', scene.path('btrfs', 'a'))
  scene.image('btrfs', 'a', 'disk')
  return device.path
}

function needsBtrfs(): void {
  needs('mkfs.btrfs')
  needsKernel('btrfs')
}

const ROWS: Row[] = [
  {
    row: 'the path itself',
    cells: SAME_FILE,
    make: async (scene) => {
      scene.asked = scene.image('disk')
      await scene.attach('device', scene.asked)
    },
  },
  {
    row: 'a hard link',
    cells: SAME_FILE,
    make: async (scene) => {
      await scene.attach('device', scene.image('disk'))
      scene.asked = scene.path('hard')
      linkSync(scene.path('disk'), scene.asked)
    },
  },
  {
    row: 'a bind mount',
    cells: SAME_FILE,
    make: async (scene) => {
      scene.makeFolder('real')
      await scene.attach('device', scene.image('real', 'disk'))
      scene.mount(scene.makeFolder('bound'), '--bind', scene.path('real'))
      scene.asked = scene.path('bound', 'disk')
    },
  },
  {
    row: 'the same file, by a path of another mount namespace',
    cells: SAME_FILE,
    make: (scene) => {
      const [real, there] = [scene.makeFolder('real'), scene.makeFolder('there')]
      scene.asked = scene.image('real', 'disk')
      scene.attachElsewhere('device', `mount --bind ${real} ${there}`, scene.path('there', 'disk'))
    },
  },
  {
    row: 'another file, of the same path in another mount namespace',
    cells: ANOTHER_FILE,
    make: (scene) => {
      const folder = scene.makeFolder('folder')
      scene.asked = scene.image('folder', 'disk')
      const script = `mount -t tmpfs tmpfs ${folder}; truncate --size 1M ${scene.asked}`
      scene.attachElsewhere('device', script, scene.asked)
    },
  },
  {
    row: 'overlay, by the path of the overlay',
    cells: { ...SAME_FILE, find: ['device', 'LOOP_GET_STATUS64 answers as stat(2) of the overlay does'] },
    make: async (scene) => {
      const { merged } = makeOverlay(scene)
      scene.asked = join(merged, 'disk')
      await scene.attach('device', scene.asked)
    },
  },
  {
    row: 'overlay, by the path of the file below',
    cells: {
      ...ANOTHER_FILE,
      'find': ['-', 'the numbers of the overlay are its own: the kernel does not tell what is below'],
      'attach guard': ['attached', 'the numbers differ, and a lease does not see through an overlay'],
    },
    make: async (scene) => {
      const { merged, upper } = makeOverlay(scene)
      await scene.attach('device', join(merged, 'disk'))
      scene.asked = join(upper, 'disk')
    },
  },
  {
    row: 'deleted, and made again',
    cells: { ...ANOTHER_FILE, 'detach --file': ['names device, exit 1', 'it has the former file: said, not detached'] },
    make: async (scene) => {
      scene.asked = scene.image('disk')
      await scene.attach('device', scene.asked)
      rmSync(scene.asked)
      scene.image('disk')
    },
  },
  {
    row: 'a block device attached by a node elsewhere, asked for by its own',
    cells: SAME_BLOCK_DEVICE,
    make: async (scene) => {
      const lower = await scene.attach('lower', scene.image('disk'))
      await scene.attach('device', makeNode(scene, lower))
      scene.asked = `/dev/loop${lower}`
    },
  },
  {
    row: 'a block device attached by its own node, asked for by one elsewhere',
    cells: SAME_BLOCK_DEVICE,
    make: async (scene) => {
      const lower = await scene.attach('lower', scene.image('disk'))
      await scene.attach('device', `/dev/loop${lower}`)
      scene.asked = makeNode(scene, lower)
    },
  },
  {
    row: 'a block device attached in a /dev of another mount namespace',
    cells: SAME_BLOCK_DEVICE,
    make: async (scene) => {
      const lower = await scene.attach('lower', scene.image('disk'))
      const [there, numbers] = [scene.makeFolder('there'), String(sysfs(lower, 'dev')).replace(':', ' ')]
      scene.attachElsewhere(
        'device',
        `mount -t tmpfs tmpfs ${there}; mknod ${there}/sda b ${numbers}`,
        join(there, 'sda'),
      )
      scene.asked = `/dev/loop${lower}`
    },
  },
  {
    row: 'a partition, asked for by its disk',
    cells: {
      'find': ['-', 'the disk is another block device than its partition'],
      'attach guard': ['refused', 'they have the same bytes'],
      'reuse': ['refused', 'they have the same bytes, and are not the same'],
      'detach --file': ['names -, exit 1', 'nothing is attached to the disk itself'],
      'list.lower': ['lower', 'the partition is one of a loop device'],
      'holders': ['device', 'it keeps the partition open, and so the disk'],
    },
    make: async (scene) => {
      const lower = await scene.attach('lower', scene.image('disk'))
      const disk = await open(lower)
      blkPgAddPartitionSync(disk.fd, { number: 1, start: 65_536n, length: 131_072n })
      scene.later(async () => {
        blkPgDelPartitionSync(disk.fd, 1)
        await disk.close()
      })
      scene.asked = disk.path
      await scene.attach('device', `${disk.path}p1`)
    },
  },
  {
    row: 'a btrfs subvolume, by another mount of it',
    cells: SAME_FILE,
    needs: needsBtrfs,
    make: async (scene) => {
      const device = await makeBtrfs(scene)
      scene.mount(scene.makeFolder('again'), '-o', 'subvol=a', device)
      await scene.attach('device', scene.path('btrfs', 'a', 'disk'))
      scene.asked = scene.path('again', 'disk')
    },
  },
  {
    row: 'the file of a btrfs snapshot, of the same inode number',
    cells: { ...ANOTHER_FILE, find: ['-', 'each subvolume has a device number of its own'] },
    needs: needsBtrfs,
    make: async (scene) => {
      await makeBtrfs(scene)
      await scene.attach('device', scene.path('btrfs', 'a', 'disk'))
      scene.run('btrfs', 'subvolume', 'snapshot', scene.path('btrfs', 'a'), scene.path('btrfs', 'b'))
      scene.asked = scene.path('btrfs', 'b', 'disk')
    },
  },
  {
    row: 'a loop device on another, asked for by the lower device',
    cells: SAME_BLOCK_DEVICE,
    make: async (scene) => {
      const lower = await scene.attach('lower', scene.image('disk'))
      await scene.attach('device', `/dev/loop${lower}`)
      scene.asked = `/dev/loop${lower}`
    },
  },
  {
    row: 'a loop device on another, asked for by the file below both',
    cells: {
      'find': ['lower', 'only the lower device is attached to the file'],
      'attach guard': ['refused', 'two writers'],
      'reuse': ['shares lower', 'the same file, and the same window'],
      'detach --file': ['names lower, device, exit 1', 'the lower device is in use by the upper one, which is named'],
      'list.lower': ['lower', 'the device number is that of a loop device'],
      'holders': ['device', 'it is a plain opener, seen by its own device number'],
    },
    make: async (scene) => {
      const lower = await scene.attach('lower', scene.image('disk'))
      await scene.attach('device', `/dev/loop${lower}`)
      scene.asked = scene.path('disk')
    },
  },
]

/** The row as a table, to be read where it is not as it should be. */
function describeRow({ row, cells }: Row, answers: ReadonlyMap<Column, string>): string {
  const lines = Object.entries(cells).map(([column, [answer, why]]) => {
    const is = answers.get(column as Column)
    return `${is === answer ? ' ' : '!'} ${column.padEnd(14)} ${String(is).padEnd(32)} ${is === answer ? '' : `should be: ${answer}; `}${why}`
  })
  return [row, ...lines].join('\n')
}

describe('the same file', () => {
  test.for(ROWS)('$row', async (row, { folder }) => {
    needs('losetup', 'unshare')
    row.needs?.()
    const scene = new Scene(folder)
    const answers = new Map<Column, string>()
    try {
      await row.make(scene)
      for (const [column, ask] of Object.entries(COLUMNS)) answers.set(column as Column, await ask(scene))
    } finally {
      await scene.end()
    }
    const expected = Object.fromEntries(Object.entries(row.cells).map(([column, [answer]]) => [column, answer]))
    expect(Object.fromEntries(answers), describeRow(row, answers)).toEqual(expected)
  })
})
