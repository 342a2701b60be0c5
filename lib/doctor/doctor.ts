/** Whether attaching works here, and what stands in its way: each thing tried or read, none guessed. */

import { constants, release } from 'node:os'
import { assertSupported, LoopError } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { checkDeviceNode, CONTROL, devicePath, openDevice } from '../kernel/devnode.ts'
import { type Feature, knownFeatures, pageSize } from '../kernel/features.ts'
import { access, close, O_RDONLY } from '../kernel/files.ts'
import { mountOf, readMountsSync } from '../kernel/mountinfo.ts'
import {
  canAdministrate,
  CAP_DAC_OVERRIDE,
  CAP_MKNOD,
  CAP_SYS_ADMIN,
  hasCapability,
  type Privileges,
  readPrivileges,
} from '../kernel/process.ts'
import * as around from '../kernel/system.ts'
import * as sysfs from '../kernel/sysfs.ts'
import { type Trial, tryAttaching, within } from './try-attach.ts'

const { EACCES, ENOENT, EPERM, EROFS } = constants.errno
const W_OK = 2

/** The result of one check. */
export interface DoctorCheck {
  name: string
  /** `failure`: attaching does not work because of this. `warning`: something else does not work, or not everywhere. */
  status: 'ok' | 'warning' | 'failure'
  message: string
  /** What to do about it, in one sentence. */
  remedy?: string
}

/** The result of {@link doctor}; plain data. */
export interface DoctorReport {
  /** Whether attaching works: a file was attached, and detached again. */
  canAttach: boolean
  /** The kernel's release. */
  kernel: string
  checks: DoctorCheck[]
  /** What the kernel can do. A feature that could not be checked is missing. */
  features: Record<string, boolean>
  environment: Record<string, unknown>
}

/**
 * Checks everything that attaching needs, and attaches a small temporary file. Never rejects; on systems other than
 * Linux the report says that it is not Linux. It removes everything that it made. If the loop driver is a module, this
 * loads it, as attach() does.
 *
 * @example
 * ```ts
 * const { canAttach, checks } = await doctor()
 * console.log(canAttach)
 * for (const { name, status, remedy } of checks) console.log(name, status, remedy ?? '')
 * ```
 */
export async function doctor(): Promise<DoctorReport> {
  const kernel = release()
  const base = { arch: process.arch, node: process.version }
  try {
    assertSupported()
  } catch (error) {
    const check = failed('platform', 'failure', error as LoopError)
    return { canAttach: false, kernel, checks: [check], features: {}, environment: base }
  }
  const trial = await tryAttaching()
  const facts = await gather(trial)
  const { privileges, mounts, free, ...shown } = facts
  return {
    canAttach: facts.canAttach,
    kernel,
    checks: [...driverChecks(facts), ...nodeChecks(facts), ...sandboxChecks(facts), ...(await kernelChecks(facts))],
    features: knownFeatures(),
    environment: {
      uid: privileges.uid,
      capabilities: `0x${privileges.capabilities.toString(16)}`,
      userNamespace: privileges.inUserNamespace,
      seccomp: privileges.filtered,
      container: shown.container,
      devFileSystem: mountOf('/dev', mounts)?.fsType ?? null,
      udev: shown.udev,
      devices: shown.numbers?.length ?? null,
      free: free?.length ?? null,
      maxLoop: around.readParameter('max_loop') ?? null,
      maxPart: around.readParameter('max_part') ?? null,
      pageSize: pageSize(),
      largestBlockSize: trial.largestBlockSize ?? null,
      ...base,
    },
  }
}

type Facts = Awaited<ReturnType<typeof gather>>

async function gather(trial: Trial) {
  const numbers = await sysfs.readNumbers()
  const known = typeof numbers === 'number' ? undefined : numbers
  const free = known?.filter((number) => !sysfs.isBound(number))
  return {
    trial,
    canAttach: trial.attach === undefined,
    /** Where what was tried failed: it is what keeps attaching from working, or it is not. */
    bad: trial.attach === undefined ? ('warning' as const) : ('failure' as const),
    numbers: known,
    free,
    badNodes: known?.map((number) => ({ number, errno: checkDeviceNode(number) })).filter(({ errno }) => errno < 0),
    opened: await tryFreeDevice(free ?? []),
    privileges: readPrivileges(),
    mounts: readMountsSync(),
    isReadOnlyDev: (await access('/dev', W_OK)) === -EROFS,
    module: await quietly(around.findModule),
    container: around.readContainer(),
    udev: around.isUdevRunning(),
  }
}

/** Opens a device that nobody uses: null where that works, undefined where there is none to try. */
async function tryFreeDevice(free: number[]): Promise<LoopError | null | undefined> {
  const number = free.find((candidate) => checkDeviceNode(candidate) === 0)
  if (number === undefined) return undefined
  const fd = await quietly(() => openDevice(number, O_RDONLY))
  if (fd === undefined) return undefined
  if (fd < 0) return explain({ call: 'open', errno: fd, path: devicePath(number), number }, 'open device')
  await close(fd)
  return null
}

/** Undefined where it takes too long. */
async function quietly<T>(look: () => Promise<T>): Promise<T | undefined> {
  try {
    return await within('look', look)
  } catch {
    return undefined
  }
}

function driverChecks({ trial, canAttach, bad, module, numbers, free }: Facts): DoctorCheck[] {
  const isThere = trial.control === undefined || sysfs.isControlThere() || around.isDriverListed()
  const kind = around.isModuleLoaded() ? 'a module, loaded' : 'built in'
  const driver = isThere
    ? ok('loop driver', sysfs.isMounted() ? kind : 'there')
    : failed('loop driver', bad, explain({ call: 'open', errno: -ENOENT, path: CONTROL }, 'open /dev/loop-control'))
  if (!isThere) driver.message = module === 'module' ? 'a module that is not loaded' : 'absent'
  const maxLoop = around.readParameter('max_loop')
  const maxPart = around.readParameter('max_part')
  return [
    ok('kernel', release()),
    driver,
    trial.control ? failed('loop-control', bad, trial.control) : ok('loop-control', `${CONTROL} can be opened`),
    trial.attach
      ? failed('attach', 'failure', trial.attach)
      : trial.detach
        ? failed('attach', 'warning', trial.detach)
        : ok('attach', `a file was attached${trial.readOnly ? ' read-only' : ''}, and detached again`),
    trial.readOnly && canAttach
      ? {
          name: 'temporary file',
          status: 'warning' as const,
          message: 'no folder takes one',
          remedy: 'let TMPDIR name a folder that can be written',
        }
      : [],
    numbers && free ? ok('devices', `${numbers.length}, of which ${free.length} free`) : [],
    maxLoop === undefined || maxPart === undefined
      ? []
      : ok('parameters', `max_loop ${maxLoop} (devices made at the start), max_part ${maxPart}`),
  ].flat()
}

function nodeChecks({
  trial,
  bad,
  badNodes,
  opened,
  mounts,
  isReadOnlyDev,
  udev,
  numbers,
  privileges,
}: Facts): DoctorCheck[] {
  const dev = mountOf('/dev', mounts)
  const isNodev = dev?.options.includes('nodev') ?? false
  const isReadOnly = isReadOnlyDev || (dev?.options.includes('ro') ?? false)
  const follows = dev?.fsType === 'devtmpfs'
  const sys = mountOf('/sys', mounts)
  const marks = [isNodev ? 'nodev' : [], isReadOnly ? 'read-only' : []].flat()
  const devCheck = ok('/dev', [dev?.fsType ?? 'of an unknown kind', ...marks].join(', '))
  if (isNodev) {
    const error = explain({ call: 'open', errno: -EACCES, path: CONTROL }, 'open /dev/loop-control')
    Object.assign(devCheck, { status: bad, ...remedyOf(error) })
  } else if (dev !== undefined && !follows && !udev) {
    const cannot = isReadOnly || privileges.inUserNamespace || !hasCapability(privileges, CAP_MKNOD)
    devCheck.message += `: nodes of new devices do not appear by themselves${cannot ? '' : ', attach() makes them'}`
    if (cannot) {
      const refused = explain({ call: 'mknod', errno: isReadOnly ? -EROFS : -EPERM, path: '/dev/loopN' }, 'make node')
      Object.assign(devCheck, { status: 'warning', ...remedyOf(refused) })
    }
  }
  return [
    devCheck,
    numbers && badNodes ? nodesCheck(numbers, badNodes, trial) : [],
    opened === undefined
      ? []
      : opened
        ? failed('device access', bad, opened)
        : ok('device access', 'a free device can be opened: the device cgroup lets it'),
    sysfs.isMounted()
      ? ok('sysfs', `mounted${sys?.options.includes('ro') ? ' read-only, which is enough' : ''}`)
      : failed('sysfs', 'warning', explain({ call: 'scandir', errno: -ENOENT, path: '/sys/block' }, 'read /sys')),
    ok('udev', udev ? 'running' : 'not running'),
  ].flat()
}

function nodesCheck(numbers: number[], bad: { number: number; errno: number }[], trial: Trial): DoctorCheck {
  const [first] = bad
  if (first === undefined) return ok('nodes', 'every device has its node')
  const { number, errno } = first
  const error = explain({ call: 'stat', errno, path: devicePath(number), number }, 'open device')
  if (trial.attach === undefined && bad.every((one) => one.errno === -ENOENT)) {
    return ok(
      'nodes',
      `${bad.length} of ${numbers.length} devices have none in this /dev; attach() makes the one it needs`,
    )
  }
  const isCause = trial.attach?.reason === 'node-missing'
  const message = `${bad.length} of ${numbers.length} devices have no usable node, the first is ${devicePath(number)}`
  return { name: 'nodes', status: isCause ? 'failure' : 'warning', message, ...remedyOf(error) }
}

function sandboxChecks({ privileges, canAttach, container, mounts }: Facts): DoctorCheck[] {
  // What is said where a call that wants CAP_SYS_ADMIN is refused
  const refused = explain({ call: 'LOOP_SET_STATUS64', errno: -EPERM })
  const { inUserNamespace } = privileges
  const isDevKernels = mountOf('/dev', mounts)?.fsType === 'devtmpfs'
  // Those that would change something here
  const counts: Record<string, boolean> = { CAP_MKNOD: !isDevKernels, CAP_DAC_OVERRIDE: !canAttach }
  const lacks = CAPABILITIES.filter(
    ([name, capability]) => (counts[name] ?? true) && !hasCapability(privileges, capability),
  ).map(([name]) => name)
  const capabilities = ok('capabilities', lacks.length === 0 ? 'all that count' : `without ${lacks.join(', ')}`)
  if (!canAdministrate(privileges)) Object.assign(capabilities, { status: 'warning', ...remedyOf(refused) })
  else if (lacks.length > 0) {
    const flags = lacks.map((name) => `--cap-add ${name.slice('CAP_'.length)}`).join(' ')
    Object.assign(capabilities, { status: 'warning', remedy: `add them: docker run ${flags}` })
  }
  return [
    capabilities,
    inUserNamespace
      ? { name: 'user namespace', status: 'warning', message: "not the machine's", ...remedyOf(refused) }
      : ok('user namespace', "the machine's"),
    seccomp(privileges, canAttach),
    containerCheck(container, canAttach),
  ]
}

const CAPABILITIES = [
  ['CAP_SYS_ADMIN', CAP_SYS_ADMIN],
  ['CAP_MKNOD', CAP_MKNOD],
  ['CAP_DAC_OVERRIDE', CAP_DAC_OVERRIDE],
] as const

function seccomp({ filtered }: Privileges, canAttach: boolean): DoctorCheck {
  if (!filtered) return ok('seccomp', 'no filter')
  const message = 'a filter is in effect'
  if (canAttach) return ok('seccomp', `${message}, and lets attaching pass`)
  return { name: 'seccomp', status: 'warning', message, remedy: 'try docker run --security-opt seccomp=unconfined' }
}

function containerCheck(container: string | null, canAttach: boolean): DoctorCheck {
  if (container === null) return ok('container', 'none, as far as can be seen')
  if (canAttach) return ok('container', container)
  const flags =
    "--cap-add SYS_ADMIN --cap-add MKNOD --device /dev/loop-control --device-cgroup-rule 'c 10:237 rwm' --device-cgroup-rule 'b 7:* rmw' --device-cgroup-rule 'b 259:* rmw'"
  return { name: 'container', status: 'warning', message: container, remedy: `start it with: docker run ${flags}` }
}

async function kernelChecks({ trial, canAttach }: Facts): Promise<DoctorCheck[]> {
  if (!canAttach) return []
  const found = knownFeatures()
  const upTo = trial.largestBlockSize
  return [
    feature(
      'LOOP_CONFIGURE',
      found.loopConfigure,
      'attaching is one step',
      'attaching takes several steps (kernel 5.8)',
    ),
    feature('disk sequence numbers', found.diskSeq, numbering(found), 'none (kernel 5.15)'),
    upTo === undefined ? [] : ok('block sizes', `512 to ${upTo}`),
    feature('direct I/O', found.directIO, 'works for a temporary file', 'not for a temporary file', OTHER_FILESYSTEM),
    await parser('MBR partitions', found.mbr, 'CONFIG_MSDOS_PARTITION'),
    await parser('GPT partitions', found.gpt, 'CONFIG_EFI_PARTITION'),
    trial.partitionNode === undefined
      ? []
      : trial.partitionNode
        ? partitionNodeCheck(trial.partitionNode)
        : ok('partition nodes', 'appear, and can be opened'),
  ].flat()
}

const OTHER_FILESYSTEM =
  "keep images on a filesystem that takes direct I/O (ext4, xfs), or attach with directIO: 'prefer'"

function numbering({ diskSeqPerAttachment }: Partial<Record<Feature, boolean>>): string {
  return diskSeqPerAttachment ? 'they count attachments' : 'there, but they do not count attachments'
}

function partitionNodeCheck(error: LoopError): DoctorCheck {
  if (error.code !== 'ENOENT') return failed('partition nodes', 'warning', error)
  return {
    name: 'partition nodes',
    status: 'warning',
    message: 'do not appear in this /dev',
    remedy: 'see what the check of /dev says',
  }
}

/** Undefined: it could not be found out, and nothing is said. */
function feature(name: string, has: boolean | undefined, yes: string, no: string, remedy?: string): DoctorCheck[] {
  if (has === undefined) return []
  if (has) return [ok(name, yes)]
  return [{ name, status: 'warning', message: no, remedy: remedy ?? 'it works without; a newer kernel has it' }]
}

async function parser(name: string, has: boolean | undefined, option: string): Promise<DoctorCheck[]> {
  const set = has === false ? await quietly(() => around.readKernelOption(option)) : undefined
  const no = `the kernel did not find them${set === 'n' ? `: ${option} is off` : ''}`
  return feature(name, has, 'found by the kernel', no, 'partscan: true works all the same: loopctl reads the table')
}

function ok(name: string, message: string): DoctorCheck {
  return { name, status: 'ok', message }
}

/** The error's own words: causes are told in one place. */
function failed(name: string, status: 'warning' | 'failure', error: LoopError): DoctorCheck {
  return { name, status, message: error.message, ...remedyOf(error) }
}

function remedyOf({ hint }: LoopError): { remedy?: string } {
  return hint === undefined ? {} : { remedy: hint }
}
