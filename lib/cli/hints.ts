/**
 * Hints are written for the library, in the words of its API. Here, and only here, they are put into those of the command:
 * `overlap: 'allow'` is `--overlap allow`.
 */

/** Whole phrases, for which the command has words of its own. */
const PHRASES: readonly (readonly [RegExp, string])[] = [
  [/with unconfirmed: true it is in the answer/g, '`loopctl list FILE` shows it'],
  [/\bpartscan: true or 'user'/g, '--partscan or --partscan=user'],
  [/\bsetStatus\(\{ partscan: true \}\)/g, '`loopctl set --partscan DEVICE`'],
  [/\bcall refreshCapacity\(\)/g, 'run `loopctl resize DEVICE`'],
  [/\brefreshCapacity\(\)/g, '`loopctl resize DEVICE`'],
  [/\bpartitions\(\)/g, '`loopctl partitions DEVICE`'],
  [/\battach\(\)/g, '`loopctl attach`'],
  [/\bsee who holds it with holders\(\)/g, 'see who holds it'],
  [/\bwith fsType\b/g, 'with --type'],
  [/\braise the timeout\b/g, 'raise --timeout'],
  [/\ba longer timeout\b/g, 'a longer --timeout'],
]

/** Options that the command calls otherwise than the API. */
const NAMES: Record<string, string> = { makeTarget: 'make-dir', fsType: 'type', directIO: 'direct-io' }

/** Options whose value is taken only after `=`. */
const GLUED = new Set(['directIO', 'partscan'])

/** Options of the API that a hint may name. Anything else of that form is text: a path can have a colon. */
const OPTIONS = [
  'autoclear|blockSize|createNode|directIO|force|fsType|lazy|lock|makeTarget|number|offset|options|overlap|overwrite|partition',
  'partscan|readOnly|reference|sizeLimit|sparse|swappable|unmount|verify',
].join('|')

const OPTION = new RegExp(String.raw`\b(${OPTIONS}): (true|false|\d+|'([^']*)')`, 'g')

/** Ways out, between commas, that only a command has that attaches. */
const OF_ATTACHING = /--overlap reuse|\bboth read-only/
const ATTACHING = new Set(['attach', 'run', 'mount'])

/** The hint in the words of the command. @param command its first word: a hint names no way that this one has not */
export function translateHint(hint: string, command?: string): string {
  let text = hint
  for (const [phrase, words] of PHRASES) text = text.replaceAll(phrase, words)
  text = translateOptions(text)
  if (command === undefined || ATTACHING.has(command)) return text
  return text
    .split(', ')
    .filter((way) => !OF_ATTACHING.test(way))
    .join(', ')
}

function translateOptions(text: string): string {
  return text.replaceAll(OPTION, (_, name: string, value: string, word: string | undefined) => {
    if (value === 'true') return optionOf(name)
    if (value === 'false') return `--no-${optionOf(name).slice('--'.length)}`
    return `${optionOf(name)}${GLUED.has(name) ? '=' : ' '}${word ?? value}`
  })
}

/** Options that are no word of English. */
const CAMELS = /\b(?:blockSize|createNode|directIO|fsType|makeTarget|readOnly|sizeLimit)\b/g

/** What is wrong with a value, which the library names first: `blockSize must be ...`. */
export function translateArgument(message: string): string {
  return translateOptions(message)
    .replace(new RegExp(`^(?:${OPTIONS})(?= )`), optionOf)
    .replaceAll(CAMELS, optionOf)
}

function optionOf(name: string): string {
  return `--${NAMES[name] ?? name.replaceAll(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`
}

/** For JSON.stringify: the hints of errors and warnings, and the remedies of doctor. */
export function translateMember(key: string, member: unknown, command?: string): unknown {
  return (key === 'hint' || key === 'remedy') && typeof member === 'string' ? translateHint(member, command) : member
}
