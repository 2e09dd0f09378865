import { createHash } from 'node:crypto'
import { readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { configOf } from '../../src/config.js'
import { Device } from '../../src/device/device.js'
import { readAlternative } from '../../src/replay/alternative.js'
import { type Wanted, withRecording } from '../../src/replay/recording.js'
import { jsonOf, type Report, reportOf, textOf } from '../../src/replay/report.js'
import type { RowStep } from '../../src/replay/rows.js'
import type { Spike } from '../../src/replay/spikes.js'
import { CheckpointFiles } from '../../src/store/checkpoint/checkpoint-files.js'
import { encodeHead, type Head, PREFIX_BYTES, readHead, readPrefix } from '../../src/store/journal/journal-format.js'
import { readPresets } from '../../src/store/presets.js'
import { start } from '../keep/data-folder.js'

// What the tests of `muond replay` do with a recorded run.

export const KEPT = { durability: 'journal', keep_journal: true, checkpoints_kept: 100 } as const

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
  rows: { name: string; alternative?: { begins: string }; parameters: string[] }[]
  steps: { step: number; digest: string; rows: Record<string, RowStep> }[]
  spikes: Spike[]
  notes: string[]
}

/** One device, and one thread that reads checkpoints, for all replays of a file: to start them takes longest. */
let opened: Promise<{ device: Device; files: CheckpointFiles }> | undefined
t.teardown(async () => {
  /* c8 ignore next -- every file of tests has a replay */
  const { device, files } = (await opened) ?? {}
  await device?.close()
  await files?.close()
})

async function open() {
  const settings = { device: 'cpu', lanes: 1, staging_bytes: 2 ** 20 }
  return { device: await Device.start(configOf(settings)), files: new CheckpointFiles() }
}

type Options = Omit<Wanted, 'data' | 'run'> & { groups?: string }

/** What `muond replay` knows of a run in the end; throws what it ends with. */
async function investigated(data: string, run: string, { groups, ...wanted }: Options): Promise<Report> {
  opened ??= open()
  const { device, files } = await opened
  return withRecording({ data, run, ...wanted }, files, async (recording) => {
    const { declaration } = recording
    const alternative = groups === undefined ? undefined : await readAlternative(groups, declaration, readPresets())
    return reportOf(recording, { device, alternative, progress: () => {} })
  })
}

/** What `muond replay --json` prints. */
export async function replaying(data: string, run: string, options: Options = {}): Promise<Printed> {
  return JSON.parse(JSON.stringify(jsonOf(await investigated(data, run, options))))
}

/** What it prints without --json. */
export async function printed(data: string, run: string, { every, ...options }: Options & { every?: number } = {}) {
  return textOf(await investigated(data, run, options), every)
}

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
