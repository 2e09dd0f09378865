#!/usr/bin/env node
import { once } from 'node:events'
import { ConfigError } from './config.js'
import { errorText } from './errors.js'

type Command = (argv: readonly string[]) => Promise<string | undefined>

/**
 * The commands by name; each returns the text to print, if any. `muond` with flags only, or with nothing, is `serve`. A
 * command is loaded when it is asked for: a list of presets needs no device.
 */
const COMMANDS = new Map<string, Command>([
  ['serve', async (argv) => (await import('./commands/serve.js')).serveCommand(argv, process.env)],
  ['presets', async (argv) => (await import('./commands/presets.js')).presetsCommand(argv, process.env)],
  [
    'keys',
    async (argv) =>
      (await import('./commands/operate/keys.js')).keysCommand(argv, process.env, { terminal: process.stderr }),
  ],
  [
    'export',
    async (argv) =>
      (await import('./commands/export.js')).exportCommand(argv, process.env, { terminal: process.stderr }),
  ],
  [
    'import',
    async (argv) =>
      (await import('./commands/import.js')).importCommand(argv, process.env, { terminal: process.stderr }),
  ],
  ['conformance', async (argv) => conformance(argv)],
  [
    'check',
    async (argv) =>
      (await import('./commands/operate/check/check.js')).checkCommand(argv, process.env, {
        width: process.stdout.columns,
        failed,
      }),
  ],
  [
    'status',
    async (argv) =>
      (await import('./commands/operate/watch/status.js')).statusCommand(argv, process.env, {
        width: process.stdout.columns,
        failed,
      }),
  ],
  [
    'top',
    async (argv) =>
      (await import('./commands/operate/watch/top.js')).topCommand(argv, process.env, {
        ...{ output: process.stdout, keyboard: process.stdin, signals: process },
      }),
  ],
  [
    'replay',
    async (argv) =>
      (await import('./commands/replay.js')).replayCommand(argv, process.env, {
        terminal: process.stderr,
        width: process.stdout.columns,
        failed,
      }),
  ],
  [
    'explain',
    async (argv) => (await import('./commands/explain.js')).explainCommand(argv, process.env, process.stdout.columns),
  ],
])

try {
  const text = await run(process.argv.slice(2))
  if (text !== undefined) print(text)
} catch (error) {
  fail(error)
}

/** Ends with status 1 where the client did something wrong, or not all that it must. */
async function conformance(argv: readonly string[]): Promise<string> {
  const { conformanceCommand } = await import('./commands/conformance/conformance.js')
  const stop = Promise.race([once(process, 'SIGINT'), once(process, 'SIGTERM')])
  const { text, isWhole } = await conformanceCommand(argv, process.env, { terminal: process.stderr, stop })
  if (!isWhole) process.exitCode = 1
  return text
}

/** Prints an error, such as a missing library or a port in use, a line for each problem, and ends the process. */
function fail(error: unknown): void {
  const lines = error instanceof ConfigError ? error.message.split('\n') : [errorText(error)]
  for (const line of lines) process.stderr.write(`muond: ${line}\n`)
  // No step was computed yet, but lanes that wait for work would keep the process alive.
  process.exit(1)
}

/** Has the process end with 1, after what a command has to print. */
function failed(): void {
  process.exitCode = 1
}

/** Prints a text. Its reader may stop early, as `head` does, and that is no error. */
function print(text: string): void {
  process.stdout.once('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') fail(error)
  })
  process.stdout.write(`${text}\n`)
}

async function run(argv: readonly string[]): Promise<string | undefined> {
  const isNamed = argv.length > 0 && !argv[0].startsWith('-')
  const [name, ...rest] = isNamed ? argv : ['serve', ...argv]
  const command = COMMANDS.get(name)
  if (command) return command(rest)
  throw new ConfigError(`there is no command '${name}', expected one of ${[...COMMANDS.keys()].join(', ')}`)
}
