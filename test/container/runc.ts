/** A container of runc, made as docker and podman would make it from a run line. */

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { text } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'

export const ROOT = fileURLToPath(new URL('../..', import.meta.url)).replace(/\/$/, '')

/** What a container may, beyond nothing; the words are those of a run line. */
export interface Privileges {
  /** `--cap-add`, after `--cap-drop ALL`. */
  capabilities: readonly string[]
  /** `--device`: the node, and the right to use it. */
  devices: readonly string[]
  /** `--device-cgroup-rule`. */
  deviceRules: readonly string[]
}

/** What README.md of the example names. */
export const LEAST: Privileges = {
  capabilities: ['SYS_ADMIN', 'MKNOD'],
  devices: ['/dev/loop-control'],
  deviceRules: ['b 7:* rmw', 'b 259:* rmw'],
}

export interface ContainerOptions {
  privileges?: Privileges
  /** Mounted read-write, under the same path. */
  folder: string
  /** A node of /dev that is there without the right to use it. */
  forbidden?: readonly string[]
  /** Root in the container is an ordinary user outside. */
  userNamespace?: boolean
  /** Beside PATH and HOME. */
  env?: Readonly<Record<string, string>>
}

export interface Ended {
  status: number | null
  stdout: string
  stderr: string
}

const LIMIT = 60_000
const HELPER = [process.execPath, join(ROOT, 'test/container/fixtures/inside.mjs'), ROOT] as const
/** Of the machine's own system, mounted read-only: what node, mkfs and mount need. */
const SYSTEM = ['/usr', '/bin', '/sbin', '/lib', '/lib64', '/etc']
const FIRST_USER = 100_000
const SECCOMP_PROFILE = '/usr/share/containers/seccomp.json'
const ARCHITECTURES: Record<string, string> = { x64: 'amd64', arm64: 'arm64' }

/** Major and minor of the character devices that runc does not make by itself. */
const NODES: Record<string, { major: number; minor: number }> = { '/dev/loop-control': { major: 10, minor: 237 } }

/** Why no container can be run here; empty where one can. */
export function whyNoContainer(): string {
  for (const [command, ...words] of [
    ['runc', '--version'],
    ['sfdisk', '--version'],
    ['mkfs.ext4', '-V'],
  ] as const) {
    try {
      execFileSync(command, words, { stdio: 'ignore' })
    } catch (error) {
      return `${command} cannot be run (${error instanceof Error ? error.message : String(error)})`
    }
  }
  if (!existsSync(SECCOMP_PROFILE)) return `there is no ${SECCOMP_PROFILE} (Debian: golang-github-containers-common)`
  return ''
}

/** Runs fixtures/inside.mjs with these words in a container of its own, which is gone when this resolves. */
export async function runInside(words: readonly string[], options: ContainerOptions): Promise<Ended> {
  return runContainer([...HELPER, ...words], options)
}

/** Runs a command in a container of its own, which is gone when this resolves, however the command ended. */
export async function runContainer(command: readonly string[], options: ContainerOptions): Promise<Ended> {
  const id = `loopctl-test-${randomUUID()}`
  const bundle = realpathSync(mkdtempSync(join(tmpdir(), 'loopctl-bundle-')))
  const state = join(bundle, 'state')
  // A root that is an ordinary user outside has to find its way to it.
  chmodSync(bundle, 0o755)
  let runc: ChildProcess | undefined
  try {
    writeFileSync(join(bundle, 'config.json'), JSON.stringify(configOf(id, bundle, command, options)))
    runc = spawn('runc', ['--root', state, 'run', '--bundle', bundle, id], {
      stdio: ['ignore', 'pipe', 'pipe'],
      timeout: LIMIT,
      killSignal: 'SIGKILL',
    })
    const [stdout, stderr] = await Promise.all([text(runc.stdout!), text(runc.stderr!), once(runc, 'close')])
    return { status: runc.exitCode, stdout, stderr }
  } finally {
    // Kills what is left in it and takes its cgroups away; it is usually gone already, of which --force says nothing.
    execFileSync('runc', ['--root', state, 'delete', '--force', id], { stdio: 'ignore' })
    removeBundle(bundle)
  }
}

/** The root of the container is made of mounts of this machine's system: never delete through one. */
function removeBundle(bundle: string): void {
  if (readFileSync('/proc/self/mountinfo', 'utf8').includes(bundle)) throw new Error(`mounts are left in ${bundle}`)
  rmSync(bundle, { recursive: true })
}

interface Mount {
  destination: string
  type: string
  source: string
  options: string[]
}

/** https://github.com/opencontainers/runtime-spec/blob/main/config.md */
function configOf(
  id: string,
  bundle: string,
  command: readonly string[],
  { privileges = LEAST, folder, forbidden = [], userNamespace = false, env = {} }: ContainerOptions,
): unknown {
  const capabilities = privileges.capabilities.map((name) => `CAP_${name}`)
  const mapping = [{ containerID: 0, hostID: FIRST_USER, size: 65_536 }]
  const mounts = [...PRIVATE_MOUNTS, ...systemMounts(), bind(folder, 'rw')]
  return {
    ociVersion: '1.0.2',
    process: {
      user: { uid: 0, gid: 0 },
      args: command,
      cwd: '/',
      env: [
        'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
        'HOME=/tmp',
        ...Object.entries(env).map(([name, value]) => `${name}=${value}`),
      ],
      capabilities: { bounding: capabilities, effective: capabilities, permitted: capabilities },
      noNewPrivileges: true,
    },
    root: { path: makeRoot(bundle, mounts), readonly: true },
    mounts,
    linux: {
      // Under the root of the hierarchies, where the rules of this test's own cgroup do not apply.
      cgroupsPath: `/${id}`,
      namespaces: ['pid', 'network', 'ipc', 'uts', 'mount', ...(userNamespace ? ['user'] : [])].map((type) => ({
        type,
      })),
      ...(userNamespace && { uidMappings: mapping, gidMappings: mapping }),
      devices: [...privileges.devices, ...forbidden].map((path) => ({
        path,
        type: 'c',
        ...NODES[path],
        fileMode: 0o660,
      })),
      resources: {
        devices: [
          { allow: false, access: 'rwm' },
          ...privileges.devices.map((path) => ({ allow: true, type: 'c', ...NODES[path], access: 'rwm' })),
          ...privileges.deviceRules.map(parseRule),
        ],
      },
      seccomp: seccompOf(capabilities),
      maskedPaths: ['/proc/kcore', '/proc/keys', '/proc/timer_list', '/sys/firmware'],
      readonlyPaths: ['/proc/bus', '/proc/fs', '/proc/irq', '/proc/sys', '/proc/sysrq-trigger'],
    },
  }
}

/** `b 7:* rmw`, as --device-cgroup-rule has it; no number stands for all. */
function parseRule(rule: string): unknown {
  const [, type, major, minor, access] = /^([bc]) (\d+):(\d+|\*) ([rwm]+)$/.exec(rule) ?? []
  if (major === undefined) throw new Error(`no rule of a device cgroup: ${rule}`)
  return { allow: true, type, major: Number(major), ...(minor !== '*' && { minor: Number(minor) }), access }
}

interface SeccompCondition {
  caps?: string[]
  arches?: string[]
}

interface SeccompRule {
  names: string[]
  action: string
  errnoRet?: number
  args?: unknown[]
  includes?: SeccompCondition
  excludes?: SeccompCondition
}

function namesIn({ caps = [], arches = [] }: SeccompCondition = {}): string[] {
  return [...caps, ...arches]
}

/** The default profile of podman, as it is for these capabilities; docker's is the same for what matters here. */
function seccompOf(capabilities: readonly string[]): unknown {
  const { defaultAction, defaultErrnoRet, syscalls } = JSON.parse(readFileSync(SECCOMP_PROFILE, 'utf8')) as {
    defaultAction: string
    defaultErrnoRet: number
    syscalls: SeccompRule[]
  }
  const facts = new Set([...capabilities, ARCHITECTURES[process.arch]])
  return {
    defaultAction,
    defaultErrnoRet,
    syscalls: syscalls
      .filter(({ includes, excludes }) => {
        const [wanted, unwanted] = [namesIn(includes), namesIn(excludes)]
        return (
          (wanted.length === 0 || wanted.some((name) => facts.has(name))) && !unwanted.some((name) => facts.has(name))
        )
      })
      .map(({ names, action, errnoRet, args }) => ({
        names,
        action,
        ...(errnoRet !== undefined && { errnoRet }),
        ...(args?.length && { args }),
      })),
  }
}

/** runc itself puts null, zero, full, random, urandom and tty into a /dev that is a tmpfs. */
const PRIVATE_MOUNTS: Mount[] = [
  { destination: '/proc', type: 'proc', source: 'proc', options: [] },
  { destination: '/dev', type: 'tmpfs', source: 'tmpfs', options: ['nosuid', 'strictatime', 'mode=755'] },
  { destination: '/sys', type: 'sysfs', source: 'sysfs', options: ['nosuid', 'noexec', 'nodev', 'ro'] },
  { destination: '/tmp', type: 'tmpfs', source: 'tmpfs', options: ['nosuid', 'nodev', 'mode=1777'] },
]

/** The root folder: the points to mount on, which a root without rights outside could not make, and the links of /. */
function makeRoot(bundle: string, mounts: readonly Mount[]): string {
  const root = join(bundle, 'rootfs')
  for (const { destination } of mounts) mkdirSync(join(root, destination), { recursive: true })
  for (const path of SYSTEM) {
    if (isLink(path)) symlinkSync(readlinkSync(path), join(root, path))
  }
  return root
}

function systemMounts(): Mount[] {
  const folders = SYSTEM.filter((path) => isLink(path) === false)
  const node = dirname(dirname(realpathSync(process.execPath)))
  // node_modules may be a link to another checkout's.
  const also = [node, ROOT, realpathSync(join(ROOT, 'node_modules'))]
  for (const path of also) {
    if (!folders.some((folder) => path === folder || path.startsWith(`${folder}/`))) folders.push(path)
  }
  return folders.map((path) => bind(path, 'ro'))
}

function bind(path: string, access: 'ro' | 'rw'): Mount {
  return { destination: path, type: 'bind', source: path, options: ['bind', access, 'nosuid', 'nodev'] }
}

/** Undefined where there is nothing. */
function isLink(path: string): boolean | undefined {
  return lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink()
}
