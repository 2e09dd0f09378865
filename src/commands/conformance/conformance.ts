import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { ConfigError, type Environment, readArguments } from '../../config.js'
import { tableLines } from '../../text-table.js'
import type { Terminal } from '../progress.js'
import { Backing } from './backing.js'
import { CHECK_NAMES, CHECKS, type Check, Findings, isCheck, type Row } from './checks.js'
import { STEPS_NEEDED } from './scenes.js'
import { Stage } from './stage.js'

const URL_DEFAULT = 'ws://127.0.0.1:8788'
const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\])$/

const HELP = `muond conformance [URL] [flags] [-- COMMAND …]

A service to test a client against. It listens at URL, default
${URL_DEFAULT} (port 0 picks a free one), computes every step as muond
does, and in each step does to the client what may happen to one: small
chunks, unknown keys, lost connections, refusals. What the client sends is held
against docs/protocol.md. Then it prints a table of what was checked.

With a COMMAND it runs that, with the address in the variable MUOND_URL and in
place of {url}, until it ends; without one it waits for Ctrl-C. The client
trains one run for ${STEPS_NEEDED} steps or more, or until it has to stop; a
COMMAND that has to stop is started once more for the checks that are left.
Let it have a parameter of more than 250 bytes: that is limits.chunk_bytes.
The address has no path: the stream is at /v1/stream behind it.
The exit status is 0 where every check was seen and has passed, but for
hyperparameters, skipped and checkpoint, which a client need not use.

  --quadratic       The client trains on the loss |W|²/2, so that each gradient
                    is the weights: what it makes of the updates is checked too
  --skip A,B        Leaves checks out, for a client that does not retry for
                    example: reconnect,receipt,overloaded,refused,draining,
                    not-finite,lost-run
  --slow SECONDS    How long the slow service says nothing; default 5
  --patience SECONDS  How long a COMMAND may be silent before it is ended;
                    default 60
  --json            Prints the table as JSON
  --help            Prints this

Checks: ${CHECK_NAMES.join(' ')}`

const SLOW_SECONDS = 5
const PATIENCE_SECONDS = 60

type Asked = {
  host: string
  port: number
  command: readonly string[]
  skip: ReadonlySet<Check>
  quadratic: boolean
  slow_seconds: number
  patience_seconds: number
  json: boolean
}

/** What was found, to be printed, and whether all of it is as it should be. */
export type Verdict = { text: string; isWhole: boolean }

/**
 * `muond conformance`: serves until `stop` settles or the command has ended, and returns the table. Faults are told on
 * the terminal as they are found. Throws ConfigError for its arguments, and the system's error for an address in use.
 */
export async function conformanceCommand(
  argv: readonly string[],
  env: Environment,
  { terminal, stop }: { terminal: Terminal; stop: Promise<unknown> },
): Promise<Verdict> {
  const asked = readAsked(argv)
  if (asked === undefined) return { text: HELP, isWhole: true }
  const backing = await Backing.start()
  try {
    return await examine(backing, asked, { terminal, stop, env })
  } finally {
    await backing.close()
  }
}

type Surroundings = { terminal: Terminal; stop: Promise<unknown>; env: Environment }

async function examine(backing: Backing, asked: Asked, { terminal, stop, env }: Surroundings): Promise<Verdict> {
  const findings = new Findings((check, fault) => terminal.write(`${check}: ${fault}\n`))
  const stage = await Stage.start(backing, { ...asked, findings })
  try {
    terminal.write(`listening at ${stage.address}\n`)
    if (asked.command.length > 0) await perform(stage, asked, env)
    else {
      await stop
      await stage.rest()
    }
    const [rows, { isWhole }] = [stage.rows(), stage]
    return { text: asked.json ? JSON.stringify({ whole: isWhole, checks: rows }, null, 2) : textOf(rows), isWhole }
  } finally {
    await stage.close()
  }
}

function readAsked(argv: readonly string[]): Asked | undefined {
  const at = argv.indexOf('--')
  const { values, positionals } = readArguments(at < 0 ? argv : argv.slice(0, at), {
    ...{ quadratic: 'boolean', skip: 'string', slow: 'string', patience: 'string', json: 'boolean', help: 'boolean' },
  })
  if (values.help) return undefined
  const [url = URL_DEFAULT, ...more] = positionals
  if (more.length > 0) throw new ConfigError(`conformance takes one URL, got ${positionals.join(' ')}`)
  return {
    ...addressOf(url),
    command: at < 0 ? [] : argv.slice(at + 1),
    skip: skipped(String(values.skip ?? '')),
    quadratic: values.quadratic === true,
    slow_seconds: secondsOf('slow', values.slow, SLOW_SECONDS),
    patience_seconds: secondsOf('patience', values.patience, PATIENCE_SECONDS),
    json: values.json === true,
  }
}

/** Where to listen. There are no keys, so only this host may come. */
function addressOf(text: string): { host: string; port: number } {
  const url = URL.canParse(text) ? new URL(text) : undefined
  if (url?.protocol !== 'ws:' || !LOOPBACK.test(url.hostname))
    throw new ConfigError(`the URL is '${text}', expected a loopback address to listen at, such as ${URL_DEFAULT}`)
  /* c8 ignore next -- to listen at ws://127.0.0.1 a test would have to be root */
  return { host: url.hostname, port: Number(url.port || 80) }
}

function skipped(list: string): ReadonlySet<Check> {
  const names = list.split(',').filter((name) => name !== '')
  const unknown = names.filter((name) => !isCheck(name))
  if (unknown.length > 0)
    throw new ConfigError(`--skip names ${unknown.join(', ')}, expected some of ${CHECK_NAMES.join(', ')}`)
  return new Set(names.filter(isCheck))
}

function secondsOf(flag: string, value: unknown, otherwise: number): number {
  if (value === undefined) return otherwise
  const seconds = Number(value)
  if (value === '' || !(seconds >= 0)) throw new ConfigError(`--${flag} is '${value}', expected seconds, 0 or more`)
  return seconds
}

/** Runs the command, and again where it had to stop before it has met every scene. */
async function perform(stage: Stage, asked: Asked, env: Environment): Promise<void> {
  for (;;) {
    const before = stage.left
    await run(stage, asked, env)
    const mayEnd = await stage.rest()
    if (!mayEnd || stage.left === 0 || stage.left === before) return
  }
}

const WATCH_MS = 200

/** Runs the command until it ends, or was silent for too long. */
async function run(stage: Stage, { command, patience_seconds }: Asked, env: Environment): Promise<void> {
  const [program, ...args] = command.map((word) => word.replaceAll('{url}', stage.address))
  const child = spawn(program, args, { stdio: ['ignore', 2, 2], env: { ...env, MUOND_URL: stage.address } })
  const ended = once(child, 'exit')
  stage.heard()
  const watch = setInterval(() => {
    if (stage.quiet_seconds > patience_seconds) child.kill('SIGKILL')
  }, WATCH_MS)
  try {
    await ended
  } finally {
    clearInterval(watch)
  }
}

function textOf(rows: readonly Row[]): string {
  const table = tableLines({
    head: ['check', 'result', 'seen', 'what'],
    align: ['left', 'left', 'right', 'left'],
    rows: rows.map(({ check, result, seen }) => [check, result, String(seen), CHECKS[check]]),
  })
  const faults = rows.flatMap(({ check, faults }) => faults.map((fault) => `${check}: ${fault}`))
  const count = (result: Row['result']) => rows.filter((row) => row.result === result).length
  const sum = `${count('passed')} passed, ${count('failed')} failed, ${count('not seen')} not seen`
  return [...table, ...(faults.length > 0 ? ['', ...faults] : []), '', sum].join('\n')
}
