/** What the example tells to grant is what the tests in containers grant, and no more. */

import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { LEAST, type Privileges, ROOT } from './runc.ts'

const FOLDER = join(ROOT, 'examples/container')

/** Options of a run line that grant nothing. */
const HARMLESS = new Set(['--rm', '--volume'])

interface Granted extends Privileges {
  dropped: string[]
  others: string[]
}

/** What a run line grants; only this README's way of writing it: options, values and quotes, no `--option=value`. */
function parseRunLine(line: string): Granted {
  const words = [...line.matchAll(/'([^']*)'|"([^"]*)"|(\S+)/g)].map(
    ([, single, double, bare]) => single ?? double ?? bare ?? '',
  )
  const valuesOf = (option: string) => words.filter((_, index) => words[index - 1] === option)
  const [dropped, capabilities, devices, deviceRules] = [
    '--cap-drop',
    '--cap-add',
    '--device',
    '--device-cgroup-rule',
  ].map(valuesOf)
  const known = new Set([...HARMLESS, '--cap-drop', '--cap-add', '--device', '--device-cgroup-rule'])
  return {
    dropped: dropped ?? [],
    capabilities: capabilities ?? [],
    devices: devices ?? [],
    deviceRules: deviceRules ?? [],
    others: words.filter((word) => word.startsWith('-') && !known.has(word)),
  }
}

describe('the example', () => {
  const readme = readFileSync(join(FOLDER, 'README.md'), 'utf8')

  test.for(['docker', 'podman'])('the run line of %s grants what the tests grant', (tool) => {
    const lines = readme.split('\n').filter((line) => new RegExp(`^(?:sudo )?${tool} run `).test(line))
    expect(lines).toHaveLength(1)
    expect(parseRunLine(lines[0] ?? '')).toEqual({ ...LEAST, dropped: ['ALL'], others: [] })
  })

  test('each privilege is explained', () => {
    const rows = [...readme.matchAll(/^\| `(--[^`]+)` +\|/gm)].map(([, words]) => words)
    expect(rows).toEqual([
      ...LEAST.capabilities.map((name) => `--cap-add ${name}`),
      ...LEAST.devices.map((path) => `--device ${path}`),
      ...LEAST.deviceRules.map((rule) => `--device-cgroup-rule '${rule}'`),
    ])
  })

  test('the Dockerfile copies what a build makes', () => {
    const sources = [
      ...readFileSync(join(FOLDER, 'Dockerfile'), 'utf8').matchAll(/^COPY --from=build \/loopctl\/(\S+)/gm),
    ]
    expect(sources.length).toBeGreaterThan(0)
    for (const [, path = ''] of sources) expect(existsSync(join(ROOT, path)), path).toBe(true)
  })

  test('what is granted beyond that is seen', () => {
    const line = 'docker run --privileged --cap-add SYS_ADMIN --cap-add NET_ADMIN --device /dev/sda image'
    expect(parseRunLine(line)).toEqual({
      dropped: [],
      capabilities: ['SYS_ADMIN', 'NET_ADMIN'],
      devices: ['/dev/sda'],
      deviceRules: [],
      others: ['--privileged'],
    })
  })

  test.for(['pod.yaml', 'daemonset.yaml'])('%s: privileged, and nothing of the machine but the images', (name) => {
    const manifest = readFileSync(join(FOLDER, name), 'utf8')
    expect(manifest.match(/^ *privileged: true$/gm)).toHaveLength(1)
    expect([...manifest.matchAll(/^ *path: (.+)$/gm)].map(([, path]) => path)).toEqual(['/var/lib/images'])
    expect(manifest).not.toMatch(/hostPID|hostNetwork|hostIPC/)
    const [, comment = ''] = /# (.*)\n *privileged/.exec(manifest) ?? []
    for (const word of [...LEAST.capabilities, ...LEAST.deviceRules.map((rule) => rule.replace(/ \w+$/, ''))]) {
      expect(comment).toContain(word)
    }
  })
})
