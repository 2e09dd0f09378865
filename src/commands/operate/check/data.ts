import { randomUUID } from 'node:crypto'
import { accessSync, constants, existsSync, statSync } from 'node:fs'
import { readdir, rm, statfs, writeFile } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'
import type { Config } from '../../../config.js'
import { errorText } from '../../../errors.js'
import { type StoredRun, verifyRun } from '../../../keep/verify.js'
import { CheckpointFiles } from '../../../store/checkpoint/checkpoint-files.js'
import { FILE_MODE } from '../../../store/durable.js'
import { holderOf } from '../../../store/lock.js'
import { ownAddress } from '../../../store/objects/s3/s3-address.js'
import { amount, counted } from '../../amount.js'
import { type Finding, failure, finding, ok, taken, warning } from './finding.js'
import { checkObjects } from './objects.js'

const BLOCK_BYTES = 4096
const WRITABLE = 'the user that the service runs as must be able to write there'
/** A service that is at work in the folder may remove files while they are read: then the run is read again. */
const ATTEMPTS = 5

/**
 * The data folder, or store: whether it can be written, who is at work there, its runs, and whether there is room for
 * more.
 */
export function checkData(config: Config): Promise<Finding[]> {
  const address = ownAddress(config)
  if (address) return checkObjects(address)
  return finding('data', 'see that the folder can be read', () => findingsIn(config))
}

async function findingsIn(config: Config): Promise<Finding[]> {
  const { data } = config
  if (data === '') return [warning('data', 'no folder: state ends with the process', '--data DIR keeps it')]
  const folder = resolve(data)
  if (!existsSync(folder)) return [willBeMade(folder)]
  const problem = await problemOf(folder)
  if (problem !== undefined) return [failure('data', `${folder} cannot be written: ${problem}`, WRITABLE)]
  const holder = holderOf(folder)
  const runs = await checkRuns(join(folder, 'runs'))
  return [held(folder, holder), await room(folder, config, runs), ...runs.map(({ found }) => found)]
}

/** A folder that a start makes, with those above it that are lacking. */
function willBeMade(folder: string): Finding {
  let above = dirname(folder)
  while (!existsSync(above)) above = dirname(above)
  if (!statSync(above).isDirectory())
    return failure('data', `${folder} cannot be made: ${above} is no folder`, 'give --data another path')
  try {
    accessSync(above, constants.W_OK | constants.X_OK)
    return ok('data', `${folder} is not there yet, and will be made`)
    /* c8 ignore next 3 -- the user of the tests may be root, who may do everything */
  } catch (error) {
    return failure('data', `${folder} cannot be made: ${errorText(error)}`, WRITABLE)
  }
}

/** Why a start could not write to the folder. Writes one block under a name of its own, and takes it away. */
async function problemOf(folder: string): Promise<string | undefined> {
  const file = join(folder, `check-${randomUUID()}`)
  const problem = await writeBlock(file, join(folder, 'runs')).then(() => undefined, errorText)
  await rm(file, { force: true }).catch(() => undefined)
  return problem
}

async function writeBlock(file: string, runs: string): Promise<void> {
  await writeFile(file, new Uint8Array(BLOCK_BYTES), { flag: 'wx', mode: FILE_MODE, flush: true })
  if (existsSync(runs)) accessSync(runs, constants.W_OK | constants.X_OK)
}

function held(folder: string, holder: ReturnType<typeof holderOf>): Finding {
  if (holder === undefined) return ok('data', `${folder} can be written, and nobody uses it`)
  const { text, holds } = holder
  if (holds === 'no') return ok('data', `${folder} can be written, and nobody uses it; the last was ${text}`)
  if (holds === 'yes') return taken('data', `${folder} is in use by ${text}`, '--data')
  return ok('data', `${folder} can be written; whether ${text} still uses it cannot be seen from here`)
}

/** The free bytes of the disk, and whether the next checkpoint of each run, and the journals, find room there. */
async function room(folder: string, { durability, journal_bytes }: Config, runs: readonly Checked[]): Promise<Finding> {
  const { bavail, bsize } = await statfs(folder)
  const free = bavail * bsize
  const checkpoints = runs.reduce((sum, { stored }) => sum + (stored?.bytes ?? 0), 0)
  const journals = durability === 'journal' ? journal_bytes * Math.max(1, runs.length) : 0
  const needed = checkpoints + journals
  const found = `${amount(free, 'B')} are free`
  if (free >= needed) return ok('disk', found)
  const needs = `the next checkpoint of each run takes ${amount(checkpoints, 'B')}, journals up to ${amount(journals, 'B')}`
  return warning('disk', `${found}; ${needs}`, 'make room, or lower --checkpoints-kept and --journal-bytes')
}

type Checked = { found: Finding; stored?: StoredRun }

async function checkRuns(folder: string): Promise<Checked[]> {
  if (!existsSync(folder)) return []
  const files = new CheckpointFiles()
  try {
    const checked: Checked[] = []
    // Names with a dot are of runs that were being deleted: a start removes them.
    const names = (await readdir(folder)).filter((name) => !name.startsWith('.')).sort()
    for (const name of names) checked.push(await checkRun(join(folder, name), name, files))
    return checked
  } finally {
    await files.close()
  }
}

async function checkRun(folder: string, name: string, files: CheckpointFiles): Promise<Checked> {
  const check = `run ${name}`
  try {
    const stored = await again(ATTEMPTS, () => verifyRun(folder, files))
    return { found: ok(check, wordsOf(stored)), stored }
  } catch (error) {
    const remedy =
      'a start goes on without this run, and refuses to open it: bring its files back from a backup, or delete the run'
    return { found: failure(check, errorText(error), remedy) }
  }
}

async function again<T>(attempts: number, work: () => Promise<T>): Promise<T> {
  for (let left = attempts - 1; left > 0; left -= 1) {
    try {
      return await work()
    } catch {
      // The last attempt tells what is wrong.
    }
  }
  return work()
}

function wordsOf({ step, checkpoint, checkpoints, bytes, journalSteps }: StoredRun): string {
  if (checkpoint === '') return 'its making was interrupted, and nothing was acknowledged: a start removes it'
  const behind = journalSteps === 0 ? '' : `, ${counted(journalSteps, 'step')} in the journal`
  return `step ${step}; ${checkpoint}, the newest of ${checkpoints} (${amount(bytes, 'B')})${behind}: as written`
}
