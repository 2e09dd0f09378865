import { createHash } from 'node:crypto'
import { UnreadableError } from './manifest.js'

const SEAL = ',"sha256":"'
const SEALED = /^([0-9a-f]{64})"}$/

/** A record as a line of JSON without its end, whose last key is the SHA-256 of the text before it. */
export function sealLine(record: object): string {
  const body = JSON.stringify(record).slice(0, -1)
  return `${body}${SEAL}${sha256(body)}"}`
}

/**
 * Reads what `sealLine` wrote, without its hash. Throws UnreadableError, which begins with `label`, where one byte is
 * not what was written.
 */
export function unsealLine(line: string, label: string): unknown {
  const at = line.lastIndexOf(SEAL)
  const [, said] = SEALED.exec(line.slice(at + SEAL.length)) ?? []
  if (at < 0 || said === undefined) throw new UnreadableError(`${label} does not end with its SHA-256`)
  const actual = sha256(line.slice(0, at))
  if (actual !== said) throw new UnreadableError(`${label} has SHA-256 ${actual}, expected ${said}`)
  const { sha256: _, ...record }: { sha256: string } = JSON.parse(line)
  return record
}

function sha256(text: string): string {
  return createHash('sha256').update(text).digest('hex')
}
