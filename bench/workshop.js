/** Where the files and the devices of a run are made, and from where they go again. */

import { execFileSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, realpathSync, rmSync, statfsSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { attach, list, LoopControl, open } from 'loopctl'
import { takeBack } from '../examples/support.js'
import { Worker } from './workers.js'

const TMPFS = 0x01021994
const EXT = 0xef53

export class Workshop {
  /** Folders on a tmpfs, and on an ext4. */
  memory = ''
  disk = ''
  /** What the disk is, for the reader. */
  diskType = 'ext4'
  /** @type {Set<() => unknown>} */
  #steps = new Set()
  /** @type {number[]} */
  #added = []

  /** To be closed also where this fails. */
  async open() {
    if (statfsSync('/dev/shm').type !== TMPFS) throw new Error('/dev/shm is no tmpfs')
    this.memory = this.#makeFolder('/dev/shm')
    this.disk = this.#makeFolder(tmpdir())
    if (statfsSync(this.disk).type !== EXT) await this.#mountExt4()
    this.#steps.add(() => this.#removeAdded())
    this.#steps.add(() => this.#detachOwn())
    // Where none is free, looking for one makes it: those would be nobody's.
    await this.addDevices(4)
  }

  async close() {
    await takeBack(this.#steps)
  }

  /**
   * A file of zeros without blocks; answers its path.
   *
   * @param {string} folder
   * @param {string} name
   */
  image(folder, name, bytes = 1 << 20) {
    const path = join(folder, name)
    writeFileSync(path, '')
    truncateSync(path, bytes)
    return path
  }

  /**
   * Images whose paths are the prefix and a number.
   *
   * @param {string} name
   * @param {number} count
   */
  images(name, count) {
    const files = Array.from({ length: count }, (_, i) => this.image(this.memory, `${name}${i}`))
    return { prefix: join(this.memory, name), files }
  }

  /**
   * Free devices; removed at the end.
   *
   * @param {number} count
   */
  async addDevices(count) {
    const control = await LoopControl.open()
    try {
      for (let i = 0; i < count; i++) this.#added.push(await control.add())
    } finally {
      await control.close()
    }
    return this.#added.slice(-count)
  }

  /** @param {readonly number[]} numbers that are removed already */
  forget(numbers) {
    const gone = new Set(numbers)
    this.#added = this.#added.filter((number) => !gone.has(number))
  }

  /** @param {string} parent */
  #makeFolder(parent) {
    const folder = realpathSync(mkdtempSync(join(parent, 'loopctl-bench-')))
    this.#steps.add(() => rmSync(folder, { recursive: true, force: true }))
    return folder
  }

  async #mountExt4() {
    const image = this.image(this.disk, 'ext4', 4 * 2 ** 30)
    const device = await attach(image)
    this.#steps.add(() => device.detach())
    execFileSync('mkfs.ext4', ['-q', device.path])
    const mountPoint = join(this.disk, 'mounted')
    mkdirSync(mountPoint)
    execFileSync('mount', [device.path, mountPoint])
    this.#steps.add(() => execFileSync('umount', [mountPoint]))
    this.disk = mountPoint
    this.diskType = 'ext4 on a loop device'
  }

  /** By their files, which are nobody else's: those of losetup too. */
  async #detachOwn() {
    for (const info of await list()) {
      if (![this.memory, this.disk].some((folder) => info.backingFile?.startsWith(`${folder}/`))) continue
      const device = await open(info)
      await device.detach()
    }
  }

  /** Removing one takes long, and hardly longer for many at once. */
  async #removeAdded() {
    const worker = new Worker()
    try {
      await worker.ask('remove', this.#added)
    } finally {
      await worker.end()
    }
  }
}
