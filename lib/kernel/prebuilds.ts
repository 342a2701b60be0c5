/** The binaries that the package holds. */

import { ROOT } from './binding.ts'
import { readDirectorySync } from './files.ts'

/** What the package has a binary for: `linux-arm64 (glibc, musl)`; none in a checkout, which builds its own. */
export function listPrebuilds(): string[] {
  const folders = readDirectorySync(`${ROOT}/prebuilds`)
  if (typeof folders === 'number') return []
  return folders
    .filter((folder) => folder.startsWith('linux-'))
    .map((folder) => {
      const files = readDirectorySync(`${ROOT}/prebuilds/${folder}`)
      const tags = typeof files === 'number' ? [] : files.map((file) => file.split('.')[1])
      return `${folder} (${tags.join(', ')})`
    })
}
