/** doctor(): each fact against another witness, what attach really does, and that nothing is left. */

import { execFileSync, spawnSync } from 'node:child_process'
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { arch, release, tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, inject, onTestFinished } from 'vitest'
import { attach, doctor, type DoctorReport, LoopControl } from '../../lib/index.ts'
import { AS_NOBODY, copyForNobody, isForbidden, OWN_DEV, privately, USER_NAMESPACE } from './environments.ts'
import { needs, needsKernel, skipForKernel } from '../needs.ts'
import { countDescriptors, deviceNames, removeDevice, sysfs, test, unusedNumber } from './support.ts'

const ROOT = fileURLToPath(new URL('../..', import.meta.url))

function check({ checks }: DoctorReport, name: string): DoctorReport['checks'][number] {
  const found = checks.find((candidate) => candidate.name === name)
  if (!found) expect.fail(`no check ${name}: ${JSON.stringify(checks)}`)
  return found
}

/** What a doctor could leave: files, attachments of files that have no name, free devices with another block size. */
function traces(): object {
  return {
    files: [tmpdir(), '/dev/shm', '/run', '/var/tmp'].flatMap((folder) =>
      existsSync(folder) ? readdirSync(folder).filter((name) => name.includes('loopctl-doctor')) : [],
    ),
    attached: deviceNames().filter((name) =>
      sysfs(Number(name.slice('loop'.length)), 'loop/backing_file')?.includes('loopctl-doctor'),
    ),
    blockSizes: deviceNames().flatMap((name) => {
      const number = Number(name.slice('loop'.length))
      // Of a device that others remove just now there is none.
      const blockSize = sysfs(number, 'queue/logical_block_size') ?? '512'
      return sysfs(number, 'loop/backing_file') === undefined && blockSize !== '512' ? [`${name} ${blockSize}`] : []
    }),
  }
}

function parameter(name: string): number | null {
  const path = `/sys/module/loop/parameters/${name}`
  return existsSync(path) ? Number(readFileSync(path, 'utf8')) : null
}

/** A line of /proc/self/status. */
function statusOf(key: string): string | undefined {
  return new RegExp(`^${key}:\\s*(\\S+)$`, 'm').exec(readFileSync('/proc/self/status', 'utf8'))?.[1]
}

// Others make and remove devices in the meantime.
describe('as root', { retry: 3 }, () => {
  test('attaching works, nothing is left, and the report is plain data', async () => {
    await doctor()
    const [before, descriptors] = [traces(), countDescriptors()]
    const report = await doctor()
    expect(traces()).toEqual(before)
    expect(countDescriptors()).toBe(descriptors)
    expect(report.canAttach).toBe(true)
    expect(report.checks.filter(({ status }) => status === 'failure')).toEqual([])
    expect(JSON.parse(JSON.stringify(report))).toEqual(report)
    for (const { name, status, remedy } of report.checks) {
      if (status === 'ok') expect(remedy, name).toBeUndefined()
      else expect(remedy, name).toMatch(/^\S[^\n]+$/)
    }
  })

  test('the environment is what other witnesses say', async () => {
    const { kernel, environment } = await doctor()
    expect(kernel).toBe(release())
    const devices = readdirSync('/sys/block').filter((name) => /^loop\d+$/.test(name))
    const used = execFileSync('losetup', ['--list', '--noheadings', '--output', 'NAME'], { encoding: 'utf8' })
    expect(environment).toMatchObject({
      uid: Number(execFileSync('id', ['-u'], { encoding: 'utf8' })),
      capabilities: `0x${BigInt(`0x${statusOf('CapEff')}`).toString(16)}`,
      seccomp: statusOf('Seccomp') === '2',
      devFileSystem: execFileSync('findmnt', ['-n', '-o', 'FSTYPE', '/dev'], { encoding: 'utf8' }).trim(),
      udev: existsSync('/run/udev/control'),
      devices: devices.length,
      free: devices.length - used.split('\n').filter((line) => line !== '').length,
      maxLoop: parameter('max_loop'),
      maxPart: parameter('max_part'),
      pageSize: Number(execFileSync('getconf', ['PAGESIZE'], { encoding: 'utf8' })),
      arch: arch(),
      node: process.version,
    })
    // Only the machine's own user namespace has that inode
    expect(environment['userNamespace']).toBe(readlinkSync('/proc/self/ns/user') !== 'user:[4026531837]')
  })

  test('features are what the kernel does', async ({ image }) => {
    needs('sfdisk')
    const { features, environment, checks } = await doctor()
    const largest = environment['largestBlockSize'] as number
    await using device = await attach(image('disk.img'))
    expect(features['diskSeq']).toBe(existsSync(`/sys/block/loop${device.number}/diskseq`))
    await device.setBlockSize(largest)
    expect(execFileSync('blockdev', ['--getss', device.path], { encoding: 'utf8' })).toBe(`${largest}\n`)
    const larger = spawnSync('losetup', ['--sector-size', String(largest * 2), device.path])
    expect(larger.status, 'twice the largest block size').not.toBe(0)
    await device.detach()

    for (const [name, label] of [
      ['mbr', 'dos'],
      ['gpt', 'gpt'],
    ] as const) {
      const file = image(`${name}.img`)
      execFileSync('sfdisk', ['--quiet', file], { input: `label: ${label}\n,,\n` })
      await using partitioned = await attach(file, { partscan: 'kernel' })
      const isFound = existsSync(`/sys/block/loop${partitioned.number}/loop${partitioned.number}p1`)
      expect(features[name], name).toBe(isFound)
      expect(checks.find((one) => one.name === `${name.toUpperCase()} partitions`)?.status).toBe(
        isFound ? 'ok' : 'warning',
      )
    }
  })

  test('two at once do not disturb each other', async () => {
    const before = traces()
    const reports = await Promise.all([doctor(), doctor(), doctor()])
    expect(reports.map(({ canAttach }) => canAttach)).toEqual([true, true, true])
    expect(traces()).toEqual(before)
  })
})

interface Environment {
  name: string
  enter: (dev: string) => string[]
  canAttach: boolean
  /** Files cannot be written. */
  readOnly?: true
  /** The checks that are not ok, and what they speak of. */
  says: Record<string, ['ok' | 'warning' | 'failure', RegExp]>
}

const ENVIRONMENTS: Environment[] = [
  {
    name: 'nobody',
    enter: () => AS_NOBODY,
    canAttach: false,
    says: {
      'loop-control': ['failure', /EACCES.*mode.*run as root/],
      'attach': ['failure', /EACCES.*run as root/],
      'capabilities': ['warning', /CAP_SYS_ADMIN/],
    },
  },
  {
    name: 'root in a user namespace of root',
    enter: () => USER_NAMESPACE,
    canAttach: true,
    says: { 'user namespace': ['warning', /initial user namespace/] },
  },
  {
    name: 'root in a user namespace of nobody',
    enter: () => [...AS_NOBODY, ...USER_NAMESPACE],
    canAttach: false,
    says: {
      'loop-control': ['failure', /user namespace/],
      'attach': ['failure', /user namespace/],
      'user namespace': ['warning', /initial user namespace/],
    },
  },
  {
    name: 'root without CAP_SYS_ADMIN',
    enter: () => ['setpriv', '--bounding-set', '-sys_admin', '--inh-caps', '-sys_admin'],
    canAttach: true,
    says: { capabilities: ['warning', /without CAP_SYS_ADMIN.*add CAP_SYS_ADMIN/] },
  },
  {
    name: '/dev/loop-control missing',
    enter: privately(`${OWN_DEV}; rm "$dev"/loop-control; mount --move "$dev" /dev`),
    // An attach takes a device that is there.
    canAttach: true,
    says: {
      'loop-control': ['warning', /no node.*--device \/dev\/loop-control/],
      '/dev': ['ok', /tmpfs.*`loopctl attach` makes them/],
    },
  },
  {
    name: '/dev read-only',
    enter: privately('mount --bind /dev /dev; mount -o remount,bind,ro /dev'),
    canAttach: true,
    says: {},
  },
  {
    name: '/dev read-only and without the nodes of devices',
    enter: privately(`${OWN_DEV}; rm -f "$dev"/loop[0-9]*; mount -o remount,ro "$dev"; mount --move "$dev" /dev`),
    canAttach: false,
    says: {
      nodes: ['failure', /no usable node.*mknod \/dev\/loop\d+ b 7 \d+/],
      attach: ['failure', /no node.*mknod \/dev\/loop\d+ b 7 \d+/],
    },
  },
  {
    name: '/sys not mounted',
    enter: privately('umount -l /sys'),
    canAttach: true,
    says: { sysfs: ['warning', /not mounted.*mount -t sysfs/] },
  },
  {
    name: '/dev mounted nodev',
    enter: privately('mount --bind /dev /dev; mount -o remount,bind,nodev /dev'),
    canAttach: false,
    says: {
      '/dev': ['failure', /nodev.*remount,dev/],
      'loop-control': ['failure', /nodev.*remount,dev/],
      'attach': ['failure', /nodev.*remount,dev/],
    },
  },
  {
    name: 'no folder that takes a file',
    readOnly: true,
    enter: privately(
      'for at in /tmp /var/tmp /dev/shm /run; do mount --bind $at $at; mount -o remount,bind,ro $at; done',
      'env',
      'TMPDIR=/proc',
    ),
    canAttach: true,
    says: { 'temporary file': ['warning', /no folder.*TMPDIR/] },
  },
]

let copy = ''

beforeAll(() => {
  if (inject('noKernel') === '') copy = copyForNobody()
})

afterAll(() => {
  if (copy !== '') rmSync(copy, { recursive: true })
})

function run(enter: string[], root: string, ...words: string[]) {
  const [program = '', ...rest] = enter
  const line = [...rest, process.execPath, join(root, 'dist/cli/main.js'), ...words]
  return spawnSync(program, line, { encoding: 'utf8', cwd: '/' })
}

describe.for(ENVIRONMENTS)('$name', { retry: 2 }, ({ enter, canAttach, readOnly, says }) => {
  test('canAttach is what attach does, and the checks name the cause', async ({ folder, image }) => {
    if (isForbidden(enter)) skipForKernel('user namespaces')
    chmodSync(folder, 0o755)
    mkdirSync(join(folder, 'dev'))
    const file = image('disk.img')
    chmodSync(file, 0o666)
    const behind = enter(join(folder, 'dev'))
    const options = readOnly === true ? ['--read-only'] : []

    const before = traces()
    const { status, stdout, stderr } = run(behind, copy, 'doctor', '--json')
    expect(traces()).toEqual(before)
    expect({ status, stderr }).toEqual({ status: canAttach ? 0 : 1, stderr: '' })
    const report = JSON.parse(stdout) as DoctorReport
    expect(report.canAttach).toBe(canAttach)
    expect(run(behind, copy, 'run', ...options, file, '--', 'true').status === 0).toBe(canAttach)
    for (const [what, [expected, words]] of Object.entries(says)) {
      const { status: got, message, remedy } = check(report, what)
      expect.soft(got, what).toBe(expected)
      expect.soft(`${message}; ${remedy}`, what).toMatch(words)
    }
    const failures = report.checks.filter((one) => one.status === 'failure').map((one) => one.name)
    const named = Object.entries(says).filter(([, [expected]]) => expected === 'failure')
    expect(failures).toEqual(expect.arrayContaining(named.map(([what]) => what)))
    expect(failures.length > 0).toBe(!canAttach)
  })
})

test('the only device, which is free and has no node: it is counted, and attaching works', async ({ folder }) => {
  await using control = await LoopControl.open()
  const number = await control.add(unusedNumber())
  onTestFinished(() => removeDevice(number))
  for (const name of ['dev', 'block']) mkdirSync(join(folder, name))
  symlinkSync(`/sys/devices/virtual/block/loop${number}`, join(folder, 'block', `loop${number}`))
  const script = `mount --bind '${folder}/block' /sys/block; ${OWN_DEV}; rm "$dev"/loop${number}; mount --move "$dev" /dev`
  const { status, stdout } = run(privately(script)(join(folder, 'dev')), copy, 'doctor', '--json')
  const report = JSON.parse(stdout) as DoctorReport
  expect(check(report, 'attach')).toMatchObject({ status: 'ok' })
  expect(report.environment).toMatchObject({ devices: 1, free: 1 })
  expect(status).toBe(0)
  expect(sysfs(number, 'loop/backing_file')).toBeUndefined()
  expect(sysfs(number, 'queue/logical_block_size')).toBe('512')
})

test('what cannot be seen without /proc is left out, not taken for missing', ({ folder }) => {
  const enter = privately('umount -l /proc')(join(folder, 'dev'))
  const { status, stdout, stderr } = run(enter, ROOT, 'doctor', '--json')
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
  const { canAttach, checks, environment } = JSON.parse(stdout) as DoctorReport
  expect({ canAttach, devFileSystem: environment['devFileSystem'] }).toEqual({ canAttach: true, devFileSystem: null })
  expect(checks.find(({ name }) => name === '/dev')?.status).toBe('ok')

  const without = privately('umount -l /sys; umount -l /proc')(join(folder, 'dev'))
  const { features } = JSON.parse(run(without, ROOT, 'doctor', '--json').stdout) as DoctorReport
  expect(Object.keys(features)).not.toEqual(expect.arrayContaining(['mbr']))
})

test('a device cgroup that denies the devices is named', async () => {
  const group = `/sys/fs/cgroup/devices/loopctl-test-${process.pid}`
  needsKernel('device cgroup')
  mkdirSync(group)
  onTestFinished(() => rmdirSync(group))
  writeFileSync(join(group, 'devices.deny'), 'b 7:* rwm')
  const enter = ['sh', '-euc', 'echo $$ > "$1"/cgroup.procs; shift; exec "$@"', 'sh', group]
  const { status, stdout } = run(enter, ROOT, 'doctor', '--json')
  expect(status).toBe(1)
  const report = JSON.parse(stdout) as DoctorReport
  for (const name of ['device access', 'attach']) {
    expect(check(report, name)).toMatchObject({
      status: 'failure',
      message: expect.stringContaining('device cgroup'),
      remedy: expect.stringContaining("--device-cgroup-rule 'b 7:* rmw'"),
    })
  }
  expect(check(report, 'loop-control').status).toBe('ok')
})

describe('the command', () => {
  test('a line for each check, with what to do under it, and exit 0', async () => {
    const { status, stdout, stderr } = run(['env'], ROOT, 'doctor')
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    const lines = stdout.trimEnd().split('\n')
    expect(lines.at(-1)).toBe('attaching works')
    const { checks } = JSON.parse(run(['env'], ROOT, 'doctor', '--json').stdout) as DoctorReport
    for (const { name, status: state } of checks) {
      const mark = { ok: '✓', warning: '!', failure: '✗' }[state]
      expect(
        lines.find((line) => line.startsWith(`${mark} ${name} `)),
        name,
      ).toBeDefined()
    }
    const arrows = lines.filter((line) => /^ +-> \S/.test(line))
    expect(arrows.length).toBe(checks.filter(({ remedy }) => remedy !== undefined).length)
  })

  test('exit 1 where attaching does not work, with the hint of attach itself as the remedy', async ({
    folder,
    image,
  }) => {
    chmodSync(folder, 0o755)
    const file = image('disk.img')
    chmodSync(file, 0o666)
    const { status, stdout, stderr } = run(AS_NOBODY, copy, 'doctor')
    expect({ status, stderr }).toEqual({ status: 1, stderr: '' })
    expect(stdout).toMatch(/\nattaching does not work\n$/)
    const hint = /^hint: (.+)$/m.exec(run(AS_NOBODY, copy, 'attach', '--overlap', 'allow', file).stderr)?.[1]
    expect(stdout).toMatch(new RegExp(`^✗ attach .+\\n +-> ${hint}$`, 'm'))
  })

  test('takes no arguments', () => {
    expect(run(['env'], ROOT, 'doctor', 'please')).toMatchObject({ status: 2, stdout: '' })
  })
})
