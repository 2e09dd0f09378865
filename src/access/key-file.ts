import { createHash, randomBytes } from 'node:crypto'
import { readFileSync, statSync } from 'node:fs'
import { ConfigError } from '../config.js'
import { errorText } from '../errors.js'
import { list, oneOf, optional, record, sha256, text } from '../store/rules.js'
import { parseYaml } from '../yaml.js'
import { SCOPES, type Scope } from './principal.js'
import { type Quotas, quotasRule } from './quotas.js'

/** A key as its file has it: never the key itself. */
export type KeyRecord = {
  readonly name: string
  /** Of the key's characters, in hexadecimal. */
  readonly sha256: string
  readonly scopes: readonly Scope[]
  /** The beginning of the names of its runs; undefined where all runs are its. */
  readonly runs?: string | undefined
  readonly quotas?: Quotas | undefined
}

/** What every key of `muond keys` begins with, by which scanners for secrets know one. */
const KEY_PREFIX = 'muond_'
const KEY_BYTES = 32
const OTHERS_MAY_WRITE = 0o002

const keyRule = record<KeyRecord>({
  name: text("1 to 64 letters, digits, '.', '_' and '-'", /^[A-Za-z0-9._-]{1,64}$/),
  sha256,
  scopes: list(oneOf(...SCOPES)),
  // Without the separator a prefix 'team1' would have the runs of 'team10', too.
  runs: optional(
    text("the beginning of run names, with '.', '_' or '-' at its end", /^[A-Za-z0-9][A-Za-z0-9._-]{0,126}[._-]$/),
  ),
  quotas: optional(quotasRule),
})
const fileRule = record<{ keys: KeyRecord[] }>({ keys: list(keyRule) })

/**
 * The hash by which a key is known. SHA-256, without salt and in one round: keys are 32 random bytes, which nobody
 * finds by trying. A slow hash such as scrypt is for what people can remember, and would let whoever sends wrong keys
 * keep the service busy.
 */
export function hashOf(key: string): string {
  return createHash('sha256').update(key).digest('hex')
}

/** A new key. */
export function newKey(): string {
  return KEY_PREFIX + randomBytes(KEY_BYTES).toString('base64url')
}

/**
 * Reads the keys of a file, YAML or JSON, which may have none. Throws ConfigError with one line for a file that cannot
 * be read, that everybody may write to or that has a key twice, and with the place of what is wrong in it.
 */
export function readKeyFile(path: string): KeyRecord[] {
  const { mode, content } = contentOf(path)
  if ((mode & OTHERS_MAY_WRITE) !== 0)
    throw new ConfigError(
      `key file '${path}' has mode ${(mode & 0o777).toString(8)}: everybody may add a key (chmod o-w)`,
    )
  return keysIn(content, path)
}

/** The keys of the text of a file. Throws as `readKeyFile`. */
export function keysIn(content: string, path: string): KeyRecord[] {
  const value = parsed(content, path) ?? { keys: [] }
  const problem = fileRule.problem(value, '')
  if (problem !== undefined) throw new ConfigError(`key file '${path}': ${problem}`)
  const { keys } = value as { keys: KeyRecord[] }
  const twice = twiceIn(keys)
  if (twice !== undefined) throw new ConfigError(`key file '${path}': ${twice}`)
  return keys
}

function contentOf(path: string): { mode: number; content: string } {
  try {
    return { mode: statSync(path).mode, content: readFileSync(path, 'utf8') }
  } catch (error) {
    throw new ConfigError(`key file '${path}' cannot be read: ${errorText(error)}`)
  }
}

function parsed(content: string, path: string): unknown {
  try {
    return parseYaml(content)
  } catch (error) {
    throw new ConfigError(`key file '${path}' is no YAML: ${errorText(error)}`)
  }
}

function twiceIn(keys: readonly KeyRecord[]): string | undefined {
  for (const [index, { name, sha256 }] of keys.entries()) {
    const twin = keys.findIndex((other) => other.name === name || other.sha256 === sha256)
    if (twin !== index) return `keys[${twin}] and keys[${index}] have the same name or the same sha256`
  }
  return undefined
}
