/** Every ioctl, with every errno: each failure has its reason, and none of them leaves anything behind. */

import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { beforeEach, describe, expect } from 'vitest'
import { test } from '../kernel/support.ts'
import { prepareLauncher, runUnder } from './launch.ts'
import { ANYWHERE, LISTED } from './listed.ts'
import type { Outcome } from './plan.ts'
import { limit, sample } from '../scale.ts'

const DOCS = fileURLToPath(new URL('../../docs/faults.md', import.meta.url))
const AT_ONCE = 4
const FALLBACK = 'LOOP_CONFIGURE=EINVAL'
const NO_FAULT = '0xffffffff=1'
/** Reached by an attach only where LOOP_CONFIGURE does not do it all in one. */
const AFTER_SET_FD = new Set(['LOOP_SET_FD', 'LOOP_SET_STATUS64', 'LOOP_SET_DIRECT_IO', 'LOOP_SET_BLOCK_SIZE'])

beforeEach(prepareLauncher)

interface Case {
  ioctl: string
  errno: string
  faults: string
}

interface Row {
  ioctl: string
  errno: string
  listed: boolean
  raw: boolean
  name: string
  code: string
  reason: string
  verdict: 'ok' | 'unknown' | 'wrong'
  why: string
}

function casesOf(ioctl: string): Case[] {
  const errnos = new Set([...Object.keys(LISTED[ioctl]?.errnos ?? {}), ...Object.keys(ANYWHERE)])
  return [...errnos].flatMap((errno) => {
    const fault = `${ioctl}=${errno}`
    const plain = { ioctl, errno, faults: fault }
    const after = { ioctl, errno, faults: `${FALLBACK},${fault}` }
    if (ioctl === 'LOOP_SET_FD') return [after]
    return AFTER_SET_FD.has(ioctl) ? [plain, after] : [plain]
  })
}

/** Under what it is seen which operations make the call at all. */
function baseOf({ ioctl, faults }: Case): string {
  return faults.startsWith(FALLBACK) && ioctl !== 'LOOP_CONFIGURE' ? FALLBACK : NO_FAULT
}

function isSlow({ errno }: Case): boolean {
  return ['EAGAIN', 'EBUSY', 'ENXIO'].includes(errno)
}

function isRaw(ioctl: string, name: string): boolean {
  return LISTED[ioctl]?.raw.includes(name.replace(/Sync$/, '')) ?? false
}

/** Of the outcomes those that made the call, each judged. */
function judge({ ioctl, errno }: Case, outcomes: Outcome[]): Row[] {
  const listed = LISTED[ioctl]?.errnos[errno]
  const right = listed ?? ANYWHERE[errno] ?? []
  return outcomes
    .filter(({ name, calls, wrong }) => wrong.length > 0 || isRaw(ioctl, name) || reaches(ioctl, calls))
    .map(({ name, answer, error, wrong }) => {
      const why = [...wrong]
      const row = { ioctl, errno, listed: listed !== undefined, raw: isRaw(ioctl, name), name }
      const { code = '-', reason = 'ok', call, message } = error ?? {}
      // To whom the kernel says that a device is free, it is; and what is attached then is another attachment.
      const saysFree = ioctl === 'LOOP_GET_STATUS64' && errno === 'ENXIO'
      if (name.startsWith('find') && answer === 'not found' && !saysFree) why.push('is not found by its file')
      if (saysFree && reason === 'replaced') return { ...row, code, reason, verdict: 'ok', why: '' }
      if (row.raw && code !== errno) why.push(`the raw call says ${code}`)
      if (error && call !== ioctl) why.push(`says ${call}: ${message}`)
      if (error && code !== errno) why.push(`says ${code}: ${message}`)
      const isUnknown = reason === 'unknown' && (listed === undefined || listed.includes('unknown'))
      if (error && !isUnknown && !(right as string[]).includes(reason)) why.push(`reason ${reason}: ${message}`)
      const verdict = why.length > 0 ? 'wrong' : isUnknown ? 'unknown' : 'ok'
      return { ...row, code, reason, verdict, why: why.join('; ') }
    })
}

function reaches(ioctl: string, calls: string[]): boolean {
  return LISTED[ioctl]?.raw.some((call) => calls.includes(call)) ?? false
}

/** At most so many at once; the answers in order. */
async function inParallel<T, R>(items: T[], work: (item: T) => Promise<R>): Promise<R[]> {
  const results: R[] = []
  let next = 0
  const worker = async () => {
    while (next < items.length) {
      const at = next++
      results[at] = await work(items[at] as T)
    }
  }
  const ended = await Promise.allSettled(Array.from({ length: AT_ONCE }, worker))
  for (const end of ended) if (end.status === 'rejected') throw end.reason
  return results
}

/** One line per (ioctl, errno). */
function table(rows: Row[]): string[][] {
  const lines: string[][] = []
  for (const key of new Set(rows.map(({ ioctl, errno }) => `${ioctl} ${errno}`))) {
    const group = rows.filter(({ ioctl, errno }) => key === `${ioctl} ${errno}`)
    const [first] = group
    const reasons = (raw: boolean) =>
      [...new Set(group.filter((row) => row.raw === raw).map(({ reason }) => reason))].toSorted().join(', ') || '-'
    const verdict = (['wrong', 'unknown', 'ok'] as const).find((one) => group.some((row) => row.verdict === one)) ?? ''
    lines.push([...key.split(' '), first?.listed ? 'yes' : 'no', reasons(true), reasons(false), verdict])
  }
  return lines
}

const BEGIN = '<!-- faults: begin -->'
const END = '<!-- faults: end -->'

const OUT_OF_DATE = `${DOCS} is out of date: run with LOOPCTL_WRITE_DOCS=1, and again for what is seen only at times`

/** The lines of the table in the page, as {@link table} makes them. */
function parse(page: string): string[][] {
  const lines = (page.split(BEGIN)[1]?.split(END)[0] ?? '').split('\n').filter((line) => line.startsWith('| '))
  return lines.slice(2).map((line) =>
    line
      .split('|')
      .slice(1, -1)
      .map((cell) => cell.trim()),
  )
}

/** The line, with the reasons that are documented for its pair too: which device is free decides between some. */
function unite(line: string[], documented: string[][]): string[] {
  const [ioctl, errno, listed = '', ...rest] = line
  const other = documented.find((candidate) => candidate[0] === ioctl && candidate[1] === errno) ?? line
  const reasons = [3, 4].map((column) => {
    const all = [line, other].flatMap((one) => (one[column] ?? '').split(', ')).filter((reason) => reason !== '-')
    return [...new Set(all)].toSorted().join(', ') || '-'
  })
  return [ioctl ?? '', errno ?? '', listed, ...reasons, rest.at(-1) ?? '']
}

function markdown(lines: string[][]): string {
  const head = ['ioctl', 'errno', 'known answer', 'reason of the call', 'reasons of operations', 'verdict']
  const widths = head.map((cell, column) => Math.max(cell.length, ...lines.map((line) => line[column]?.length ?? 0)))
  const format = (line: string[]) => `| ${line.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join(' | ')} |`
  const unknown = lines.filter((line) => line.at(-1) === 'unknown').length
  return [
    BEGIN,
    '',
    `These are ${lines.length} pairs of ioctl and errno. For ${unknown} of them the reason is \`unknown\`, because the kernel is not known to give this answer, or gives it only for wrong arguments.`,
    '',
    format(head),
    `| ${widths.map((width) => '-'.repeat(width)).join(' | ')} |`,
    ...lines.map(format),
    '',
    END,
  ].join('\n')
}

describe('under made faults', () => {
  test(
    'every call and every operation ends, with the right reason, and leaves nothing',
    { timeout: limit(600_000) },
    async ({ folder }) => {
      const all = Object.keys(LISTED).flatMap(casesOf)
      const cases = process.env['LOOPCTL_WRITE_DOCS'] === '1' ? all : sample(all)
      // What reaches which ioctl, seen where nothing but one that is never made fails
      const reached = new Map<string, Outcome[]>()
      for (const faults of new Set(cases.map(baseOf))) {
        const outcomes = await runUnder(faults, folder, { raw: [] })
        for (const { name, error, wrong } of outcomes) expect({ name, error, wrong }).toEqual({ name, wrong: [] })
        expect(outcomes.length).toBeGreaterThan(25)
        reached.set(faults, outcomes)
      }
      const operations = (base: string, ioctl: string) =>
        (reached.get(base) ?? []).filter(({ calls }) => reaches(ioctl, calls)).map(({ name }) => name)

      // Those first that wait for their time to be up
      const order = [...cases.filter(isSlow), ...cases.filter((one) => !isSlow(one))]
      const judged = await inParallel(order, async (one) => {
        const { ioctl, faults } = one
        const raw = LISTED[ioctl]?.raw ?? []
        const outcomes = await runUnder(faults, folder, { raw, only: operations(baseOf(one), ioctl) })
        return [one, judge(one, outcomes)] as const
      })
      const byCase = new Map(judged)
      const rows = cases.flatMap((one) => byCase.get(one) ?? [])
      expect(rows.length).toBeGreaterThan(cases.length)

      const wrong = rows.filter(({ verdict }) => verdict === 'wrong')
      expect(wrong.map(({ ioctl, errno, name, why }) => `${ioctl}=${errno} ${name}: ${why}`)).toEqual([])

      // The page is of all of them
      if (cases.length < all.length) return
      const page = existsSync(DOCS) ? readFileSync(DOCS, 'utf8') : ''
      const documented = parse(page)
      const seen = table(rows)
      if (process.env['LOOPCTL_WRITE_DOCS'] === '1') {
        const [before = '', rest = ''] = page.split(BEGIN)
        writeFileSync(DOCS, before + markdown(seen.map((line) => unite(line, documented))) + (rest.split(END)[1] ?? ''))
        return
      }
      // The page is of kernels that have it all
      if (operations(NO_FAULT, 'LOOP_CONFIGURE').length === 0) return
      expect(documented, OUT_OF_DATE).toEqual(seen.map((line) => unite(line, documented)))
    },
  )
})

describe('LOOP_CONFIGURE is not known', () => {
  // Kernels before 5.8; a driver, or a sandbox, that does not know the request
  for (const errno of ['EINVAL', 'ENOTTY', 'ENOSYS']) {
    test(`${errno}: everything works through LOOP_SET_FD`, { timeout: limit(120_000) }, async ({ folder }) => {
      const outcomes = await runUnder(`LOOP_CONFIGURE=${errno}`, folder, { raw: [] })
      for (const { name, error, wrong } of outcomes) expect({ name, error, wrong }).toEqual({ name, wrong: [] })
      const attaching = outcomes.filter(({ calls }) => calls.includes('loopSetFd'))
      expect(attaching.length).toBeGreaterThan(10)
      for (const { name, calls } of attaching) {
        expect(calls, name).toContain('loopSetStatus64')
        expect(calls, name).not.toContain('loopConfigure')
      }
    })
  }
})
