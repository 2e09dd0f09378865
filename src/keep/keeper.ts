import { type Config, VERSION } from '../config.js'
import type { Device } from '../device/device.js'
import { errorText, ServiceError } from '../errors.js'
import type { Metrics } from '../metrics.js'
import type { Parameter } from '../optimizer/parameter.js'
import type { PendingImport } from '../run/imported-state.js'
import type { Run } from '../run/run.js'
import { inSlices } from '../run/slices.js'
import type { Snapshot } from '../run/snapshot.js'
import type { CheckpointEntry } from '../store/checkpoint/checkpoint-list.js'
import type { RunRecord } from '../store/checkpoint/manifest.js'
import { tagRule } from '../store/checkpoint/manifest-rules.js'
import type { StateEntry } from '../store/checkpoint/state-files.js'
import { stateName } from '../store/checkpoint/state-source.js'
import type { RunStore } from '../store/run-store.js'
import { SAFETENSORS_NAMES } from '../store/safetensors.js'

/** Where events are logged. */
export type Log = Record<'info' | 'warn' | 'error', (event: { event: string; [field: string]: unknown }) => void>

export type KeeperMeans = {
  device: Device
  metrics: Metrics
  log: Log
  config: Pick<
    Config,
    'checkpoint_steps' | 'checkpoints_kept' | 'checkpoint_file_bytes' | 'journal_bytes' | 'keep_journal'
  >
}

/**
 * Decides when a run's checkpoints are taken, and has them written while the next steps go on: the state is
 * immutable, so a checkpoint is a list of references. One at a time, so that at most one older state is held.
 */
export class Keeper {
  readonly store: RunStore
  readonly #run: Run
  readonly #means: KeeperMeans
  #writing: Promise<unknown> | undefined
  /** A checkpoint is to be taken as soon as none is being written. */
  #due = false

  constructor(run: Run, store: RunStore, means: KeeperMeans) {
    this.#run = run
    this.store = store
    this.#means = means
    run.on('receipt', () => this.#finished())
  }

  /** Whether what a checkpoint would hold is on the disk already. */
  get upToDate(): boolean {
    const { newest } = this.store
    return newest !== undefined && newest.step === this.#run.step && newest.digest === this.#run.digest
  }

  /** Takes a checkpoint as `begin` does and resolves when it is on the disk. */
  async take(tag?: string): Promise<CheckpointEntry> {
    return (await this.begin(tag)).written
  }

  /**
   * Begins a checkpoint of the last finished step. Call it between two steps; it resolves when the next one may
   * begin, which is at once unless an older checkpoint is still being written. `written` rejects with STORAGE_FAILED.
   * Throws STEP_INCOMPLETE where a step has begun.
   */
  async begin(tag?: string): Promise<{ written: Promise<CheckpointEntry> }> {
    // Looked at again here, not in a function that is awaited: of several that wait only one finds it free.
    while (this.#writing) await this.settled()
    this.#run.checkPresent()
    const { newest } = this.store
    if (newest && this.upToDate)
      return { written: tag === undefined ? Promise.resolve(newest) : this.#occupy(this.#tag(newest, tag)) }
    this.#run.checkBetween('a checkpoint is taken between two steps')
    return { written: this.#occupy(this.#write(tag === undefined ? [] : [tag])) }
  }

  /**
   * Has the run go on from an import once that is on the disk, so that a crash leaves either all of it or nothing.
   * Call it while the run is held between two steps. Rejects with STORAGE_FAILED, and nothing was imported.
   */
  async import(pending: PendingImport): Promise<CheckpointEntry> {
    while (this.#writing) await this.settled()
    return this.#occupy(this.#write([], pending))
  }

  /** Does something that no checkpoint may be taken or removed beside. */
  async alone<T>(work: () => Promise<T>): Promise<T> {
    while (this.#writing) await this.settled()
    this.#run.checkPresent()
    return this.#occupy(work())
  }

  /** Removes a checkpoint. Throws PARAMETER_INVALID for the newest one, from which the run goes on after a restart. */
  remove(entry: CheckpointEntry): Promise<void> {
    return this.alone(async () => {
      const { checkpoint } = entry
      if (checkpoint === this.store.newest?.checkpoint) {
        const message = `checkpoint '${checkpoint}' is the newest of run '${this.#run.name}', from which it goes on after a restart`
        throw new ServiceError('PARAMETER_INVALID', message)
      }
      await this.store.remove(entry).catch((error) => {
        throw new ServiceError('STORAGE_FAILED', `checkpoint '${checkpoint}' cannot be removed: ${errorText(error)}`)
      })
    })
  }

  /** When nothing is being written. */
  async settled(): Promise<void> {
    while (this.#writing) await Promise.allSettled([this.#writing])
  }

  #finished(): void {
    const { checkpoint_steps, journal_bytes } = this.#means.config
    const { step, journal } = this.#run
    this.#due ||= checkpoint_steps > 0 && step % checkpoint_steps === 0
    this.#due ||= journal !== undefined && journal.bytes > journal_bytes
    this.#takeDue()
  }

  #takeDue(): void {
    const { name, step, begun } = this.#run
    if (this.#writing || !this.#due || begun) return
    this.#due = false
    this.take().catch((error) => {
      this.#means.log.warn({ event: 'checkpoint_failed', run: name, step, reason: errorText(error) })
    })
  }

  /** Nothing else begins until `work` has ended. */
  #occupy<T>(work: Promise<T>): Promise<T> {
    const done = work.finally(() => {
      this.#writing = undefined
      this.#takeDue()
    })
    this.#writing = done
    return done
  }

  async #write(tags: readonly string[], pending?: PendingImport): Promise<CheckpointEntry> {
    const started = performance.now()
    this.#due = false
    const { metrics, log } = this.#means
    const snapshot = this.#run.snapshot(pending)
    const { run, step } = snapshot.head
    // Before anything is awaited: what the next step appends belongs to the next segment.
    const rotated = this.#run.journal?.rotate(step + 1)
    const entry = await this.#writeFiles(snapshot, tags, rotated)
      .catch((error) => {
        metrics.checkpoint_failures_total.inc()
        throw this.#failed(step, error)
      })
      .finally(() => snapshot.release())
    if (pending) this.#run.takeOver(pending)
    await this.#tidy(entry, pending !== undefined)
    const seconds = (performance.now() - started) / 1000
    metrics.checkpoint_seconds.observe(seconds)
    metrics.checkpoint_bytes_total.inc(entry.bytes)
    const { checkpoint, bytes } = entry
    log.info({ event: 'checkpoint_written', run, checkpoint, bytes, seconds })
    return entry
  }

  /** Each tensor is given back once it was written. */
  async #writeFiles(
    snapshot: Snapshot,
    tags: readonly string[],
    rotated: Promise<void> | undefined,
  ): Promise<CheckpointEntry> {
    await rotated
    const { device, config } = this.#means
    const { record, entries } = await inSlices(describing(snapshot))
    const counts = entries.length - snapshot.tensors.length
    const { record: signature, locations } = device
    return this.store.write(
      {
        ...{ tags, server: VERSION, device: signature, record, entries, locations },
        file_bytes: config.checkpoint_file_bytes,
      },
      (written) => snapshot.releaseFirst(written - counts),
    )
  }

  // What is left over takes room and nothing else: the checkpoint is whole, and the next one tries again.
  async #tidy({ step }: CheckpointEntry, isImport: boolean): Promise<void> {
    const { checkpoints_kept, keep_journal } = this.#means.config
    try {
      await this.store.retain(checkpoints_kept)
      // No step before an import leads to the state behind it: nobody can replay past it.
      const until = keep_journal && !isImport ? this.store.history[0].step : step
      await this.#run.journal?.drop(step, until)
    } catch (error) {
      this.#means.log.warn({ event: 'tidy_failed', run: this.#run.name, reason: errorText(error) })
    }
  }

  async #tag(entry: CheckpointEntry, tag: string): Promise<CheckpointEntry> {
    try {
      return await this.store.tag(entry, tag)
    } catch (error) {
      throw this.#failed(entry.step, error)
    }
  }

  #failed(step: number, error: unknown): ServiceError {
    return new ServiceError(
      'STORAGE_FAILED',
      `the checkpoint of run '${this.#run.name}' at step ${step} cannot be written: ${errorText(error)}`,
      { step },
    )
  }
}

const COUNT_BYTES = BigInt64Array.BYTES_PER_ELEMENT

/**
 * The record of a checkpoint and its tensors. The step counts come first: 8 bytes each keep every tensor behind them
 * aligned. Names are those of torch's flattened optimizer state.
 */
function* describing(snapshot: Snapshot): Generator<undefined, { record: RunRecord; entries: StateEntry[] }> {
  const { record, tensors } = yield* snapshot.describing()
  const entries: StateEntry[] = []
  let before: Parameter | undefined
  for (const { parameter, count } of tensors) {
    if (parameter === before) continue
    before = parameter
    const inline = new Uint8Array(BigInt64Array.of(BigInt(count)).buffer, 0, COUNT_BYTES)
    entries.push({ name: stateName(parameter.name, 'step'), dtype: 'I64', shape: [], inline })
    yield
  }
  for (const { parameter, name, dtype, shape, tensor } of tensors) {
    const { unit, pointer, bytes } = tensor
    const placed = { unit, pointer, bytes }
    entries.push({ name: stateName(parameter.name, name), dtype: SAFETENSORS_NAMES[dtype], shape, placed })
    yield
  }
  return { record, entries }
}

/** Refuses a tag that is empty, too long or would name another checkpoint's id. Throws PARAMETER_INVALID. */
export function checkTag(tag: string | undefined): string | undefined {
  const problem = tag === undefined ? undefined : tagRule.problem(tag, 'tag')
  if (problem === undefined) return tag
  throw new ServiceError('PARAMETER_INVALID', problem)
}
