/** Text that a terminal may be given: nothing in it moves the cursor, hides a word or turns the order of letters around. */

/** C0 and C1 controls, what changes the direction of writing, and what separates lines. */
const UNSAFE = /[\p{Cc}\p{Bidi_Control}\p{Zl}\p{Zp}]/gu

/** A file name can hold anything; a terminal must not obey it. */
export function printable(text: string): string {
  return text.replaceAll(UNSAFE, (character) => {
    const code = character.charCodeAt(0)
    return code <= 0xff ? `\\x${code.toString(16).padStart(2, '0')}` : unicodeEscape(code)
  })
}

/** JSON in one line, which means the same as that of JSON.stringify. */
export function toJson(value: unknown, replacer?: (key: string, member: unknown) => unknown): string {
  return JSON.stringify(value, replacer).replaceAll(UNSAFE, (character) => unicodeEscape(character.charCodeAt(0)))
}

function unicodeEscape(code: number): string {
  return `\\u${code.toString(16).padStart(4, '0')}`
}

/** A word as a shell takes it. */
export function shellWord(word: string): string {
  return /^[\w./:=@%+,-]+$/.test(word) ? word : `'${word.replaceAll("'", String.raw`'\''`)}'`
}

/** Characters that a terminal draws two columns wide. */
const WIDE =
  /[\p{Emoji_Presentation}\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{20000}-\u{3fffd}]/gu
/** Those that are drawn with the one before. */
const NARROW = /[\p{Mn}\p{Me}\p{Cf}]/gu

/** Columns of a terminal that the text takes. */
function columnsOf(text: string): number {
  return text.replaceAll(NARROW, '').replaceAll(WIDE, '..').replaceAll(/[^]/gu, '.').length
}

export interface Heading {
  title: string
  /** Numbers are read from the right. */
  right?: boolean
}

/** Columns as wide as their widest cell. */
export function table(headings: readonly Heading[], rows: readonly string[][], hasHeadings = true): string {
  const lines = hasHeadings ? [headings.map(({ title }) => title), ...rows] : rows
  const widths = headings.map((_, i) => Math.max(...lines.map((cells) => columnsOf(cells[i] ?? ''))))
  return lines
    .map((cells) => {
      const padded = cells.map((cell, i) => {
        const space = ' '.repeat((widths[i] ?? 0) - columnsOf(cell))
        return headings[i]?.right ? space + cell : cell + space
      })
      return `${padded.join('  ').trimEnd()}\n`
    })
    .join('')
}

const UNITS = ['K', 'M', 'G', 'T', 'P']

/** `1M`, `1.5G`: to one decimal, in powers of 1024. */
export function humanSize(bytes: number): string {
  let [value, unit] = [bytes, 'B']
  for (const next of UNITS) {
    // What would be shown as 1024
    if (value < 1023.95) break
    ;[value, unit] = [value / 1024, next]
  }
  return bytes === 0 ? '0' : `${Number(value.toFixed(1))}${unit}`
}

/** The same where it loses nothing, else the bytes: an offset that is wrong by a few bytes is of no use. */
export function humanOffset(bytes: number): string {
  const text = humanSize(bytes)
  const [, value, unit = ''] = /^([\d.]+)([KMGTP])$/.exec(text) ?? []
  const isExact = value === undefined || Number(value) * 1024 ** (UNITS.indexOf(unit) + 1) === bytes
  return isExact ? text : `${bytes}B`
}
