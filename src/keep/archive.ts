import assert from 'node:assert'
import type { Config } from '../config.js'
import type { Tensor } from '../device/memory.js'
import { errorText, ServiceError } from '../errors.js'
import type { Groups } from '../optimizer/hyperparameters.js'
import type { Declaration } from '../run/declaration.js'
import { importNote } from '../run/imported-state.js'
import { groupRecords, groupsOf } from '../run/record.js'
import type { Run } from '../run/run.js'
import { type Manifest, UnreadableError } from '../store/checkpoint/manifest.js'
import type { DataFolder } from '../store/data-folder.js'
import type { Identity } from '../store/identity.js'
import { clearJournal, Journal, listSegments } from '../store/journal/journal.js'
import { cutTail, readJournal } from '../store/journal/journal-reader.js'
import type { CheckpointEntry, RunFolder } from '../store/run-folder.js'
import { Keeper, type KeeperMeans } from './keeper.js'
import { checkDigest, differenceOf, keptDeclaration, readTensors, replay } from './restore.js'

export type ArchiveMeans = KeeperMeans & {
  data: DataFolder
  config: Config
  /** Admits a run and makes the device ready for it. */
  build(name: string, declaration: Declaration, created_at: string): Promise<Run>
}

/** A checkpoint that was read: its tensors are nobody's until a run has taken them. */
export type Kept = { readonly manifest: Manifest; readonly tensors: (Tensor[] | undefined)[]; taken: boolean }

type Shelf = { keeper: Keeper; identity: Identity }

/** Connects runs with their folders: it creates those, restores runs from them, and goes back to checkpoints. */
export class Archive {
  readonly #means: ArchiveMeans
  /** Of the runs that are in memory. */
  readonly #shelves = new Map<string, Shelf>()
  /** Runs on the disk that are not in memory, and why; empty where nobody has tried. */
  readonly #stored: Map<string, string>

  constructor(means: ArchiveMeans) {
    this.#means = means
    this.#stored = new Map(means.data.names.map((name) => [name, '']))
  }

  /** Runs on the disk that are not in memory, with the reason. */
  get stored(): ReadonlyMap<string, string> {
    return this.#stored
  }

  keeper(name: string): Keeper {
    return this.#shelf(name).keeper
  }

  /**
   * Gives a new run its folder, and a first checkpoint: from here on it is never lost without a word. Notes that it
   * was opened.
   */
  async create(run: Run): Promise<void> {
    const folder = await this.#means.data.create(run.name).catch((error) => {
      throw this.#failed(run.name, error)
    })
    try {
      const keeper = this.#adopt(run, folder, { run: run.name, epoch: 0 })
      await this.#openJournal(run, folder)
      await keeper.take()
      await this.opened(run)
    } catch (error) {
      await this.#forget(run)
      await folder.destroy().catch((again) => this.#warn('run_left_behind', run.name, again))
      throw this.#failed(run.name, error)
    }
  }

  /** Notes an `open` before it is answered. */
  async opened(run: Run): Promise<void> {
    await this.#identify(run, { epoch: run.epoch + 1 })
  }

  /**
   * Notes the groups that an `open` gives, before they hold: from the step in progress on if nothing was applied for
   * it.
   */
  async replaced(run: Run, groups: Groups): Promise<void> {
    const [given, before] = [groups, run.groupsBefore].map(groupRecords)
    const { step } = run
    const replacement = run.ahead.length === 0 ? { step, groups: given } : { step, groups: before, later: given }
    await this.#identify(run, { replacement })
  }

  /**
   * Restores a run from its newest checkpoint and the journal behind it, or as it was at another checkpoint: that
   * changes nothing on the disk yet, see `goBack`. Undefined: there is none. Throws CHECKPOINT_UNREADABLE and leaves
   * nothing behind.
   */
  async load(name: string, checkpoint?: string): Promise<Run | undefined> {
    if (!this.#stored.has(name)) return undefined
    try {
      const folder = await this.#means.data.find(name)
      const entry = checkpoint === undefined ? folder.newest : findCheckpoint(folder, name, checkpoint)
      const run = entry
        ? await this.#restore(folder, entry, checkpoint === undefined)
        : await this.#unfinished(folder, name)
      this.#stored.delete(name)
      return run
    } catch (error) {
      const known = unreadable(name, error)
      this.#stored.set(name, errorText(known))
      throw known
    }
  }

  /** Reads a checkpoint of a run that is in memory. */
  async fetch(run: Run, checkpoint: string): Promise<Kept> {
    const { folder } = this.keeper(run.name)
    try {
      const entry = findCheckpoint(folder, run.name, checkpoint)
      const manifest = await folder.manifest(entry)
      return await this.#read(run, folder, manifest)
    } catch (error) {
      throw unreadable(run.name, error)
    }
  }

  /** Gives back what no run has taken. */
  release({ tensors, taken }: Kept): void {
    if (taken) return
    for (const tensor of tensors.flat()) if (tensor) this.#means.device.memory.release(tensor)
  }

  /** Puts a run where `kept` is, or leaves it where it is, and drops what came after that from the disk. */
  goBack(run: Run, kept?: Kept): Promise<void> {
    const { keeper } = this.#shelf(run.name)
    const { folder } = keeper
    return keeper
      .alone(async () => {
        await run.closeJournal()
        // Groups that were given later are of a history that is dropped.
        await this.#identify(run, { replacement: undefined })
        await clearJournal(folder.journal)
        await folder.removeAfter(kept?.manifest ?? run)
        if (kept) this.#take(run, kept)
        await this.#openJournal(run, folder)
      })
      .catch((error) => {
        throw this.#failed(run.name, error)
      })
  }

  /** Takes a checkpoint of every run that has come further than its last one and is between two steps. */
  async checkpointAll(): Promise<void> {
    const keepers = [...this.#shelves.values()].map(({ keeper }) => keeper)
    await Promise.all(
      keepers.map((keeper) =>
        keeper.take().catch((error) => this.#warn('checkpoint_failed', keeper.folder.path, error)),
      ),
    )
  }

  /** Removes a run from the disk. */
  async remove(name: string, run?: Run): Promise<void> {
    const shelf = this.#shelves.get(name)
    if (run) await this.#forget(run)
    this.#stored.set(name, '')
    const folder = shelf?.keeper.folder ?? (await this.#means.data.find(name))
    await folder.destroy().catch((error) => {
      throw this.#failed(name, error)
    })
    this.#stored.delete(name)
  }

  /** A run that is not in memory any more: it can be loaded again. */
  async evict(run: Run): Promise<void> {
    await this.#forget(run)
    this.#stored.set(run.name, '')
  }

  /** When everything that was begun is on the disk. */
  async close(runs: Iterable<Run>): Promise<void> {
    for (const { keeper } of this.#shelves.values()) await keeper.settled()
    for (const run of runs) await run.closeJournal()
  }

  async #identify(run: Run, change: Partial<Identity>): Promise<void> {
    const shelf = this.#shelf(run.name)
    const identity = { ...shelf.identity, ...change }
    await shelf.keeper.folder.identify(identity).catch((error) => {
      throw this.#failed(run.name, error)
    })
    shelf.identity = identity
  }

  #shelf(name: string): Shelf {
    const shelf = this.#shelves.get(name)
    assert(shelf, 'a run in memory has its folder')
    return shelf
  }

  /** A folder without a checkpoint: its `open` was never answered, unless there are steps. */
  async #unfinished(folder: RunFolder, name: string): Promise<undefined> {
    const steps = (await listSegments(folder.journal)).reduce((sum, { bytes }) => sum + bytes, 0)
    if (steps > 0) throw new UnreadableError(`${folder.path} has a journal and no checkpoint that it goes on from`)
    this.#means.log.info({ event: 'unfinished_run_removed', run: name })
    await folder.destroy()
    return undefined
  }

  async #restore(folder: RunFolder, entry: CheckpointEntry, withJournal: boolean): Promise<Run> {
    const started = performance.now()
    if (entry.problem) throw new UnreadableError(entry.problem)
    const manifest = await folder.manifest(entry)
    const identity = await folder.identity()
    const run = await this.#means.build(manifest.run, keptDeclaration(manifest), manifest.created_at)
    try {
      const { elsewhere } = this.#take(run, await this.#read(run, folder, manifest))
      const steps = withJournal ? await this.#replay(run, { folder, manifest, elsewhere }) : 0
      run.continueEpoch(identity.epoch)
      const keeper = this.#adopt(run, folder, withJournal ? replaceGroups(run, identity) : identity)
      // Without, the journal has steps that are dropped only once nothing is refused any more.
      if (withJournal) await this.#openJournal(run, folder)
      if (steps > 0 && !run.journal) await this.#leaveJournal(keeper)
      const seconds = (performance.now() - started) / 1000
      const { step, digest, note } = run
      this.#means.log.info({
        event: 'run_restored',
        run: run.name,
        checkpoint: entry.checkpoint,
        journal_steps: steps,
        step,
        digest,
        seconds,
        ...(note && { note }),
      })
      return run
    } catch (error) {
      await this.#forget(run)
      run.dispose()
      throw error
    }
  }

  /** Nothing is changed by it: what it gives has been held against every hash there is. */
  async #read(run: Run, folder: RunFolder, manifest: Manifest): Promise<Kept> {
    const { parameters, grant } = run
    checkDigest(manifest, run)
    const tensors = await readTensors(this.#means.device, { folder, manifest }, { parameters, units: grant.units })
    return { manifest, tensors, taken: false }
  }

  /** `elsewhere`: another kind of device had computed it. */
  #take(run: Run, kept: Kept): { elsewhere: boolean } {
    const { manifest, tensors } = kept
    kept.taken = true
    const difference = differenceOf(manifest.device, this.#means.device.record)
    const elsewhere = difference !== undefined
    const imported = manifest.imported ? [importNote(manifest.step)] : []
    const restored = elsewhere ? [`restored from ${manifest.checkpoint}: ${difference}`] : []
    run.restore(manifest, { tensors, elsewhere, note: [...imported, ...restored].join('; ') })
    return { elsewhere }
  }

  /** Computes the steps behind a checkpoint again; returns how many there are. */
  async #replay(
    run: Run,
    { folder, manifest, elsewhere }: { folder: RunFolder; manifest: Manifest; elsewhere: boolean },
  ): Promise<number> {
    const { log } = this.#means
    const { steps, tail } = await readJournal(folder.journal, manifest.step)
    if (tail) {
      const { path, at, bytes, damaged } = tail
      const event = { event: 'journal_cut', run: run.name, path, at, bytes }
      if (damaged) log.warn({ ...event, reason: damaged })
      else log.info({ ...event, reason: 'the step was not finished' })
      await cutTail(tail)
    }
    await replay(run, { steps, elsewhere })
    return steps.length
  }

  #adopt(run: Run, folder: RunFolder, identity: Identity): Keeper {
    const keeper = new Keeper(run, folder, this.#means)
    this.#shelves.set(run.name, { keeper, identity })
    return keeper
  }

  async #openJournal(run: Run, folder: RunFolder): Promise<void> {
    if (this.#means.config.durability !== 'journal') return
    run.useJournal(
      await Journal.open(folder.journal, { first: run.step + 1, what: `the journal of run '${run.name}'` }),
    )
  }

  // The service has no journal any more, the run had one: its steps go into a checkpoint.
  async #leaveJournal(keeper: Keeper): Promise<void> {
    await keeper.take()
    await clearJournal(keeper.folder.journal)
  }

  async #forget(run: Run): Promise<void> {
    await this.#shelves.get(run.name)?.keeper.settled()
    this.#shelves.delete(run.name)
    await run.closeJournal()
  }

  #failed(name: string, error: unknown): ServiceError {
    if (error instanceof ServiceError) return error
    return new ServiceError('STORAGE_FAILED', `the folder of run '${name}' cannot be written: ${errorText(error)}`)
  }

  #warn(event: string, run: string, error: unknown): void {
    this.#means.log.warn({ event, run, reason: errorText(error) })
  }
}

function findCheckpoint(folder: RunFolder, run: string, checkpoint: string): CheckpointEntry {
  const entry = folder.find(checkpoint)
  if (entry?.problem) throw new UnreadableError(entry.problem)
  if (entry) return entry
  const known = folder.checkpoints.map((other) => other.checkpoint)
  throw new ServiceError(
    'NOT_FOUND',
    `run '${run}' has no checkpoint '${checkpoint}'; its ${known.length}: ${known.join(', ')}`,
  )
}

/**
 * Replaces what no step has been computed with yet of the groups that a connection gave. Those that were given at
 * another step are in the checkpoint, or of steps that are lost: they are answered no more.
 */
function replaceGroups(run: Run, { replacement, ...rest }: Identity): Identity {
  if (replacement === undefined) return rest
  const { step, groups, later } = replacement
  if (step === run.step) run.replaceGroups(groupsOf(groups), 'this')
  if (later && (step === run.step || step + 1 === run.step))
    run.replaceGroups(groupsOf(later), step < run.step ? 'this' : 'next')
  return step === run.step || step + 1 === run.step ? { ...rest, replacement } : rest
}

function unreadable(name: string, error: unknown): unknown {
  const message = `run '${name}' cannot be restored: ${errorText(error)}`
  if (error instanceof UnreadableError) return new ServiceError('CHECKPOINT_UNREADABLE', message)
  return isFromSystem(error) ? new ServiceError('STORAGE_FAILED', message) : error
}

/** Whether the file system has refused something, as opposed to a file that is not what it should be. */
function isFromSystem(error: unknown): boolean {
  return error instanceof Error && 'syscall' in error
}
