/** What is at the paths that sysfs shows of backing files, as far as this process sees them. */

import { inBatches } from './batches.ts'
import { type Bound, GivenUp, listUnanswering } from './bounded.ts'
import { FileStat } from './files.ts'
import { AT_FDCWD, AT_STATX_DONT_SYNC } from './folder.ts'
import { Sequence } from './sequence.ts'
import { decodeStat, encodePath, newStat } from './uapi.ts'

/** A device, by its number, and the path of its backing file. */
export type PathOf = readonly [number: number, path: string]

/**
 * Milliseconds for many paths together, and then for each by itself, side by side: one can be on a server that does not
 * answer.
 */
const LOOK_MS = 250

export interface NodesAt {
  /** The numbers of the block devices that are at the paths. */
  nodes: ReadonlyMap<number, bigint>
  /**
   * Devices of which the path does not tell whether they are backed by a file or by a block device: it is one of /dev, a
   * block device here, or nothing is there, because it is the path of another mount namespace or was deleted.
   */
  undecided: number[]
}

/**
 * statx(2) of the paths, which are those of this process's mount namespace and may be others than the kernel means.
 *
 * @throws GivenUp where the signal is aborted
 */
export async function lookForNodes(paths: readonly PathOf[], bound?: Bound): Promise<NodesAt> {
  // Where a device owes an answer already, its server would owe another, at the price of a thread.
  const unanswering = new Set(listUnanswering())
  const looks = (await inBatches(paths, (batch) => lookTogether(batch, unanswering, bound))).flat()
  const nodes = new Map(looks.flatMap(({ number, node }) => (typeof node === 'bigint' ? [[number, node]] : [])))
  const undecided = looks.filter(({ path, node }) => node !== 'file' || path.startsWith('/dev/'))
  return { nodes, undecided: undecided.map(({ number }) => number) }
}

interface Looked {
  number: number
  path: string
  /** Undefined: nothing is there. */
  node: bigint | 'file' | undefined
}

async function lookTogether(
  paths: readonly PathOf[],
  unanswering: ReadonlySet<unknown>,
  bound: Bound | undefined,
): Promise<Looked[]> {
  const silent = paths.filter(([number]) => unanswering.has(number)).map(asFile)
  const others = paths.filter(([number]) => !unanswering.has(number))
  try {
    return [...silent, ...(await look(others, bound))]
  } catch (error) {
    if (!(error instanceof GivenUp) || error.isAborted) throw error
  }
  const looks = await Promise.all(others.map((path) => lookApart(path, bound)))
  return [...silent, ...looks.flat()]
}

async function lookApart(path: PathOf, bound: Bound | undefined): Promise<Looked[]> {
  try {
    return await look([path], bound, path[0])
  } catch (error) {
    if (!(error instanceof GivenUp) || error.isAborted) throw error
    return [asFile(path)]
  }
}

/** A server that does not answer has a file, and no node. */
function asFile([number, path]: PathOf): Looked {
  return { number, path, node: 'file' }
}

async function look(paths: readonly PathOf[], bound: Bound | undefined, asked?: number): Promise<Looked[]> {
  const sequence = new Sequence()
  const looks = paths.map(([number, path]) => {
    const bytes = newStat()
    return {
      number,
      path,
      bytes,
      step: sequence.try('statxMount', AT_FDCWD, encodePath(path), AT_STATX_DONT_SYNC, bytes),
    }
  })
  await sequence.run({ left: Math.min(LOOK_MS, bound?.left ?? LOOK_MS), signal: bound?.signal }, asked)
  return looks.map(({ number, path, bytes, step }) => {
    if (!step.succeeded) return { number, path, node: undefined }
    const stat = new FileStat(decodeStat(bytes))
    return { number, path, node: stat.isBlockDevice() ? stat.rdev : 'file' }
  })
}
