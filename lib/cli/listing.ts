/** `loopctl list`: apart from the other actions, for it needs a quarter of the library. */

import { checkDeadline, LOOKING, type Wait } from '../common/deadline.ts'
import { askDevices } from '../handle/ask.ts'
import { readPartitions } from '../kernel/sysfs.ts'
import type { LoopInfo64 } from '../kernel/uapi.ts'
import { find, findOfDeleted } from '../observe/find.ts'
import { list, type LoopInfo } from '../observe/list.ts'
import { type Column, parseColumns, type Row } from './columns.ts'
import { fileArgument } from './parse.ts'
import { boundOf, type Common, interruptible, isForPeople, note, print, printJson } from './terminal.ts'
import { table } from './text.ts'

interface ListFlags extends Common {
  all?: true
  output?: string
  noheadings?: true
  bytes?: true
  tree?: true
}

export async function listAction(file: string | undefined, flags: ListFlags): Promise<void> {
  const { json, all, timeout, output, noheadings, bytes, tree } = flags
  const columns = parseColumns(output)
  await interruptible(async (signal) => {
    const left = boundOf(timeout, signal)
    const roots =
      file === undefined ? await list({ all, ...left() }) : await findAttached(file, left, { all: true, json })
    // What is on top of those of a file is of another file.
    const infos = tree && file !== undefined ? await list(left()) : roots
    const asked = columns.some(({ isAsked }) => isAsked)
      ? await ask(infos, left(), json)
      : new Map<number, LoopInfo64>()
    const rowOf = (info: LoopInfo): Row => ({ info, asked: asked.get(info.number), all: infos })
    const forest = tree ? growForest(roots, infos, rowOf) : roots.map((info) => ({ row: rowOf(info), branches: [] }))
    if (json) return printJson(forest.map((node) => membersOf(node, output === undefined ? undefined : columns, tree)))
    if (forest.length === 0) return undefined
    const people = isForPeople(bytes)
    const rows = flatten(forest).map(({ row, stem }) =>
      columns.map(({ title, cell }) => (title === 'NAME' ? stem : '') + cell(row, people)),
    )
    return print(table(columns, rows, !noheadings))
  })
}

/** LOOP_GET_STATUS64 of each; a device that cannot be asked is told of. */
async function ask(infos: readonly LoopInfo[], wait: Wait, json: true | undefined): Promise<Map<number, LoopInfo64>> {
  const { bound } = checkDeadline(wait, LOOKING)
  const numbers = infos.filter(({ attached }) => attached).map(({ number }) => number)
  const { answers, silent } = await askDevices(numbers, bound)
  for (const { number, why } of silent) note(`/dev/loop${number} could not be asked: ${WHY[why]}`, json)
  return new Map(answers.map(({ number, info }) => [number, info]))
}

/**
 * The devices attached to the file. Those of a former file of the same name, which was deleted and made again, are not,
 * and are told of on stderr: who looks for them by the name would not find them.
 */
export async function findAttached(
  file: string,
  left: () => Wait,
  { all = false, json }: { all?: boolean; json?: true | undefined } = {},
): Promise<LoopInfo[]> {
  const given = fileArgument(file)
  for (const { path, number } of await findOfDeleted(given, left())) {
    note(`${path} is attached to a deleted file of that name, ${file}: loopctl detach ${number}`, json)
  }
  const found = await find(given, { unconfirmed: all, ...left() })
  for (const { path, unconfirmed } of found) {
    if (unconfirmed === undefined) continue
    note(`it is not known whether ${path} is attached to that file: ${WHY[unconfirmed]}`, json)
  }
  return found
}

const WHY = {
  'permission': 'the device may not be opened',
  'timeout': 'the device does not answer',
  'no-node': 'this /dev has no node for it',
}

/** A device, with its partitions and the devices that are on top of it. */
interface Node {
  row: Row
  branches: Node[]
}

function growForest(roots: readonly LoopInfo[], infos: readonly LoopInfo[], rowOf: (info: LoopInfo) => Row): Node[] {
  // Devices come and go while they are read: what looks like a circle ends.
  const grown = new Set<number>()
  const grow = (info: LoopInfo): Node => {
    grown.add(info.number)
    const partitions = readPartitions(info.number).map((partition) => ({
      row: { partition, all: infos },
      branches: [],
    }))
    const above = infos.filter(({ number, lower }) => lower === info.number && !grown.has(number))
    return { row: rowOf(info), branches: [...partitions, ...above.map(grow)] }
  }
  const isBelow = ({ lower }: LoopInfo) => lower !== undefined && roots.some(({ number }) => number === lower)
  return roots.filter((info) => !isBelow(info)).map(grow)
}

/** A line of the tree, with what is drawn before its name. */
interface Line {
  row: Row
  stem: string
}

function flatten(nodes: readonly Node[], before?: string): Line[] {
  const { fork, end, trunk, space } = isUnicode() ? BRANCHES : ASCII_BRANCHES
  return nodes.flatMap(({ row, branches }, i) => {
    const isLast = i === nodes.length - 1
    const stem = before === undefined ? '' : before + (isLast ? end : fork)
    const below = before === undefined ? '' : before + (isLast ? space : trunk)
    return [{ row, stem }, ...flatten(branches, below)]
  })
}

const BRANCHES = { fork: '├─', end: '└─', trunk: '│ ', space: '  ' }
const ASCII_BRANCHES = { fork: '|-', end: '`-', trunk: '| ', space: '  ' }

/** Whether the locale has more than ASCII, as the C library decides it. */
function isUnicode(): boolean {
  const { LC_ALL, LC_CTYPE, LANG } = process.env
  return /utf-?8/i.test(LC_ALL || LC_CTYPE || LANG || '')
}

function membersOf({ row, branches }: Node, columns: readonly Column[] | undefined, tree: true | undefined): object {
  const whole = columns === undefined ? (row.info ?? row.partition) : columns.map(({ members }) => members(row))
  const members: object = Array.isArray(whole) ? Object.assign({}, ...whole) : { ...whole }
  return tree ? { ...members, children: branches.map((branch) => membersOf(branch, columns, tree)) } : members
}
