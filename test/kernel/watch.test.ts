import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, readFileSync, readlinkSync, truncateSync, writeFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { describe, expect, onTestFinished, vi } from 'vitest'
import { attach, LoopControl, type LoopEvent, watch } from '../../lib/index.ts'
import { blkRoSetSync } from '../../lib/ioctl.ts'
import { readInfo } from '../../lib/observe/list.ts'
import { parseUevent, subscribe, type Uevent } from '../../lib/kernel/uevent.ts'
import { USER_NAMESPACE } from './environments.ts'
import { skipForKernel } from '../needs.ts'
import { limit } from '../scale.ts'
import { removeDevice, sysfs, test, unusedNumber } from './support.ts'

const MiB = 1 << 20

/** Whether the event is of that device while it was attached to a file in the folder. */
function isOf(event: LoopEvent, number: number, folder: string): boolean {
  return 'info' in event && event.number === number && (event.info.backingFile ?? '').startsWith(`${folder}/`)
}

/** What a watcher told, in order; it ends with the test. */
class Observer {
  readonly events: LoopEvent[] = []
  readonly ended: Promise<unknown>
  readonly #controller = new AbortController()
  readonly #folder: string

  /** Of attachments of files in that folder only: the number can be another program's before and afterwards. */
  constructor(folder: string) {
    this.#folder = folder
    const { signal } = this.#controller
    const watcher = watch({ signal })
    onTestFinished(async () => {
      this.#controller.abort()
      await this.ended
    })
    this.ended = (async () => {
      try {
        for await (const event of watcher) this.events.push(event)
      } catch (error) {
        if (error !== signal.reason) throw error
      }
    })()
  }

  /** Of one device; whether it had to be made first is not of interest. */
  of(number: number): LoopEvent[] {
    return this.events.filter((event) => isOf(event, number, this.#folder))
  }

  /** Waits until so many events of the device have come, and answers the last. */
  async nth(count: number, number: number): Promise<LoopEvent> {
    await eventually(() => expect(this.of(number).length).toBeGreaterThanOrEqual(count))
    const events = this.of(number)
    expect(events, JSON.stringify(events)).toHaveLength(count)
    return events[count - 1] as LoopEvent
  }
}

function eventually<T>(look: () => T): Promise<T> {
  return vi.waitFor(look, { timeout: 15_000, interval: 5 })
}

function losetup(...words: string[]): string {
  return execFileSync('losetup', words, { encoding: 'utf8' }).trim()
}

function numberOf(path: string): number {
  return Number(/^\/dev\/loop(\d+)$/.exec(path)?.[1])
}

/** A device that nobody else is offered; removed with the test. */
async function ownDevice(): Promise<{ number: number; path: string }> {
  await using control = await LoopControl.open()
  const number = await control.add(unusedNumber())
  onTestFinished(() => removeDevice(number))
  return { number, path: `/dev/loop${number}` }
}

/** This process's descriptors of watchers: uevent sockets, and eventfds, of which Node has some of its own. */
function countOpen(): number {
  const sockets = new Set(
    readFileSync('/proc/self/net/netlink', 'utf8')
      .split('\n')
      .map((line) => line.trim().split(/\s+/))
      .filter(([, protocol]) => protocol === '15')
      .map((fields) => `socket:[${fields[9]}]`),
  )
  const links = readdirSync('/proc/self/fd').map((fd) => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`)
    } catch {
      return ''
    }
  })
  return links.filter((link) => sockets.has(link) || link === 'anon_inode:[eventfd]').length
}

/** Threads of this process, but for those that calls run on, which come and go. */
function countThreads(): number {
  return readdirSync('/proc/self/task').filter((id) => {
    try {
      return readFileSync(`/proc/self/task/${id}/comm`, 'utf8') !== 'loopctl\n'
    } catch {
      return false
    }
  }).length
}

/** Has the kernel send that many uevents of the device, while this process waits. */
function flood(number: number, count: number): void {
  const script = `
import os, sys
fd = os.open(f'/sys/block/loop{sys.argv[1]}/uevent', os.O_WRONLY)
for _ in range(int(sys.argv[2])): os.write(fd, b'change')`
  execFileSync('python3', ['-c', script, String(number), String(count)])
}

interface Child {
  process: ChildProcess
  /** The lines that it has written so far. */
  lines: unknown[]
  ended: Promise<number | string>
}

function start(how: string, before: readonly string[] = []): Child {
  const fixture = fileURLToPath(new URL('fixtures/watcher.mjs', import.meta.url))
  const words = [...before, process.execPath, fixture, how]
  const child = spawn('env', words, { stdio: ['ignore', 'pipe', 'inherit'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  const lines: unknown[] = []
  createInterface(child.stdout).on('line', (line) => lines.push(JSON.parse(line)))
  const ended = once(child, 'close').then(([code, signal]) => (code ?? signal) as number | string)
  return { process: child, lines, ended }
}

async function watching(child: Child): Promise<void> {
  await eventually(() => expect(child.lines).toContain('watching'))
}

describe('watch', () => {
  test('tells attach, resize, change and detach, each with the device as it was', async ({ folder, image }) => {
    const file = image('disk')
    const observer = new Observer(folder)
    // At once: what happens after the call of watch() is an event.
    await using device = await attach(file, { blockSize: 4096 })
    const { number } = device
    expect(await observer.nth(1, number)).toMatchObject({
      type: 'attach',
      info: { number, attached: true, backingFile: file, size: MiB, autoclear: true, blockSize: 4096 },
    })
    truncateSync(file, 2 * MiB)
    await device.refreshCapacity()
    expect(await observer.nth(2, number)).toMatchObject({ type: 'resize', info: { size: 2 * MiB } })
    const { diskSeq } = await device.status()
    // For which no kernel sends anything
    await device.setStatus({ autoclear: false })
    expect(await observer.nth(3, number)).toMatchObject({ type: 'change', info: { autoclear: false } })
    await device.detach()
    expect(await observer.nth(4, number)).toMatchObject({
      type: 'detach',
      info: { attached: true, backingFile: file, size: 2 * MiB, ...(diskSeq !== undefined && { diskSeq }) },
    })
    expect(sysfs(number, 'loop/backing_file')).toBeUndefined()
  })

  test('tells what losetup does', async ({ folder, image }) => {
    const file = image('disk')
    const observer = new Observer(folder)
    const path = losetup('--find', '--show', '--read-only', file)
    const number = numberOf(path)
    expect(await observer.nth(1, number)).toMatchObject({ type: 'attach', info: { backingFile: file, readOnly: true } })
    losetup('--detach', path)
    expect(await observer.nth(2, number)).toMatchObject({ type: 'detach', info: { backingFile: file } })
  })

  test('two see the same', async ({ folder, image }) => {
    const observers = [new Observer(folder), new Observer(folder)]
    const device = await attach(image('disk'))
    for (const observer of observers) await observer.nth(1, device.number)
    await device.detach()
    for (const observer of observers) {
      await observer.nth(2, device.number)
      expect(observer.of(device.number).map(({ type }) => type)).toEqual(['attach', 'detach'])
    }
  })

  test('tells add and remove', async ({ folder }) => {
    const observer = new Observer(folder)
    await using control = await LoopControl.open()
    const number = await control.add(unusedNumber())
    const own = () => observer.events.filter((event) => event.type !== 'resync' && event.number === number)
    await eventually(() => expect(own()).toMatchObject([{ type: 'add', info: { attached: false, number } }]))
    await control.remove(number)
    await eventually(() => expect(own().slice(1)).toEqual([{ type: 'remove', number }]))
  })

  test('LOOP_CHANGE_FD is a change', async ({ folder, image }) => {
    const [first, second] = [image('first'), image('second')]
    await using device = await attach(first, { readOnly: true })
    const observer = new Observer(folder)
    await device.changeBackingFile(second)
    expect(await observer.nth(1, device.number)).toMatchObject({ type: 'change', info: { backingFile: second } })
  })

  test('what was detached and attached between two looks was both', async ({ folder, image }) => {
    for (const mode of ['--direct-io=off', '--read-only']) {
      const [first, second] = [image('first'), image('second')]
      const { number, path } = await ownDevice()
      // Without them it is a change of the file.
      if (sysfs(number, 'diskseq') === undefined) skipForKernel('disk sequence numbers')
      losetup(mode, path, first)
      const observer = new Observer(folder)
      // This process does not get to look meanwhile.
      losetup('--detach', path)
      losetup(mode, path, second)
      try {
        expect(await observer.nth(2, number)).toMatchObject({ type: 'attach', info: { backingFile: second } })
        expect(observer.of(number)[0]).toMatchObject({ type: 'detach', info: { backingFile: first } })
      } finally {
        losetup('--detach', path)
      }
      await observer.nth(3, number)
    }
  })

  test('the events since the call wait for the first next(), in order', async ({ folder, image }) => {
    const watcher = watch()
    const witness = new Observer(folder)
    const file = image('disk')
    const device = await attach(file)
    await witness.nth(1, device.number)
    truncateSync(file, 2 * MiB)
    await device.refreshCapacity()
    await witness.nth(2, device.number)
    await device.detach()
    await witness.nth(3, device.number)
    const seen: string[] = []
    for await (const event of watcher) {
      if (!isOf(event, device.number, folder)) continue
      seen.push(event.type)
      // It may have looked later than the witness, when the device had its new size already.
      if (event.type === 'attach' && 'info' in event && event.info.size === 2 * MiB) seen.push('resize')
      if (event.type === 'detach') break
    }
    expect(seen).toEqual(['attach', 'resize', 'detach'])
  })

  test('where uevents were lost it says so, and how all devices are now', async ({ folder, image }) => {
    const file = image('disk')
    const { number, path } = await ownDevice()
    losetup(path, file)
    const other = image('other')
    await using device = await attach(other)
    const observer = new Observer(folder)
    flood(device.number, 20_000)
    losetup('--detach', path)
    await eventually(() => expect(observer.events.some(({ type }) => type === 'resync')).toBe(true))
    const resync = observer.events.find((event) => event.type === 'resync')
    expect(resync).toMatchObject({ cause: 'overrun' })
    expect(resync?.devices).toContainEqual(expect.objectContaining({ number, attached: false }))
    expect(resync?.devices).toContainEqual(expect.objectContaining({ number: device.number, attached: true }))
    expect(observer.of(number)).toEqual([])
    // And goes on
    truncateSync(other, 2 * MiB)
    await device.refreshCapacity()
    await eventually(() => expect(observer.of(device.number).at(-1)).toMatchObject({ type: 'resize' }))
  })

  test('what nobody asks for is not kept without end', { timeout: limit(60_000) }, async ({ image }) => {
    await using device = await attach(image('disk'))
    const [watcher, witness] = [watch(), watch()]
    // More than fill the queue, because the one can look too late to see what the other has seen.
    for (let i = 1; i <= 2_400; i++) {
      blkRoSetSync(device.fd, i % 2 === 1)
      writeFileSync(`/sys/block/loop${device.number}/uevent`, 'change')
      for await (const event of { [Symbol.asyncIterator]: () => ({ next: () => witness.next() }) }) {
        if (event.type === 'change' && event.number === device.number) break
      }
      await readInfo(device.number)
    }
    const first = await watcher.next()
    expect(first.value).toMatchObject({ type: 'resync', cause: 'overrun' })
    const { devices } = first.value as { devices: object[] }
    expect(devices).toContainEqual(expect.objectContaining({ number: device.number, readOnly: false }))
    await Promise.all([watcher.return?.(), witness.return?.()])
  })

  test('only the kernel is believed', async ({ image }) => {
    await using device = await attach(image('disk'))
    const { number } = device
    const messages: (Uevent | number)[] = []
    const end = subscribe((message) => messages.push(message))
    if (typeof end === 'number') expect.fail(`no netlink: ${end}`)
    // A privileged process can send to the kernel's group; another group member sees that it does.
    const script = `
import socket, sys
def open_socket():
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)
    s.bind((0, 1))
    return s
witness, sender = open_socket(), open_socket()
sender.sendto(sys.argv[1].encode().replace(b'|', b'\\0'), (0, 1))
while b'/fake' not in witness.recv(8192): pass`
    const fake = `change@/fake|ACTION=fake|DEVPATH=/fake|SUBSYSTEM=block|DEVNAME=loop${number}|`
    expect(parseUevent(Buffer.from(fake.replaceAll('|', '\0')))).toMatchObject({ action: 'fake', number })
    execFileSync('python3', ['-c', script, fake], { timeout: 10_000 })
    writeFileSync(`/sys/block/loop${number}/uevent`, 'change')
    const own = () => messages.flatMap((message) => (typeof message === 'object' ? message : []))
    await eventually(() => expect(own().some((uevent) => uevent.number === number)).toBe(true))
    end()
    expect(own().map(({ action }) => action)).not.toContain('fake')
  })
})

describe('without netlink', () => {
  test.for([
    ['in a network namespace of a user namespace', [...USER_NAMESPACE, '--net']],
    ['under a seccomp filter', ['python3', fileURLToPath(new URL('fixtures/no_netlink.py', import.meta.url))]],
  ] as const)('%s it says so first, and tells what it sees', async ([, before], { folder, image }) => {
    const child = start('print', before)
    await watching(child)
    await eventually(() => expect(child.lines[1]).toMatchObject({ type: 'resync', cause: 'no-netlink' }))
    const file = image('disk')
    const device = await attach(file)
    const { number } = device
    const own = () => child.lines.slice(2).filter((line) => isOf(line as LoopEvent, number, folder))
    const ofType = (type: string) => own().filter((line) => (line as LoopEvent).type === type)
    await eventually(() => expect(ofType('attach')).toMatchObject([{ info: { backingFile: file } }]))
    await device.detach()
    await eventually(() => expect(ofType('detach')).toMatchObject([{ info: { backingFile: file } }]))
  })

  test('in a network namespace of root nothing is missing', async ({ image }) => {
    const child = start('print', ['unshare', '--net'])
    await watching(child)
    await using device = await attach(image('disk'))
    const { number } = device
    await eventually(() => expect(child.lines).toContainEqual(expect.objectContaining({ type: 'attach', number })))
    expect(child.lines).not.toContainEqual(expect.objectContaining({ type: 'resync' }))
  })
})

describe('the end of it', () => {
  test('a signal rejects next() with its reason, then it is done', async () => {
    const descriptors = countOpen()
    const reason = { why: 'enough' }
    for (const early of [true, false]) {
      const controller = new AbortController()
      if (early) controller.abort(reason)
      const watcher = watch({ signal: controller.signal })
      const next = watcher.next()
      const after = watcher.next()
      controller.abort(reason)
      await expect(next).rejects.toBe(reason)
      expect(await after).toEqual({ done: true, value: undefined })
      expect(await watcher.next()).toEqual({ done: true, value: undefined })
    }
    const controller = new AbortController()
    const watcher = watch({ signal: controller.signal })
    controller.abort(reason)
    await expect(watcher.next()).rejects.toBe(reason)
    expect(await watcher.next()).toEqual({ done: true, value: undefined })
    expect(countOpen()).toBe(descriptors)
  })

  test('break closes the socket and ends the thread at once', async ({ image }) => {
    await using warm = await attach(image('warm'))
    await warm.flush()
    const watcher = watch()
    const before = { descriptors: countOpen(), threads: countThreads() }
    await warm.setStatus({ sizeLimit: 4096 })
    for await (const event of watcher) if (event.type === 'resize' && event.number === warm.number) break
    expect(countThreads()).toBe(before.threads - 1)
    expect(countOpen()).toBe(before.descriptors - 2)
    expect(await watcher.next()).toEqual({ done: true, value: undefined })
    expect(await watcher.return?.()).toEqual({ done: true, value: undefined })
  })

  test('return() resolves a next() that waits', async () => {
    const watcher = watch()
    const next = watcher.next()
    expect(await watcher.return?.()).toEqual({ done: true, value: undefined })
    expect(await next).toEqual({ done: true, value: undefined })
  })

  test('20 of them leave nothing', async () => {
    const before = countOpen()
    const threads = countThreads()
    for (let i = 0; i < 20; i++) {
      const watcher = watch()
      void watcher.next()
      await watcher.return?.()
    }
    expect(countOpen()).toBe(before)
    expect(countThreads()).toBeLessThanOrEqual(threads)
  })

  test('a process that does not iterate ends by itself', async () => {
    const child = start('ignore')
    expect(await child.ended).toBe(0)
    expect(child.lines).toEqual(['watching'])
  })

  test('a process that waits lives, and ends when it has what it waited for', async ({ image }) => {
    const child = start('one')
    await watching(child)
    const device = await attach(image('disk'))
    // Something else may come first; that is an event too.
    expect(await child.ended).toBe(0)
    expect(child.lines).toHaveLength(2)
    expect(child.lines[1]).toHaveProperty('type')
    await device.detach()
  })

  test('process.exit() with a watcher open', async () => {
    for (let i = 0; i < 5; i++) expect(await start('exit').ended).toBe(7)
  })

  test('a worker terminated with watchers open, while uevents come', { timeout: limit(60_000) }, async ({ image }) => {
    await using device = await attach(image('disk'))
    const child = start('terminate')
    const over = new AbortController()
    void child.ended.then(() => over.abort())
    while (!over.signal.aborted) {
      writeFileSync(`/sys/block/loop${device.number}/uevent`, 'change')
      await new Promise(setImmediate)
    }
    expect(await child.ended).toBe(0)
    expect(child.lines).toEqual(['terminated'])
  })
})
