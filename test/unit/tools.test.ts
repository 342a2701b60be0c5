import { spawnSync } from 'node:child_process'
import { describe, expect, test } from 'vitest'
import {
  describeMissing,
  DISTRIBUTIONS,
  isThere,
  missingTools,
  packageOf,
  PATH,
  PURPOSES,
  type Tool,
  TOOLS,
} from '../../scripts/tools.js'

const ALL = Object.keys(TOOLS) as Tool[]
const SETUP = ['scripts/setup.js', '--check']

describe('the table of tools', () => {
  test.for(ALL)('%s has a purpose, and a package in Debian or in all', (tool) => {
    const [purposes, ...packages] = TOOLS[tool] as [string, ...(string | null)[]]
    expect(Object.keys(PURPOSES)).toEqual(expect.arrayContaining(purposes.split(' ')))
    expect([1, DISTRIBUTIONS.length]).toContain(packages.length)
    expect(packages[0]).toMatch(/^[a-z0-9][a-z0-9+.-]+$/)
  })

  test('what is there is what a shell finds', () => {
    const found = ALL.filter((tool) => {
      const script = tool.startsWith('/') ? 'test -e "$0"' : 'command -v "$0"'
      return spawnSync('/bin/sh', ['-c', script, tool], { env: { PATH } }).status === 0
    })
    expect(ALL.filter(isThere)).toEqual(found)
    expect(found).toContain('python3')
  })

  test('a missing one is told with its package', () => {
    expect(packageOf('sgdisk', 0)).toBe('gdisk')
    expect(packageOf('sgdisk', 2)).toBe('gptfdisk')
    expect(packageOf('strace', 4)).toBe('strace')
    expect(describeMissing(['strace'])).toBe('strace (package strace) is missing')
    expect(describeMissing(['strace', 'runc'])).toBe('strace (package strace), runc (package runc) are missing')
  })
})

describe('scripts/setup.js --check', () => {
  test.for(['build', 'vm'] as const)('ends with 1 where something is missing for %s, and names it', (purpose) => {
    const { status, stdout, stderr } = spawnSync(process.execPath, [...SETUP, '--for', purpose], { encoding: 'utf8' })
    const missing = missingTools([purpose])
    expect(status).toBe(missing.length === 0 ? 0 : 1)
    if (missing.length === 0)
      expect({ stdout, stderr }).toEqual({ stdout: expect.stringContaining(purpose), stderr: '' })
    for (const tool of missing) expect(stderr).toMatch(new RegExp(`^${tool} .*${packageOf(tool, 0)}`, 'm'))
  })

  test('a purpose that there is not ends with 2, and the usage', () => {
    const { status, stderr } = spawnSync(process.execPath, [...SETUP, '--for', 'fun'], { encoding: 'utf8' })
    expect(status).toBe(2)
    for (const purpose of Object.keys(PURPOSES)) expect(stderr).toContain(purpose)
  })
})
