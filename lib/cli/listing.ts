/** `loopctl list`: apart from the other actions, for it needs a quarter of the library. */

import { find, findOfDeleted } from '../observe/find.ts'
import { list, type LoopInfo } from '../observe/list.ts'
import type { Wait } from '../common/deadline.ts'
import { boundOf, fileArgument, interruptible, print, printable, printJson, table, warn } from './terminal.ts'

export async function listAction(
  file: string | undefined,
  { json, all, timeout }: { json?: true; all?: true; timeout?: number },
): Promise<void> {
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    const infos = file === undefined ? await list({ all, ...left() }) : await findAttached(file, left, true)
    if (json) return printJson(infos)
    if (infos.length > 0) await print(listTable(infos))
    return undefined
  })
}

/**
 * The devices attached to the file. Those of a former file of the same name, which was deleted and made again, are not,
 * and are told of on stderr: who looks for them by the name would not find them.
 */
export async function findAttached(file: string, left: () => Wait, all = false): Promise<LoopInfo[]> {
  const given = fileArgument(file)
  for (const { path, number } of await findOfDeleted(given, left())) {
    warn(`${path} is attached to a deleted file of that name, ${file}: loopctl detach ${number}`)
  }
  const found = await find(given, { unconfirmed: all, ...left() })
  for (const { path, unconfirmed } of found) {
    if (unconfirmed !== undefined)
      warn(`${path} has a file of that path; whether it is that one is not known: ${WHY[unconfirmed]}`)
  }
  return found
}

const WHY = {
  'permission': 'the device may not be opened',
  'timeout': 'the device does not answer',
  'no-node': 'this /dev has no node for it',
}

/** Of a device on top of another the real file is said too. */
function listTable(infos: LoopInfo[]): string {
  const head = ['DEVICE', 'SIZE', 'OFFSET', 'LIMIT', 'BLOCK', 'FLAGS', 'BACKING FILE']
  return table(
    head,
    infos.map((info) => [
      info.path,
      info.size,
      info.offset,
      info.sizeLimit,
      info.blockSize,
      flagsOf(info),
      fileOf(info) + fileBelow(info, infos),
    ]),
  )
}

function flagsOf({ readOnly, autoclear, partscan, directIO }: LoopInfo): string {
  const flags = [
    readOnly && 'read-only',
    autoclear && 'autoclear',
    partscan && 'partscan',
    directIO && 'direct-io',
  ].filter((flag) => flag !== false)
  return flags.join(',') || '-'
}

/** Devices come and go while they are read: what looks like a circle ends. */
function fileBelow({ lower }: LoopInfo, infos: LoopInfo[], depth = infos.length): string {
  const below = depth === 0 ? undefined : infos.find(({ number }) => number === lower)
  return below === undefined ? '' : ` -> ${fileOf(below)}${fileBelow(below, infos, depth - 1)}`
}

/** The backing file as it is shown. */
export function fileOf({ attached, backingFile, backingDeleted }: LoopInfo): string {
  if (!attached) return '-'
  return `${printable(backingFile ?? '?')}${backingDeleted ? ' (deleted)' : ''}`
}
