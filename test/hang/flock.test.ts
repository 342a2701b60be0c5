import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { expect } from 'vitest'
import { needs } from '../needs.ts'
import { test } from '../kernel/support.ts'

const FLOCKED = fileURLToPath(new URL('fixtures/flocked.mjs', import.meta.url))

/** In a mount namespace with a node of its own, whose lock is nobody else's. */
const SCRIPT = `mknod "$1/loop-control" c 10 237 && mount --bind "$1/loop-control" /dev/loop-control && exec "$0" "$2" "$1" "$3"`

test('attaches do not fall over each other while somebody keeps the lock of loop-control', async ({
  folder,
  image,
}) => {
  needs('unshare', 'mount')
  const count = 200
  for (let i = 0; i < count; i++) image(`${i}`, 4096)
  const words = ['-m', '--propagation', 'private', 'sh', '-c', SCRIPT, process.execPath, folder, FLOCKED, `${count}`]
  const { stdout } = await promisify(execFile)('unshare', words)
  expect(JSON.parse(stdout)).toEqual(Array(count).fill('detached'))
})
