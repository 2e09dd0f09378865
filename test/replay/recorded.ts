import { createHash } from 'node:crypto'
import { readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { PassThrough } from 'node:stream'
import { replayCommand } from '../../src/commands/replay.js'
import type { RowStep } from '../../src/replay/rows.js'
import type { Spike } from '../../src/replay/spikes.js'
import { encodeHead, type Head, PREFIX_BYTES, readHead, readPrefix } from '../../src/store/journal/journal-format.js'
import { start } from '../keep/data-folder.js'

// What the tests of `muond replay` do with a recorded run.

export const KEPT = { durability: 'journal', keep_journal: true, checkpoints_kept: 100 } as const
const ENVIRONMENT = { MUOND_DEVICE: 'cpu', MUOND_LANES: '1', MUOND_STAGING_BYTES: String(2 ** 20) }

/** A service that keeps every step of a run in its journal. */
export const recorder = (data: string, settings: Parameters<typeof start>[1] = {}) =>
  start(data, { ...KEPT, ...settings })

type Printed = {
  checkpoint: string
  from_step: number
  to_step: number
  equal: boolean
  steps_equal: number
  difference?: {
    step: number
    digest: { computed: string; journal: string }
    parameter?: { name: string; what: string; computed: string; journal: string }
  }
  rows: { name: string; alternative?: { begins: string } }[]
  steps: { step: number; digest: string; rows: Record<string, RowStep> }[]
  spikes: Spike[]
  notes: string[]
}

/** `muond replay --json`: what it prints, and whether the process would end with 1. */
export async function replaying(data: string, run: string, ...rest: string[]): Promise<Printed & { failed: boolean }> {
  let failed = false
  const text = await replayCommand([run, '--data', data, '--json', ...rest], ENVIRONMENT, {
    terminal: new PassThrough(),
    failed: () => {
      failed = true
    },
  })
  return { ...JSON.parse(text), failed }
}

/** What it prints without --json. */
export const printed = (data: string, run: string, ...rest: string[]) =>
  replayCommand([run, '--data', data, ...rest], ENVIRONMENT, { terminal: new PassThrough(), failed: () => {} })

/** Groups as a file that --groups takes. */
export function groupsFile(folder: string, groups: unknown, name = 'groups.json'): string {
  const file = join(folder, name)
  writeFileSync(file, typeof groups === 'string' ? groups : JSON.stringify(groups))
  return file
}

/** Every file below a folder with its hash and when it was last written to. */
export function filesIn(folder: string): Map<string, string> {
  const names = readdirSync(folder, { recursive: true, encoding: 'utf8' }).sort()
  return new Map(
    names.flatMap((name) => {
      const path = join(folder, name)
      const { mtimeMs, size } = statSync(path)
      const content = statSync(path).isFile() ? createHash('sha256').update(readFileSync(path)).digest('hex') : ''
      return [[name, `${mtimeMs} ${size} ${content}`] as const]
    }),
  )
}

/** Rewrites the records of a journal's file: each may have another head and payload, and has a checksum that is right. */
export function forge(path: string, change: (head: Head, payload: Buffer) => Head | undefined): void {
  const bytes = readFileSync(path)
  const records: Buffer[] = []
  for (let at = 0; at < bytes.length; ) {
    const prefix = bytes.subarray(at, at + PREFIX_BYTES)
    const { headBytes, payloadBytes } = readPrefix(prefix)!
    const payloadAt = at + PREFIX_BYTES + headBytes
    const payload = bytes.subarray(payloadAt, payloadAt + payloadBytes)
    const head = readHead(prefix, bytes.subarray(at + PREFIX_BYTES, payloadAt), path)!
    const changed = change(head, payload)
    if (changed) records.push(encodeHead(changed, payloadBytes), payload)
    at = payloadAt + payloadBytes
  }
  writeFileSync(path, Buffer.concat(records))
}
