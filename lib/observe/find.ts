/** The devices that a file, or a reference, is attached to. */

import {
  type BackingFile,
  checkBackingFile,
  checkReference,
  type FileArgument,
  wrongType,
  wrongValue,
} from '../common/arguments.ts'
import { assertSupported } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { askDevices } from '../handle/ask.ts'
import * as files from '../kernel/files.ts'
import { inBatches } from '../kernel/pool.ts'
import { Sequence } from '../kernel/sequence.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { decodeStat, encodePath, type LoopInfo64, newStat, type Stat } from '../kernel/uapi.ts'
import { type FileIdentity, type LoopInfo, readInfos } from './list.ts'
import { findLoopAt } from './mounted.ts'

/**
 * The devices attached to this very file, by device and inode: links, other paths and bind mounts are the same file.
 * Or those that carry the tag. Or the device that is mounted on the folder `mountPoint`, itself or by a partition.
 */
export async function find(what: BackingFile | { reference: string } | { mountPoint: string }): Promise<LoopInfo[]> {
  if (typeof what === 'object' && what !== null && 'mountPoint' in what) {
    const { mountPoint } = what
    if (typeof mountPoint !== 'string') throw wrongType('mountPoint', 'a path', mountPoint)
    if (mountPoint === '' || mountPoint.includes('\0')) throw wrongValue('mountPoint', 'must be a path')
    assertSupported()
    const number = await findLoopAt(mountPoint)
    return number === undefined ? [] : readInfos([number], false)
  }
  if (typeof what === 'object' && what !== null && 'reference' in what) {
    const reference = checkReference(what.reference)
    assertSupported()
    return findByInfo([...(await readAttached()).keys()], (info) => info.fileName === reference)
  }
  const argument = checkBackingFile(what)
  assertSupported()
  const { dev, ino } = await identityOf(argument)
  const attached = await readAttached()
  const byPath = await findByPath(attached, (stat) => stat.device === dev && stat.inode === ino)
  // Their path does not tell: deleted, not to be reached from here, or another file by now.
  const others = [...attached.keys()].filter((number) => !byPath.some((info) => info.number === number))
  const byDevice = await findByInfo(others, (info) => info.device === dev && info.inode === ino)
  return [...byPath, ...byDevice].toSorted((a, b) => a.number - b.number)
}

/** The path of the backing file by the device's number, null where it is too long to be shown. */
async function readAttached(): Promise<Map<number, string | null>> {
  const numbers = await sysfs.readNumbers()
  if (typeof numbers === 'number') throw explain({ call: 'scandir', errno: numbers, path: '/sys/block' }, 'read /sys')
  const found = await sysfs.readBackingFiles(numbers)
  if (typeof found === 'number') throw explain({ call: 'open', errno: found, path: '/sys/block' }, 'read /sys')
  return found
}

/** Those whose path is there and is the wanted file; no device is opened. */
async function findByPath(
  attached: ReadonlyMap<number, string | null>,
  isWanted: (stat: Stat) => boolean,
): Promise<LoopInfo[]> {
  const readable = [...attached].filter((entry): entry is [number, string] => entry[1] !== null)
  const wanted = (await inBatches(readable, (batch) => filterByStat(batch, isWanted))).flat()
  const infos = await readInfos(
    wanted.map(([number]) => number),
    false,
  )
  // Detached or changed meanwhile, it is another file's.
  return infos.filter(({ number, backingFile }) => backingFile === attached.get(number))
}

async function filterByStat<Entry extends readonly [number, string]>(
  entries: readonly Entry[],
  isWanted: (stat: Stat) => boolean,
): Promise<Entry[]> {
  const sequence = new Sequence()
  const statted = entries.map((entry) => {
    const bytes = newStat()
    return { entry, bytes, step: sequence.try('statxPath', encodePath(entry[1]), bytes) }
  })
  await sequence.run()
  return statted.filter(({ step, bytes }) => step.answer === 0 && isWanted(decodeStat(bytes))).map(({ entry }) => entry)
}

async function findByInfo(numbers: readonly number[], isWanted: (info: LoopInfo64) => boolean): Promise<LoopInfo[]> {
  const wanted = (await askDevices(numbers)).filter(({ info }) => isWanted(info))
  const infos = await readInfos(
    wanted.map(({ number }) => number),
    false,
  )
  return infos.filter((info) =>
    wanted.some(({ number, diskSeq }) => number === info.number && diskSeq === info.diskSeq),
  )
}

async function identityOf(argument: FileArgument): Promise<FileIdentity> {
  const found = 'fd' in argument ? await files.fstat(argument.fd) : await files.stat(argument.path)
  if (typeof found !== 'number') return found
  const path = 'fd' in argument ? `descriptor ${argument.fd}` : argument.path.toString()
  throw explain({ call: 'stat', errno: found, path, backingFile: path }, 'open backing file')
}
