import assert from 'node:assert'
import { randomUUID } from 'node:crypto'
import { ServiceError } from '../../errors.js'
import { FORMAT, held, seal, UnreadableError, unseal } from '../../store/checkpoint/manifest.js'
import type { Objects, Version } from '../../store/objects/objects.js'
import { withEach } from '../../store/objects/with-each.js'
import { count, optional, record, text } from '../../store/rules.js'
import type { Entry } from '../commit-log.js'
import { Whole } from '../whole.js'
import { ObjectLog, told } from './object-log.js'
import type { StoredWhole, WholeCheckpoint, WholeRecord, WholeStore } from './whole-store.js'
import { ofRun, openCheckpoints, recordRule, sealCheckpoints } from './whole-texts.js'

/**
 * The object of a whole. `life` is another text for each time that a whole of this name is created: what a head of one
 * that was deleted writes is not in the way of the next one. Without a record: it was deleted, and the name is free.
 */
type WholeObject = { readonly format: number; readonly life: string; readonly record?: WholeRecord | undefined }

const rule = record<WholeObject>({
  format: count,
  life: text('a UUID', /^[0-9a-f-]{36}$/),
  record: optional(recordRule),
})

const WHOLES = 'wholes/'
const ENDING = '.json'
const keyOf = (run: string) => `${WHOLES}${run}${ENDING}`
const logPrefixOf = (run: string, life: string) => `logs/${run}/${life}/`
const checkpointsKeyOf = (run: string, life: string) => `checkpoints/${run}/${life}.json`

/** What this process knows of the checkpoints of a whole. */
type Known = { readonly life: string; readonly checkpoints: readonly WholeCheckpoint[] }

const READS_AT_A_TIME = 16
/** So often heads that keep checkpoints at once may be in each other's way. */
const ATTEMPTS = 16

/**
 * Wholes as objects that all processes of a cluster share: `wholes/RUN.json` says what there is, and `logs/RUN/LIFE/`
 * and `checkpoints/RUN/LIFE.json` are of it. Every write has a condition, and no process is the only writer.
 */
export class WholeObjects implements WholeStore {
  readonly isShared = true
  readonly #objects: Objects
  readonly #known = new Map<string, Known>()

  constructor(objects: Objects) {
    this.#objects = objects
  }

  async names(): Promise<string[]> {
    return told(this.#names())
  }

  async create(record: WholeRecord): Promise<StoredWhole> {
    return told(this.#create(record))
  }

  async read(run: string): Promise<StoredWhole> {
    return told(this.#read(run))
  }

  async has(run: string): Promise<boolean> {
    return told(this.#isThere(run))
  }

  async keepCheckpoints(run: string, checkpoints: readonly WholeCheckpoint[]): Promise<readonly WholeCheckpoint[]> {
    return told(this.#keep(run, checkpoints))
  }

  async remove(run: string): Promise<void> {
    return told(this.#remove(run))
  }

  async #names(): Promise<string[]> {
    const found: string[] = []
    for await (const key of this.#objects.list(WHOLES)) found.push(key.slice(WHOLES.length, -ENDING.length))
    const names: string[] = []
    await withEach(found, READS_AT_A_TIME, async (name) => {
      const isThere = await this.#isThere(name).catch((error) => error instanceof UnreadableError)
      if (isThere) names.push(name)
    })
    return names.sort()
  }

  async #create(whole: WholeRecord): Promise<StoredWhole> {
    const { run } = whole
    const before = await this.#get(run)
    const life = randomUUID()
    const isFree = before?.whole.record === undefined
    const isMade = isFree && (await this.#write(keyOf(run), sealWhole({ life, record: whole }), before?.version))
    if (!isMade) throw new ServiceError('RUN_EXISTS', `run '${run}' exists`)
    this.#known.set(run, { life, checkpoints: [] })
    return { record: whole, checkpoints: [], log: this.#logOf(run, life) }
  }

  async #read(run: string): Promise<StoredWhole> {
    const { life, record: whole } = await this.#present(run)
    const { checkpoints } = await this.#readCheckpoints(run, life)
    const log = this.#logOf(run, life)
    await log.newest()
    this.#known.set(run, { life, checkpoints })
    return { record: whole, checkpoints, log }
  }

  /**
   * What was added to the checkpoints that were known here, and taken from them, is so in those that are there: another
   * head may have kept one meanwhile.
   */
  async #keep(run: string, checkpoints: readonly WholeCheckpoint[]): Promise<readonly WholeCheckpoint[]> {
    const { life } = await this.#present(run)
    const known = this.#known.get(run)
    if (known?.life !== life) throw absent(run)
    const [before, after] = [known.checkpoints, checkpoints].map(
      (list) => new Set(list.map(({ checkpoint }) => checkpoint)),
    )
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      const found = await this.#readCheckpoints(run, life)
      const others = found.checkpoints.filter(({ checkpoint }) => !before.has(checkpoint) && !after.has(checkpoint))
      const next = [...others, ...checkpoints]
      if (!(await this.#write(checkpointsKeyOf(run, life), sealCheckpoints(next), found.version))) continue
      this.#known.set(run, { life, checkpoints: next })
      return next
    }
    const message = `the checkpoints of run '${run}' were written by others ${ATTEMPTS} times in a row`
    throw new ServiceError('STORAGE_FAILED', message)
  }

  async #readCheckpoints(run: string, life: string) {
    const key = checkpointsKeyOf(run, life)
    const found = await this.#objects.get(key)
    if (found === undefined) return { checkpoints: [], version: undefined }
    const checkpoints = openCheckpoints(found.bytes.toString(), `${this.#objects.name}/${key}`)
    return { checkpoints, version: found.version }
  }

  /**
   * Closes the log first: no head commits a step of a whole that is deleted. The entries stay in whose place a head of
   * before may still want to write, which are those that other heads began with.
   */
  async #remove(run: string): Promise<void> {
    const { life, record: whole, version } = await this.#present(run)
    const log = this.#logOf(run, life)
    const closed = await closeLog(log, whole)
    if (!(await this.#write(keyOf(run), sealWhole({ life }), version))) throw absent(run)
    this.#known.delete(run)
    const begins = await beginsOf(log, closed)
    const commits = Array.from({ length: closed.position }, (_, i) => i + 1).filter((each) => !begins.has(each))
    await this.#objects.delete([...commits.map((each) => log.keyOf(each)), checkpointsKeyOf(run, life)])
  }

  /** Writes an object that is not there, or is of a version; undefined where that is so no more. */
  #write(key: string, content: string, version: Version | undefined): Promise<Version | undefined> {
    const bytes = Buffer.from(content)
    return version === undefined
      ? this.#objects.putIfAbsent(key, bytes)
      : this.#objects.putIfUnchanged(key, bytes, version)
  }

  async #get(run: string) {
    const found = await this.#objects.get(keyOf(run))
    if (found === undefined) return undefined
    const file = `${this.#objects.name}/${keyOf(run)}`
    const whole = held(rule, unseal(found.bytes.toString(), file), file)
    if (whole.record) ofRun(whole.record, file, run)
    return { whole, version: found.version }
  }

  async #isThere(run: string): Promise<boolean> {
    return (await this.#get(run))?.whole.record !== undefined
  }

  async #present(run: string) {
    const found = await this.#get(run)
    const { life, record: whole } = found?.whole ?? {}
    if (found && life && whole) return { life, record: whole, version: found.version }
    throw absent(run)
  }

  #logOf(run: string, life: string): ObjectLog {
    return new ObjectLog(this.#objects, logPrefixOf(run, life))
  }
}

function sealWhole(whole: Omit<WholeObject, 'format'>): string {
  return seal({ format: FORMAT, ...whole })
}

function absent(run: string): ServiceError {
  return new ServiceError('RUN_NOT_FOUND', `there is no run '${run}' over several processes`)
}

/** Takes a log from its head; answers its last entry. Throws STALE_GENERATION where another head begins meanwhile. */
async function closeLog(log: ObjectLog, { run, shards }: WholeRecord): Promise<Entry> {
  const generation = ((await log.newest())?.generation ?? 0) + 1
  const head = `deletion ${randomUUID()}`
  await Whole.begin({ log, assignment: { run, generation, shards }, attentions: [], head })
  const last = await log.newest()
  assert(last, 'a whole that has begun has an entry')
  return last
}

/**
 * The positions of a log's entries with which a head began. Where the positions of two entries are as far apart as
 * their steps, all between them are commits.
 */
async function beginsOf(log: ObjectLog, last: Entry): Promise<Set<number>> {
  const begins = new Set([1])
  const search = async (from: Entry, to: Entry): Promise<void> => {
    if (to.position - from.position === to.step - from.step) return
    const middle = to.position - from.position > 1 && (await log.read((from.position + to.position) >> 1))
    if (!middle) return void begins.add(to.position)
    await search(from, middle)
    await search(middle, to)
  }
  const first = await log.read(1)
  assert(first, 'a log with an entry has a first one')
  await search(first, last)
  return begins
}
