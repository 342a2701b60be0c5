/** The manual page, written from the definitions of the commands: npm run build:manual */

import { makeProgram, NOTES } from '../dist/cli/commands.js'

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

const program = makeProgram()
const help = program.createHelp()
const commands = help.visibleCommands(program).filter((command) => command.name() !== 'help')

const lines = [
  `.\\" Written by scripts/manual.js.`,
  '.TH LOOPCTL 1 "" "loopctl" "User Commands"',
  '.SH NAME',
  `loopctl \\- ${escape(help.commandDescription(program))}`,
  '.SH SYNOPSIS',
  `${bold('loopctl')} \\fIcommand\\fR [\\fIoptions\\fR] [\\fIarguments\\fR]`,
  '.SH COMMANDS',
  ...commands.flatMap((command) => [
    `.SS ${bold(command.name())} ${escape(command.usage())}`,
    escape(help.commandDescription(command)),
    ...help
      .visibleArguments(command)
      .flatMap((argument) => [
        ...item(`\\fI${escape(help.argumentTerm(argument))}\\fR`, help.argumentDescription(argument)),
      ]),
    ...help.visibleOptions(command).flatMap((option) => {
      return item(bold(help.optionTerm(option)), help.optionDescription(option))
    }),
  ]),
  ...NOTES.flatMap(([title, text]) => [`.SH ${title.toUpperCase()}`, escape(text)]),
  '.SH SEE ALSO',
  '.BR losetup (8),',
  '.BR loop (4)',
]
process.stdout.write(`${lines.join('\n')}\n`)
