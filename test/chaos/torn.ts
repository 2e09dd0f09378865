import { cpSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import type { MuondError } from '../../src/client/client.js'
import { CheckpointFiles } from '../../src/store/checkpoint/checkpoint-files.js'
import { UnreadableError } from '../../src/store/checkpoint/manifest.js'
import { RunFolder } from '../../src/store/folder/run-folder.js'
import { openIdentity } from '../../src/store/identity.js'
import { encodeHead } from '../../src/store/journal/journal-format.js'
import { readJournal, type StoredStep } from '../../src/store/journal/journal-reader.js'
import { RunStore } from '../../src/store/run-store.js'
import { checkpointId, runFolder } from './folder.js'
import type { Weights } from './model.js'
import { Site } from './site.js'
import { type Case, type Fault, judge, lost, type Verdict } from './stage.js'
import type { Remedy } from './trainer.js'

const RUN = 'run'
// A checkpoint at step 5, and the steps 6 to 8 in the journal behind it.
const CHECKPOINT = 5
const LAST_STEP = 8
const FLAGS = ['--checkpoint-steps', '0']
const COARSE = 499
const IN_PROCESS =
  "The store's own code reads each of these files, in this process; 'same' is the state of the last whole step."
const REAL = 'A real service is started on each; after an error the whole file is put back and the run goes on.'

/** A file that a torn write may leave, and how the store opens a run's folder with it. */
type Target = {
  name: string
  file: (folder: string) => string
  /** The first byte that may be lacking. */
  from: (base: Base) => number
  /** The distance of two cuts, in bytes: 1 for every byte. */
  stride: number
  /** Whether a real service is started on some of the torn files, too. */
  isReal: boolean
  read: (torn: Torn) => Promise<Verdict>
}

/** A run's folder with a torn file in it. */
type Torn = { folder: string; path: string; whole: Buffer; damaged: Buffer; files: CheckpointFiles; base: Base }

/** A data folder after a kill, and one that was killed before the checkpoint's manifest had its name. */
type Base = { data: string; unnamed: string; kept: Map<number, Weights>; lastStep: number; lastRecord: number }

const manifest = (folder: string) => join(folder, 'checkpoints', checkpointId(CHECKPOINT), 'manifest.json')
const journal = (folder: string) => join(folder, 'journal', `${String(CHECKPOINT + 1).padStart(12, '0')}.journal`)

const RUN_FILES = { from: () => 0, stride: 1, isReal: true }
const JOURNAL = { file: journal, read: readTail }

const TARGETS: readonly Target[] = [
  { name: 'manifest.json', file: manifest, read: readManifest, ...RUN_FILES },
  { name: 'manifest.json.new', file: (folder) => `${manifest(folder)}.new`, read: readUnnamed, ...RUN_FILES },
  { name: 'run.json', file: (folder) => join(folder, 'run.json'), read: readIdentity, ...RUN_FILES },
  { name: "journal's last record", from: ({ lastRecord }) => lastRecord, stride: 1, isReal: false, ...JOURNAL },
  { name: "journal's last step", from: ({ lastStep }) => lastStep, stride: 61, isReal: true, ...JOURNAL },
]

/** Writes that a crash has cut off at any byte; `coarse` leaves most of them out. */
export function torn(folder: string, coarse: boolean): Fault[] {
  let prepared: Promise<Base> | undefined
  const base = () => {
    prepared ??= prepare(join(folder, 'torn'))
    return prepared
  }
  const every = TARGETS.map((target): Fault => {
    const stride = target.stride * (coarse ? COARSE : 1)
    const attempt = async (the: Case) => tearEverywhere(target, { the, stride, base: await base() })
    const aimed = `${target.name}, every ${stride === 1 ? '' : `${stride}th `}byte`
    return { fault: 'torn write', aimed, note: IN_PROCESS, full: 1, isQuick: true, attempt }
  })
  const real = TARGETS.filter(({ isReal }) => isReal).map((target): Fault => {
    const attempt = async (the: Case) => tearOnce(target, the, await base())
    const row = { fault: 'torn write', aimed: `${target.name}, real start`, note: REAL, full: 4 }
    return { ...row, isQuick: target.file === journal, attempt }
  })
  return [...every, ...real]
}

async function prepare(folder: string): Promise<Base> {
  mkdirSync(folder, { recursive: true })
  const site = await Site.start({ folder, durability: 'journal', flags: FLAGS })
  const path = runFolder(site.data, RUN)
  const [data, unnamed] = [join(folder, 'killed'), join(folder, 'unnamed')]
  const segment = join(path, 'journal', '000000000001.journal')
  const trainer = site.trainer(RUN, AbortSignal.timeout(60_000), {
    onReceipt: async (step, { run }) => {
      if (step === CHECKPOINT) cpSync(segment, join(folder, 'segment'))
      if (step === CHECKPOINT) await run.checkpoint()
    },
  })
  await trainer.train(LAST_STEP)
  await site.close()
  cpSync(site.data, data, { recursive: true })
  cpSync(site.data, unnamed, { recursive: true })
  const { steps } = await readJournal(join(path, 'journal'), CHECKPOINT)
  const [lastStep, lastRecord] = endsOf(steps)
  cpSync(join(folder, 'segment'), join(runFolder(unnamed, RUN), 'journal', '000000000001.journal'))
  renameSync(manifest(runFolder(unnamed, RUN)), `${manifest(runFolder(unnamed, RUN))}.new`)
  return { data, unnamed, kept: trainer.kept, lastStep, lastRecord }
}

/** Where the step before the last one ends, and the last gradient. */
function endsOf(steps: readonly StoredStep[]): [number, number] {
  const [first, last] = [steps.at(-1)?.gradients.at(0), steps.at(-1)?.gradients.at(-1)]
  if (!first || !last) throw new Error('the journal has no step with a gradient')
  const head = encodeHead(
    { type: 'gradient', step: first.step, parameter: first.parameter, applied: first.applied },
    first.bytes,
  )
  return [first.at - head.length, last.at + last.bytes]
}

/** Cuts the file at every byte, also with zeros behind the cut: a file may have its length before its contents. */
async function tearEverywhere(
  target: Target,
  { the, stride, base }: { the: Case; stride: number; base: Base },
): Promise<Verdict[]> {
  const { folder, path, whole } = copyFor(target, the, base)
  const files = new CheckpointFiles()
  const counts = new Map<string, Verdict & { times: number }>()
  for (let length = target.from(base); length < whole.length; length += stride) {
    const first = whole.subarray(0, length)
    for (const damaged of [first, Buffer.concat([first, Buffer.alloc(whole.length - length)])]) {
      mkdirSync(dirname(path), { recursive: true })
      writeFileSync(path, damaged)
      const verdict = await target.read({ folder, path, whole, damaged, files, base })
      const known = counts.get(verdict.result) ?? { ...named(verdict, damaged), times: 0 }
      counts.set(verdict.result, { ...known, times: known.times + 1 })
    }
  }
  await files.close()
  return [...counts.values()]
}

function named(verdict: Verdict, { length }: Buffer): Verdict {
  return verdict.reason === undefined ? verdict : lost(`with ${length} bytes: ${verdict.reason}`)
}

function copyFor({ name, file }: Target, the: Case, { data, unnamed }: Base) {
  const copy = join(the.folder, 'data')
  cpSync(name.endsWith('.new') ? unnamed : data, copy, { recursive: true })
  const folder = runFolder(copy, RUN)
  const path = file(folder)
  return { folder, path, whole: readFileSync(path) }
}

async function readManifest({ folder, path, files }: Torn): Promise<Verdict> {
  const opened = await RunStore.open(new RunFolder(folder, files))
  const { newest } = opened
  if (newest?.step !== CHECKPOINT) return lost(`the newest checkpoint is of step ${newest?.step}`)
  const error = await opened.manifest(newest).catch((reason) => reason)
  if (newest.problem?.includes(path) && error instanceof UnreadableError) return { result: 'error' }
  return lost(`the manifest was read, its problem is ${newest.problem}`)
}

/** A checkpoint whose manifest lacks its name does not count: the one before is the newest, with the whole journal. */
async function readUnnamed({ folder, files }: Torn): Promise<Verdict> {
  const { newest } = await RunStore.open(new RunFolder(folder, files))
  if (newest?.step === 0 && !newest.problem) return { result: 'same' }
  return lost(`the newest checkpoint is of step ${newest?.step}: ${newest?.problem}`)
}

async function readIdentity({ folder, path, files, whole }: Torn): Promise<Verdict> {
  try {
    const identity = await (await RunStore.open(new RunFolder(folder, files))).identity
    const expected = openIdentity(String(whole), path, basename(folder))
    if (isDeepStrictEqual(identity, expected)) return { result: 'same' }
    return lost(`run.json was read as ${JSON.stringify(identity)}, expected ${JSON.stringify(expected)}`)
  } catch (error) {
    if (error instanceof UnreadableError) return { result: 'error' }
    throw error
  }
}

async function readTail({ folder, whole, damaged, base }: Torn): Promise<Verdict> {
  const { steps, tail } = await readJournal(join(folder, 'journal'), CHECKPOINT)
  const isWhole = damaged.equals(whole)
  const hasTail = !isWhole && damaged.length > base.lastStep
  const last = steps.at(-1)?.step
  if (last === (isWhole ? LAST_STEP : LAST_STEP - 1) && (tail !== undefined) === hasTail) return { result: 'same' }
  return lost(`the last step is ${last}, ${tail?.bytes ?? 0} bytes follow`)
}

/** A service that finds the torn file, at a random byte. */
async function tearOnce(target: Target, the: Case, base: Base): Promise<Verdict> {
  const { path, whole } = copyFor(target, the, base)
  const from = target.from(base)
  writeFileSync(path, whole.subarray(0, from + Math.floor(the.random() * (whole.length - from))))
  const site = await Site.start({ folder: the.folder, durability: 'journal', flags: FLAGS })
  const decide = async ({ code }: MuondError): Promise<Remedy> => {
    if (code !== 'CHECKPOINT_UNREADABLE') return 'give up'
    await site.kill()
    writeFileSync(path, whole)
    await site.start()
    return 'again'
  }
  const kept = new Map(base.kept)
  const outcome = await site.train(RUN, the.signal, { kept, decide }).finally(() => site.close())
  return judge(outcome, the.reference, true)
}
