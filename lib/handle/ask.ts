/** LOOP_GET_STATUS64 of devices that no handle holds. */

import type { LoopErrorReason } from '../errors/errors.ts'
import { explain } from '../errors/explain.ts'
import { devicePath } from '../kernel/devnode.ts'
import { O_RDONLY } from '../kernel/files.ts'
import { inBatches } from '../kernel/batches.ts'
import { Sequence } from '../kernel/sequence.ts'
import { decodeInfo, type LoopInfo64, newInfo } from '../kernel/uapi.ts'

/** It went, or this /dev has no node of it, which must not keep anybody from using other devices. */
const NOT_TO_BE_ASKED = new Set<LoopErrorReason>(['no-such-device', 'detaching', 'node-missing', 'not-a-loop-device'])

/** What an attached device answers. */
export interface Answers {
  number: number
  info: LoopInfo64
  diskSeq: number | undefined
  blockSize: number
}

/**
 * Looks at devices without holding them: LOOP_GET_STATUS64. Those that are not attached, or cannot be asked, are left
 * out.
 *
 * @throws `permission`, `resources`
 */
export async function askDevices(numbers: readonly number[]): Promise<Answers[]> {
  return (await inBatches(numbers, askBatch)).flat()
}

async function askBatch(numbers: readonly number[]): Promise<Answers[]> {
  const sequence = new Sequence()
  const asked = numbers.map((number) => {
    sequence.part()
    const bytes = newInfo()
    const fd = sequence.call('openLoop', number, O_RDONLY)
    const status = sequence.try('loopGetStatus64', fd, bytes)
    const diskSeq = sequence.try('blkGetDiskSeq', fd)
    const blockSize = sequence.try('blkSszGet', fd)
    sequence.call('close', fd)
    return { number, bytes, fd, status, diskSeq, blockSize }
  })
  await sequence.run()
  return asked.flatMap(({ number, bytes, fd, status, diskSeq, blockSize }) => {
    if (fd.answer !== undefined && fd.answer < 0) {
      const failure = { call: 'open', errno: fd.answer, path: devicePath(number), number }
      const error = explain(failure, 'open device')
      if (!NOT_TO_BE_ASKED.has(error.reason)) throw error
    }
    if (status.answer !== 0) return []
    const known = diskSeq.succeeded ? diskSeq.answer : undefined
    return { number, info: decodeInfo(bytes), diskSeq: known, blockSize: blockSize.answer ?? 0 }
  })
}
