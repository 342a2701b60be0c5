/** What the commands do that make and mount images. */

import { createImage } from '../mount/create-image.ts'
import { mountImage } from '../mount/mount-image.ts'
import { unmountPath } from '../mount/unmount-path.ts'
import type { PartitionRef } from '../partitions/ref.ts'
import { Exit, interruptible, print, printJson, printWarnings, report } from './terminal.ts'
import { printable } from './text.ts'

interface Json {
  json?: true
}

interface MountFlags extends Json {
  readOnly?: true
  options?: string
  type?: string
  partition?: PartitionRef
  offset?: number
  sizeLimit?: number
  blockSize?: number | 'auto'
  overlap?: 'refuse' | 'allow' | 'reuse'
  makeDir?: true
  timeout?: number
}

export async function mountAction(image: string, directory: string, flags: MountFlags): Promise<void> {
  const { json, type: fsType, makeDir: makeTarget, ...options } = flags
  await interruptible(async (signal) => {
    // Nobody holds on to it here: what is mounted stays when this process ends.
    const mount = await mountImage(image, directory, { ...options, fsType, makeTarget, signal })
    const { path, source, fsType: mounted, warnings } = mount
    printWarnings(warnings, json)
    if (json) await printJson({ path, source, fsType: mounted })
  })
}

interface UmountFlags extends Json {
  lazy?: true
  timeout?: number
}

export async function umountAction(directories: string[], { json, ...options }: UmountFlags): Promise<void> {
  await interruptible(async (signal) => {
    const results = []
    let status = 0
    for (const directory of directories) {
      try {
        const result = await unmountPath(directory, { ...options, signal })
        results.push({ path: directory, result })
        if (!json) await print(directories.length === 1 ? `${result}\n` : `${printable(directory)}: ${result}\n`)
      } catch (error) {
        status = report(error, json === true)
        if (signal.aborted) break
      }
    }
    if (json) await printJson(results)
    if (status !== 0) throw new Exit(status)
  })
}

export async function createAction(
  file: string,
  size: number,
  { json, ...options }: Json & { allocate?: true; overwrite?: true; timeout?: number },
): Promise<void> {
  await interruptible(async (signal) => {
    await createImage(file, size, { ...options, signal })
    if (json) await printJson({ path: file, size })
  })
}
