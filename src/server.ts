#!/usr/bin/env node
import { explainCommand } from './commands/explain.js'
import { presetsCommand } from './commands/presets.js'
import { serveCommand } from './commands/serve.js'
import { ConfigError, errorText } from './config.js'

/** By name; `muond` followed by flags, or by nothing, serves. A command answers what is to be printed, if anything. */
const COMMANDS = new Map<string, (argv: readonly string[]) => string | undefined | Promise<string | undefined>>([
  ['serve', (argv) => serveCommand(argv, process.env)],
  ['presets', (argv) => presetsCommand(argv, process.env)],
  ['explain', (argv) => explainCommand(argv, process.env, process.stdout.columns)],
])

try {
  const text = await run(process.argv.slice(2))
  if (text !== undefined) process.stdout.write(`${text}\n`)
} catch (error) {
  // One line for the person who started it: a wrong setting, a missing library, a port in use.
  process.stderr.write(`muond: ${errorText(error)}\n`)
  // Nothing has been computed yet, but lanes that wait for work would keep the process.
  process.exit(1)
}

async function run([name = '', ...argv]: readonly string[]): Promise<string | undefined> {
  if (name === '' || name.startsWith('-')) return serveCommand(process.argv.slice(2), process.env)
  const command = COMMANDS.get(name)
  if (command) return command(argv)
  throw new ConfigError(`there is no command '${name}', expected one of ${[...COMMANDS.keys()].join(', ')}`)
}
