import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Test } from 'tap'
import { hashOf } from '../../src/access/key-file.js'
import type { Scope } from '../../src/access/principal.js'

/** What the file has of a key, whose characters are its name and more of them. */
export type Entry = {
  name: string
  scopes: readonly (Scope | string)[]
  runs?: string
  quotas?: Record<string, number>
}

/** The key of a name. */
export const keyOf = (name: string) => `muond_${name}-of-many-characters`
export const bearer = (name: string) => ({ authorization: `Bearer ${keyOf(name)}` })

/** A file of keys, which can be written again. */
export function keysFile(test: Pick<Test, 'testdir'>, entries: readonly Entry[]) {
  const path = join(test.testdir({}), 'keys.yaml')
  const write = (entries: readonly Entry[]) => {
    const keys = entries.map((entry) => ({ ...entry, sha256: hashOf(keyOf(entry.name)) }))
    // YAML has JSON in it.
    writeFileSync(path, JSON.stringify({ keys }))
  }
  write(entries)
  return { path, write }
}
