/**
 * The library's sentences, messages and hints alike, are written in the words of its API. Here, and only here, they are put
 * into those of the command: `overlap: 'allow'` is `--overlap allow`.
 */

/** Whole phrases, for which the command has words of its own. */
const PHRASES: readonly (readonly [RegExp, string])[] = [
  [/\bwith unconfirmed: true it is in the answer, and says why\b/g, '`loopctl list FILE` shows it, and says why'],
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
  [/\bwith a block size of (\S+), or 'auto'/g, 'with --block-size $1, or --block-size auto'],
  [/\bwith the option partition\b/g, 'with --partition'],
  [/\bwith offset, sizeLimit or partscan\b/g, 'with --offset, --size-limit or --partscan'],
  [/\bwith swappable\b/g, 'with --swappable'],
  [/\bgiven with a partition\b/g, 'given with --partition'],
  [/\bby another handle, and is shared \(overlap: 'reuse'\)/g, 'by another process, which shares it'],
  [/\bwhen this handle was opened\b/g, 'when loopctl opened it'],
  [/\bthe handle is closed\b/g, 'the device is closed'],
  // The command opens nothing of a device that keeps it busy: the shell has, and passes it on.
  [/\bclose (\S.*?) of process \S+, which is this one\b/g, 'close $1 in the shell that runs loopctl'],
  [/\bwhich is this one\b/g, 'which is loopctl itself'],
]

/** Options that the command calls otherwise than the API. */
const NAMES: Record<string, string> = { makeTarget: 'make-dir', fsType: 'type', directIO: 'direct-io' }

/** Options whose value is taken only after `=`. */
const GLUED = new Set(['directIO', 'partscan'])

/** Options of the API that a sentence may name. Anything else of that form is text: a path can have a colon. */
const OPTIONS = [
  'allocate|autoclear|blockSize|createNode|directIO|force|fsType|lazy|lock|makeTarget|number|offset|options|overlap',
  'overwrite|partition|partscan|readOnly|reference|sizeLimit|sparse|swappable|timeout|unmount|verify',
].join('|')

const OPTION = new RegExp(String.raw`\b(${OPTIONS}): (true|false|\d+|'([^']*)')`, 'g')

/** Arguments of the API that the command has without a name, or in another form. */
const ARGUMENTS: Record<string, string> = {
  'target': 'the path of the folder',
  'path': 'the path of the file',
  'file': 'the path of the file',
  'partition.label': 'LABEL=',
  'partition.uuid': 'UUID=',
  'partition.type': 'TYPE=',
}

/** What an argument's sentence begins with. */
const FIRST = new RegExp(`^(?:${[...Object.keys(ARGUMENTS), OPTIONS].join('|')})(?= )`)

/** Options that are no word of English. */
const CAMELS = /\b(?:blockSize|createNode|directIO|fsType|makeTarget|readOnly|sizeLimit)\b/g

/** Ways out, between commas, that only a command has that attaches. */
const OF_ATTACHING = /--overlap reuse|\bboth read-only/
const ATTACHING = new Set(['attach', 'run', 'mount'])

/** The sentence in the words of the command. @param names paths and the like that are in it, and stay as they are */
export function translate(text: string, names: readonly (string | undefined)[] = []): string {
  return apart(text, names, translatePiece)
}

/** The hint in the words of the command. @param command its first word: a hint names no way that this one has not */
export function translateHint(hint: string, command?: string, names?: readonly (string | undefined)[]): string {
  const text = translate(hint, names)
  if (command === undefined || ATTACHING.has(command)) return text
  return text
    .split(', ')
    .filter((way) => !OF_ATTACHING.test(way))
    .join(', ')
}

/** What is wrong with a value, which the library names first: `blockSize must be ...`. */
export function translateArgument(message: string): string {
  return apart(message, [], (piece) =>
    translatePiece(piece)
      .replace(FIRST, (name) => ARGUMENTS[name] ?? optionOf(name))
      .replaceAll(/'([a-z]+)'/g, '$1'),
  )
}

/** For JSON.stringify: the sentences of warnings and of doctor. */
export function translateMember(key: string, member: unknown, command?: string): unknown {
  if (typeof member !== 'string') return member
  if (key === 'message') return translate(member)
  return key === 'hint' || key === 'remedy' ? translateHint(member, command) : member
}

function translatePiece(piece: string): string {
  let text = piece
  for (const [phrase, words] of PHRASES) text = text.replaceAll(phrase, words)
  return text
    .replaceAll(OPTION, (_, name: string, value: string, word: string | undefined) => {
      if (value === 'true') return optionOf(name)
      if (value === 'false') return `--no-${optionOf(name).slice('--'.length)}`
      return `${optionOf(name)}${GLUED.has(name) ? '=' : ' '}${word ?? value}`
    })
    .replaceAll(CAMELS, optionOf)
}

/** Translates all but the names, and what is in double quotes. */
function apart(text: string, names: readonly (string | undefined)[], translateOne: (piece: string) => string): string {
  // Nearly every name is one that nothing would be done to, and need not be cut out.
  const quoted = names.filter((name) => name !== undefined).filter((name) => translatePiece(name) !== name)
  const kept = [...quoted.map((name) => name.replaceAll(/\W/g, String.raw`\$&`)), String.raw`"(?:[^"\\]|\\.)*"`]
  const pieces = text.split(new RegExp(`(${kept.join('|')})`))
  return pieces.map((piece, i) => (i % 2 === 0 ? translateOne(piece) : piece)).join('')
}

function optionOf(name: string): string {
  return `--${NAMES[name] ?? name.replaceAll(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`
}
