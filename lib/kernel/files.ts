/**
 * node:fs in the manner of the addon: a value, or the negative errno. Descriptors are plain numbers, because exit
 * handlers must be able to close them; libuv opens with O_CLOEXEC.
 */

import type { BigIntStats } from 'node:fs'
import { onPool } from './pool.ts'
import { observed } from './seam.ts'

// An import would read all that node:fs exports, and so load its streams: a millisecond of every start.
const fs = process.getBuiltinModule('node:fs')

type PathLike = string | Buffer

export const O_CREAT: number = fs.constants.O_CREAT
export const O_RDONLY: number = fs.constants.O_RDONLY
export const O_RDWR: number = fs.constants.O_RDWR
export const O_WRONLY: number = fs.constants.O_WRONLY
export const O_EXCL: number = fs.constants.O_EXCL
export const O_NONBLOCK: number = fs.constants.O_NONBLOCK
export const O_APPEND: number = fs.constants.O_APPEND
export const O_ACCMODE = 3
/** Not in node:fs. The same on all of Linux's architectures. */
export const O_PATH = 0o10000000

function errnoOf(error: NodeJS.ErrnoException): number {
  return error.errno ?? -5
}

function answer<T>(
  name: string,
  start: (done: (error: NodeJS.ErrnoException | null, value: T) => void) => void,
): Promise<T | number> {
  return onPool(
    observed(
      name,
      () =>
        new Promise((resolve) => {
          start((error, value) => resolve(error ? errnoOf(error) : value))
        }),
    ),
  )
}

function answerSync<T>(name: string, call: () => T): T | number {
  try {
    return observed(name, call)()
  } catch (error) {
    return errnoOf(error as NodeJS.ErrnoException)
  }
}

export function open(path: PathLike, flags: number, mode = 0o600): Promise<number> {
  return answer('open', (done) => fs.open(path, flags, mode, done))
}

export function openSync(path: PathLike, flags: number): number {
  return answerSync('openSync', () => fs.openSync(path, flags))
}

/** The descriptor is gone whatever the answer is. Closing a loop device can be what detaches it: it may take long. */
export function close(fd: number): Promise<number> {
  return answer<number>('close', (done) => fs.close(fd, (error) => done(error ?? null, 0)))
}

export function closeSync(fd: number): number {
  return answerSync('closeSync', () => (fs.closeSync(fd), 0))
}

export function fsync(fd: number): Promise<number> {
  return answer<number>('fsync', (done) => fs.fsync(fd, (error) => done(error, 0)))
}

export function fsyncSync(fd: number): number {
  return answerSync('fsyncSync', () => (fs.fsyncSync(fd), 0))
}

export function stat(path: PathLike): Promise<BigIntStats | number> {
  return answer('stat', (done) => fs.stat(path, { bigint: true }, done))
}

export function fstat(fd: number): Promise<BigIntStats | number> {
  return answer('fstat', (done) => fs.fstat(fd, { bigint: true }, done))
}

export function statSync(path: PathLike): BigIntStats | number {
  return answerSync('statSync', () => fs.statSync(path, { bigint: true }))
}

export function fstatSync(fd: number): BigIntStats | number {
  return answerSync('fstatSync', () => fs.fstatSync(fd, { bigint: true }))
}

/** The clock of inodes, in milliseconds, is behind by up to a tick of the kernel. */
const TICK = 20

/** Whether the path was made at that moment (Date.now()) or later. */
export function isNodeNewerThan(path: string, moment: number): boolean {
  const node = statSync(path)
  return typeof node !== 'number' && Number(node.birthtimeMs) >= moment - TICK
}

export function lstatSync(path: PathLike): BigIntStats | number {
  return answerSync('lstatSync', () => fs.lstatSync(path, { bigint: true }))
}

export function unlinkSync(path: string): number {
  return answerSync('unlinkSync', () => (fs.unlinkSync(path), 0))
}

export function existsSync(path: string): boolean {
  return observed('existsSync', fs.existsSync)(path)
}

/** Whether the caller may read, write or (0) see the path. */
export function access(path: PathLike, mode: number): Promise<number> {
  return answer<number>('access', (done) => fs.access(path, mode, (error) => done(error, 0)))
}

export function readAt(fd: number, buffer: Uint8Array, length: number, position: number | bigint): Promise<number> {
  return answer<number>('readAt', (done) =>
    fs.read(fd, buffer, 0, length, position, (error, count) => done(error, count)),
  )
}

export function writeAt(fd: number, buffer: Uint8Array, length: number, position: number): Promise<number> {
  return answer<number>('writeAt', (done) =>
    fs.write(fd, buffer, 0, length, position, (error, count) => done(error, count)),
  )
}

export function unlink(path: string): Promise<number> {
  return answer<number>('unlink', (done) => fs.unlink(path, (error) => done(error, 0)))
}

/** A small file of sysfs or procfs, whole. */
export function readFile(path: string): Promise<Buffer | number> {
  return answer('readFile', (done) => fs.readFile(path, done))
}

export function readFileSync(path: string): Buffer | number {
  return answerSync('readFileSync', () => fs.readFileSync(path))
}

export function readDirectory(path: string): Promise<string[] | number> {
  return answer('readDirectory', (done) => fs.readdir(path, done))
}

export function readDirectorySync(path: string): string[] | number {
  return answerSync('readDirectorySync', () => fs.readdirSync(path))
}

export function readLinkSync(path: string): string | number {
  return answerSync('readLinkSync', () => fs.readlinkSync(path))
}
