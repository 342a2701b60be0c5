/** The checksum of the superblocks of ext4, xfs and btrfs. Only read after a failure, so that it need not be fast. */

/** CRC-32C of the bytes after those that gave `before`; the first and the last inversion are the caller's. */
export function crc32c(bytes: Uint8Array, before: number): number {
  let crc = before
  for (const byte of bytes) {
    crc ^= byte
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ ((crc & 1) === 0 ? 0 : 0x82f6_3b78)
  }
  return crc >>> 0
}
