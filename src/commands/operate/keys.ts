import { existsSync, readFileSync } from 'node:fs'
import { chmod, stat } from 'node:fs/promises'
import { type Document, parseDocument } from 'yaml'
import { hashOf, type KeyRecord, keysIn, newKey, readKeyFile } from '../../access/key-file.js'
import { SCOPES } from '../../access/principal.js'
import { ConfigError, type Environment, readArguments } from '../../config.js'
import { errorText } from '../../errors.js'
import { FILE_MODE, replaceFile } from '../../store/durable.js'
import { tableLines } from '../../text-table.js'
import type { Terminal } from '../progress.js'

const HELP = `muond keys add NAME --file FILE [--scopes LIST] [--runs PREFIX] [--quotas LIST]
muond keys remove NAME --file FILE
muond keys list --file FILE

Makes, removes and lists the keys of a service that is started with
--keys-file FILE. \`add\` prints the key, once: the file has its SHA-256.
A running service reads the file again on SIGHUP, and closes the connections
of keys that are gone.

  step        opens the stream: creates runs, sends gradients
  read        runs, parameters, state, receipts, events, checkpoints; metrics,
              where the key is for all runs
  checkpoint  takes, deletes and goes back to checkpoints, begins runs at one,
              imports state
  admin       deletes runs

  --file FILE    YAML; \`add\` makes it. Also the variable MUOND_KEYS_FILE
  --scopes LIST  Comma-separated; default step,read,checkpoint: a trainer's
  --runs PREFIX  The beginning of the names of its runs, with a '.', '_' or
                 '-' at its end; without it all runs are the key's
  --quotas LIST  Comma-separated, such as runs=4,state_bytes=8000000000; also
                 parameters, connections and bytes_per_second
  --help         Prints this`

/** What a trainer takes. */
const TRAINER = 'step,read,checkpoint'

type Edit = (keys: Document, records: readonly KeyRecord[]) => void

/**
 * `muond keys`: returns the text to print, of `add` the key alone; what there is to say of it goes to the terminal.
 * Throws ConfigError.
 */
export async function keysCommand(
  argv: readonly string[],
  env: Environment,
  { terminal }: { terminal: Terminal },
): Promise<string | undefined> {
  const types = { file: 'string', scopes: 'string', runs: 'string', quotas: 'string', help: 'boolean' } as const
  const { values, positionals } = readArguments(argv, types)
  if (values.help) return HELP
  const [verb, name, ...more] = positionals
  const file = String(values.file ?? env.MUOND_KEYS_FILE ?? '')
  const takesName = verb === 'add' || verb === 'remove'
  if (!(takesName || verb === 'list') || (name !== undefined) !== takesName || more.length > 0)
    throw new ConfigError('keys takes add NAME, remove NAME or list (--help says more)')
  if (file === '') throw new ConfigError('--file is missing: the file that has the keys, or MUOND_KEYS_FILE')
  if (verb === 'list') return tableOf(readKeyFile(file))
  if (verb === 'remove') return remove(file, String(name))
  const { scopes = TRAINER, runs, quotas } = values
  const given = {
    ...{ name: String(name), scopes: String(scopes).split(',') },
    ...(runs !== undefined && { runs }),
    ...(quotas !== undefined && { quotas: quotasIn(String(quotas)) }),
  }
  return add(file, given, terminal)
}

async function add(
  file: string,
  { name, scopes, ...rest }: { name: string; scopes: string[]; runs?: unknown; quotas?: object },
  terminal: Terminal,
): Promise<string> {
  const key = newKey()
  await edit(file, (document, records) => {
    const entry = document.createNode({ name, sha256: hashOf(key), scopes, ...rest })
    entry.setIn(['scopes'], document.createNode(scopes, { flow: true }))
    if (records.length === 0) document.setIn(['keys'], [entry])
    else document.addIn(['keys'], entry)
  })
  const whose = rest.runs === undefined ? 'all runs' : `runs named ${rest.runs}…`
  terminal.write(`${name}: ${scopes.join(', ')}; ${whose}. The key is shown this once: ${file} has its SHA-256.\n`)
  return key
}

/** `runs=4,connections=2` as a map; what the values and names may be the file's rule says. */
function quotasIn(list: string): Record<string, unknown> {
  const entries = list.split(',').map((entry) => {
    const [name, value = ''] = entry.split('=')
    return [name, /^\d+$/.test(value) ? Number(value) : value]
  })
  return Object.fromEntries(entries)
}

async function remove(file: string, name: string): Promise<undefined> {
  await edit(file, (document, records) => {
    const index = records.findIndex((record) => record.name === name)
    if (index < 0)
      throw new ConfigError(
        `key file '${file}' has no key '${name}', but ${records.map(({ name }) => name).join(', ')}`,
      )
    document.deleteIn(['keys', index])
  })
}

/** Changes a file of keys, whose comments stay. Nothing is written where the result would be refused. */
async function edit(file: string, change: Edit): Promise<void> {
  const exists = existsSync(file)
  const text = exists ? textOf(file) : ''
  const document = parseDocument(text)
  change(document, keysIn(text, file))
  const result = String(document)
  keysIn(result, file)
  try {
    const mode = exists ? (await stat(file)).mode : FILE_MODE
    await replaceFile(file, result)
    await chmod(file, mode)
  } catch (error) {
    throw new ConfigError(`key file '${file}' cannot be written: ${errorText(error)}`)
  }
}

function textOf(file: string): string {
  try {
    return readFileSync(file, 'utf8')
  } catch (error) {
    throw new ConfigError(`key file '${file}' cannot be read: ${errorText(error)}`)
  }
}

function tableOf(records: readonly KeyRecord[]): string {
  const rows = records.map(({ name, scopes, runs, quotas = {} }) => [
    name,
    SCOPES.filter((scope) => scopes.includes(scope)).join(', '),
    runs === undefined ? 'all' : `${runs}…`,
    Object.entries(quotas)
      .map(([kind, most]) => `${kind} ${most}`)
      .join(', '),
  ])
  const head = ['key', 'scopes', 'runs', 'quotas']
  return tableLines({ head, align: ['left', 'left', 'left', 'left'], rows }).join('\n')
}
