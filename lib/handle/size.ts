/** How many bytes a device shows, and in blocks of how many. */

import { binding } from '../kernel/binding.ts'
import { decodeU64, newU64 } from '../kernel/uapi.ts'
import type { Handle } from './handle.ts'

/** BLKGETSIZE64. */
export function readSize(handle: Handle): bigint {
  const bytes = newU64()
  const answer = binding().blkGetSize64Sync(handle.descriptor, bytes)
  if (answer < 0) throw handle.explain('BLKGETSIZE64', answer)
  return decodeU64(bytes)
}

/** BLKSSZGET. */
export function readBlockSize(handle: Handle): number {
  const answer = binding().blkSszGetSync(handle.descriptor)
  if (answer < 0) throw handle.explain('BLKSSZGET', answer)
  return answer
}
