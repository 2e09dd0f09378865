import assert from 'node:assert'
import type { Config } from '../config.js'
import { errorText, ServiceError } from '../errors.js'
import type { Groups } from '../optimizer/hyperparameters.js'
import type { Declaration } from '../run/declaration.js'
import { groupRecords, groupsOf } from '../run/record.js'
import type { Run } from '../run/run.js'
import type { CheckpointEntry } from '../store/checkpoint/checkpoint-list.js'
import { UnreadableError } from '../store/checkpoint/manifest.js'
import type { DataStore } from '../store/data-store.js'
import type { Replacement } from '../store/identity.js'
import { StoreError } from '../store/objects/objects.js'
import type { RunStore } from '../store/run-store.js'
import type { Source } from '../wire/frame.js'
import { AbsentRuns, unreadable } from './absent.js'
import { idleOnDisk, idleRun } from './idle.js'
import { Keeper, type KeeperMeans } from './keeper.js'
import { copyOf, findCheckpoint, type Kept, ofRun, readKept, replayJournal, takeKept } from './kept.js'
import { keptDeclaration } from './restore.js'

export type ArchiveMeans = KeeperMeans & {
  data: DataStore
  config: Config
  /** Admits a run and makes the device ready for it. */
  build(name: string, declaration: Declaration, created_at?: string): Promise<Run>
}

/** Connects runs with what is kept of them: it creates that, restores runs from them, and goes back to checkpoints. */
export class Archive {
  readonly #means: ArchiveMeans
  /** Of the runs that are in memory. */
  readonly #keepers = new Map<string, Keeper>()
  /** Those that are not. */
  readonly absent: AbsentRuns

  constructor(means: ArchiveMeans) {
    this.#means = means
    this.absent = new AbsentRuns(means.data.names)
  }

  keeper(name: string): Keeper {
    const keeper = this.#keepers.get(name)
    assert(keeper, 'a run in memory has its store')
    return keeper
  }

  /**
   * Gives a new run its place, and a first checkpoint: from here on it is never lost without a word. Notes that it
   * was opened.
   */
  async create(run: Run): Promise<void> {
    const store = await this.#means.data.create(run.name).catch((error) => {
      throw this.#failed(run.name, error)
    })
    try {
      const keeper = this.#adopt(run, store)
      await this.#openJournal(run, store)
      await keeper.take()
      await this.opened(run)
    } catch (error) {
      await this.#forget(run)
      await this.#means.data.destroy(run.name).catch((again) => this.#warn('run_left_behind', run.name, again))
      throw this.#failed(run.name, error)
    }
  }

  /** Notes an `open` before it is answered. */
  async opened(run: Run): Promise<void> {
    await this.#note(run, { epoch: run.epoch + 1 })
  }

  /**
   * Notes the groups that an `open` gives, before they hold: from the step in progress on if nothing was applied for
   * it.
   */
  async replaced(run: Run, groups: Groups): Promise<void> {
    const [given, before] = [groups, run.groupsBefore].map(groupRecords)
    const { step } = run
    const replacement = run.ahead.length === 0 ? { step, groups: given } : { step, groups: before, later: given }
    await this.#note(run, { replacement })
  }

  /**
   * Restores a run from its newest checkpoint and the journal behind it, or as it was at another checkpoint: that
   * changes nothing on the disk yet, see `goBack`. Undefined: its making was interrupted, and it is gone. Throws
   * CHECKPOINT_UNREADABLE and OVER_CAPACITY, and leaves nothing behind.
   */
  load(name: string, checkpoint?: string): Promise<Run | undefined> {
    return this.absent.reading(name, async () => {
      const store = await this.#find(name)
      const entry = checkpoint === undefined ? store.newest : findCheckpoint(store, name, checkpoint)
      if (!entry) return this.#unfinished(store, name)
      const run = await this.#restore(store, entry, checkpoint === undefined)
      this.absent.leave(name)
      return run
    })
  }

  /** Finds out what there is to know of a run for which there is no room in memory. */
  describe(name: string): Promise<undefined> {
    return this.absent.reading(name, async () => {
      const store = await this.#find(name)
      /* c8 ignore next -- its first checkpoint was cut off by a crash, and there is no room to find out more */
      if (!store.newest) return this.#unfinished(store, name)
      this.absent.rest(idleOnDisk(await store.manifest(store.newest), store.identity))
    })
  }

  /** A run that no connection has leaves memory; answers the step that it comes back at. */
  async rest(run: Run): Promise<number> {
    const { newest } = this.keeper(run.name).store
    assert(newest, 'a run has a checkpoint from its creation on')
    const idle = idleRun(run, run.journal ? run : newest)
    await this.#forget(run).finally(() => this.absent.rest(idle))
    return idle.step
  }

  /** Reads a checkpoint of a run that is in memory. */
  async fetch(run: Run, checkpoint: string): Promise<Kept> {
    const keeper = this.keeper(run.name)
    const { store } = keeper
    try {
      // Nothing may remove its files meanwhile.
      return await keeper.alone(async () => {
        const entry = findCheckpoint(store, run.name, checkpoint)
        return readKept(this.#means.device, run, { store, entry, manifest: await store.manifest(entry) })
      })
    } catch (error) {
      throw unreadable(run.name, error)
    }
  }

  /**
   * Makes a run that begins with the state of a checkpoint of another run, in memory or not, and gives it its place.
   * `agree` holds what its `open` declares against that, and answers the groups that it gives, if any. Throws
   * NOT_FOUND, CHECKPOINT_UNREADABLE, what `agree` throws, and as `create`.
   */
  async branch(name: string, from: Source, agree: (run: Run) => Promise<Groups | undefined>): Promise<Run> {
    const keeper = this.#keepers.get(from.run)
    const copy = (store: RunStore) => copyOf(this.#means, name, { store, from, agree })
    // Nothing may remove the checkpoint's files meanwhile.
    const run = keeper
      ? await keeper.alone(() => copy(keeper.store))
      : await ofRun(from.run, this.#find(from.run)).then(copy)
    await this.create(run).catch((error) => {
      run.dispose()
      throw error
    })
    return run
  }

  /**
   * Puts a run where a checkpoint is: there is `kept` of it, or the run is there already. What came after the
   * checkpoint is dropped from the disk, but for what has a tag.
   */
  goBack(run: Run, checkpoint: string, kept?: Kept): Promise<void> {
    const keeper = this.keeper(run.name)
    const { store } = keeper
    return keeper
      .alone(async () => {
        await run.closeJournal()
        await store.goBack(findCheckpoint(store, run.name, checkpoint))
        if (kept) takeKept(this.#means.device, run, kept)
        await this.#sweep(store, run.name)
        await this.#openJournal(run, store)
      })
      .catch((error) => {
        throw this.#failed(run.name, error)
      })
  }

  /** Takes a checkpoint of every run that has come further than its last one and is between two steps. */
  async checkpointAll(): Promise<void> {
    const keepers = [...this.#keepers.values()]
    await Promise.all(
      keepers.map((keeper) =>
        keeper.take().catch((error) => this.#warn('checkpoint_failed', keeper.store.path, error)),
      ),
    )
  }

  /** Removes a run from the disk. */
  async remove(name: string, run?: Run): Promise<void> {
    if (run) await this.#forget(run)
    this.absent.wait(name)
    await this.#means.data.destroy(name).catch((error) => {
      throw this.#failed(name, error)
    })
    this.absent.leave(name)
  }

  /** A run that is not in memory any more: it can be loaded again. */
  async evict(run: Run): Promise<void> {
    await this.#forget(run)
    this.absent.wait(run.name)
  }

  /** When everything that was begun is on the disk. */
  async close(runs: Iterable<Run>): Promise<void> {
    for (const keeper of this.#keepers.values()) await keeper.settled()
    for (const run of runs) await run.closeJournal()
  }

  async #find(name: string): Promise<RunStore> {
    const store = await this.#means.data.find(name)
    await this.#sweep(store, name)
    return store
  }

  // What is left over takes room and nothing else: the next start tries again.
  async #sweep(store: RunStore, name: string): Promise<void> {
    await store.sweep().catch((error) => this.#warn('tidy_failed', name, error))
  }

  async #note(run: Run, change: { epoch: number } | { replacement: Replacement }): Promise<void> {
    await this.keeper(run.name)
      .store.identify(change)
      .catch((error) => {
        throw this.#failed(run.name, error)
      })
  }

  /** What has no checkpoint: its `open` was never answered, unless there are steps. */
  async #unfinished(store: RunStore, name: string): Promise<undefined> {
    if (await store.hasSteps())
      throw new UnreadableError(`${store.path} has a journal and no checkpoint that it goes on from`)
    this.#means.log.info({ event: 'unfinished_run_removed', run: name })
    await this.#means.data.destroy(name)
    this.absent.leave(name)
    return undefined
  }

  async #restore(store: RunStore, entry: CheckpointEntry, withJournal: boolean): Promise<Run> {
    const started = performance.now()
    if (entry.problem) throw new UnreadableError(entry.problem)
    const manifest = await store.manifest(entry)
    const run = await this.#means.build(manifest.run, keptDeclaration(manifest), manifest.created_at)
    try {
      const { device } = this.#means
      const { elsewhere } = takeKept(device, run, await readKept(device, run, { store, entry, manifest }))
      const steps = withJournal ? await replayJournal(this.#means, run, { store, manifest, elsewhere }) : 0
      run.continueEpoch(store.identity.epoch)
      if (withJournal) await replaceGroups(run, store)
      const keeper = this.#adopt(run, store)
      // Without, the journal has steps that are dropped only once nothing is refused any more.
      if (withJournal) await this.#openJournal(run, store)
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

  #adopt(run: Run, store: RunStore): Keeper {
    const keeper = new Keeper(run, store, this.#means)
    this.#keepers.set(run.name, keeper)
    return keeper
  }

  async #openJournal(run: Run, store: RunStore): Promise<void> {
    if (this.#means.config.durability !== 'journal') return
    const checkpointed = store.newest?.step ?? 0
    const what = `the journal of run '${run.name}'`
    run.useJournal(await store.openJournal({ first: run.step + 1, what, checkpointed }))
  }

  // The service has no journal any more, the run had one: its steps go into a checkpoint.
  async #leaveJournal(keeper: Keeper): Promise<void> {
    await keeper.take()
    await keeper.store.clearJournal()
  }

  async #forget(run: Run): Promise<void> {
    await this.#keepers.get(run.name)?.settled()
    this.#keepers.delete(run.name)
    await run.closeJournal()
  }

  #failed(name: string, error: unknown): ServiceError {
    if (error instanceof ServiceError) return error
    const what =
      error instanceof StoreError ? `run '${name}' cannot be kept` : `the folder of run '${name}' cannot be written`
    return new ServiceError('STORAGE_FAILED', `${what}: ${errorText(error)}`)
  }

  #warn(event: string, run: string, error: unknown): void {
    this.#means.log.warn({ event, run, reason: errorText(error) })
  }
}

/**
 * Replaces what no step has been computed with yet of the groups that a connection gave. Those that were given at
 * another step are in the checkpoint, or of steps that are lost: they are forgotten.
 */
async function replaceGroups(run: Run, store: RunStore): Promise<void> {
  const { replacement } = store.identity
  if (replacement === undefined) return
  const { step, groups, later } = replacement
  if (step !== run.step && step + 1 !== run.step) return store.identify({ replacement: undefined })
  if (step === run.step) run.replaceGroups(groupsOf(groups), 'this')
  if (later) run.replaceGroups(groupsOf(later), step < run.step ? 'this' : 'next')
}
