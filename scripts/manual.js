/** The manual page, written from the definitions of the commands: npm run build:manual */

import { ENVIRONMENT, EXAMPLES, EXIT_STATUS, FILES, HELP, makeProgram, NOTES } from '../dist/cli/commands.js'

/** A `-` is one to type, not a hyphen; a line must not begin with what roff takes for a request. @param {string} text */
const escape = (text) =>
  text
    .replaceAll('\\', '\\e')
    .replaceAll('-', '\\-')
    .replaceAll('’', '\\(cq')
    .replaceAll(/^(?=[.'])/gm, '\\&')

/** @param {string} text */
const bold = (text) => `\\fB${escape(text)}\\fR`

/** @param {string} term @param {string} text */
const item = (term, text) => ['.TP', term, escape(text)]

/** What is between back quotes is to be typed. @param {string} text */
const prose = (text) => escape(text).replaceAll(/`([^`]+)`/g, String.raw`\fB$1\fR`)

/** @param {readonly (readonly [term: string, text: string])[]} items */
const list = (items) => items.flatMap(([term, text]) => ['.TP', bold(term), prose(text)])

/** @param {readonly (readonly [does: string, line: string])[]} examples */
const examplesOf = (examples) =>
  examples.flatMap(([does, line]) => [
    ...(does === '' ? [] : ['.PP', `${prose(does)}:`]),
    '.RS 4',
    '.EX',
    escape(line),
    '.EE',
    '.RE',
  ])

const program = makeProgram()
const help = program.createHelp()
const commands = help.visibleCommands(program).filter((command) => command.name() !== 'help')
const { Description, ...notes } = NOTES

/** @param {(typeof commands)[number]} command */
function describe(command) {
  const words = HELP[command.name()]
  return [
    `.SS ${bold(command.name())} ${escape(command.usage())}`,
    `${capital(escape(help.commandDescription(command)))}.`,
    ...help
      .visibleArguments(command)
      .flatMap((argument) => [
        ...item(`\\fI${escape(help.argumentTerm(argument))}\\fR`, help.argumentDescription(argument)),
      ]),
    ...help.visibleOptions(command).flatMap((option) => {
      return item(bold(help.optionTerm(option)), help.optionDescription(option))
    }),
    ...(words?.more ?? []).flatMap(([title, items]) => ['.PP', `${title}:`, ...list(items)]),
    ...(words === undefined ? [] : ['.PP', `\\fBPrints:\\fR ${prose(words.prints)}`, ...examplesOf(words.examples)]),
  ]
}

/** @param {string} text */
function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1)
}

const lines = [
  `.\\" Written by scripts/manual.js.`,
  '.TH LOOPCTL 1 "" "loopctl" "User Commands"',
  '.SH NAME',
  `loopctl \\- ${escape(help.commandDescription(program))}`,
  '.SH SYNOPSIS',
  `${bold('loopctl')} \\fIcommand\\fR [\\fIoptions\\fR] [\\fIarguments\\fR]`,
  '.SH DESCRIPTION',
  prose(Description),
  ...list(Object.entries(notes)),
  '.SH COMMANDS',
  ...commands.flatMap(describe),
  '.SH EXIT STATUS',
  ...list(EXIT_STATUS),
  '.SH ENVIRONMENT',
  ...list(ENVIRONMENT),
  '.SH FILES',
  ...list(FILES),
  '.SH EXAMPLES',
  ...examplesOf(EXAMPLES),
  '.SH SEE ALSO',
  '.BR losetup (8),',
  '.BR mount (8),',
  '.BR loop (4)',
]
process.stdout.write(`${lines.join('\n')}\n`)
