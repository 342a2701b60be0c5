/**
 * What node:crypto and node:zlib are needed for. They take a fifth of the library's import, and few programs come here:
 * so they are loaded at the first use.
 */

export function crc32(bytes: Uint8Array, before?: number): number {
  return process.getBuiltinModule('node:zlib').crc32(bytes, before)
}

/** That many random bytes, in hexadecimal. */
export function randomHex(bytes: number): string {
  return process.getBuiltinModule('node:crypto').randomBytes(bytes).toString('hex')
}
