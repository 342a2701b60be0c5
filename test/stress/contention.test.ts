import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, writeFileSync } from 'node:fs'
import { text } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import { describe, expect } from 'vitest'
import { find } from '../../lib/index.ts'
import { test } from '../kernel/support.ts'
import { limit, times } from '../scale.ts'

const PROCESSES = Math.min(32, times(400))
const ROUNDS = times(100)

describe('many processes at once', () => {
  test(
    `${PROCESSES} attach, verify and detach ${ROUNDS} times each: no failure, no shared device, nothing left`,
    { timeout: limit(60_000 + times(300_000)) },
    async ({ image }) => {
      const contender = fileURLToPath(new URL('fixtures/contender.mjs', import.meta.url))
      const runs = Array.from({ length: PROCESSES }, async (_, i) => {
        const file = image(`disk${i}`, 4096)
        writeFileSync(file, Buffer.concat([Buffer.from(file), Buffer.alloc(4096 - file.length)]))
        const child = spawn(process.execPath, [contender, file, String(ROUNDS)], {
          stdio: ['pipe', 'pipe', 'inherit'],
        })
        const output = text(child.stdout)
        await once(child, 'spawn')
        return { file, child, output }
      })
      const started = await Promise.all(runs)
      for (const { child } of started) child.stdin.end()
      const failures: string[] = []
      for (const { output } of started) failures.push(...(JSON.parse(await output) as string[]))
      expect(failures).toEqual([])
      for (const { file } of started) {
        expect(existsSync(file)).toBe(true)
        expect(await find(file)).toEqual([])
      }
    },
  )
})
