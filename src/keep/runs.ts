import { constants } from 'node:buffer'
import type { Config } from '../config.js'
import type { Grant } from '../device/admission.js'
import type { Device } from '../device/device.js'
import { ServiceError } from '../errors.js'
import type { Metrics } from '../metrics.js'
import { rowScaleBytes } from '../optimizer/attention.js'
import type { Parameter } from '../optimizer/parameter.js'
import type { Presets } from '../optimizer/preset.js'
import { type Declaration, declarationOf, refuseUnsupported } from '../run/declaration.js'
import type { ImportedState } from '../run/imported-state.js'
import { Run } from '../run/run.js'
import { inSlices } from '../run/slices.js'
import type { Connection, Member } from '../run/step/member.js'
import type { DataFolder } from '../store/data-folder.js'
import type { OpenFrame } from '../wire/frame.js'
import { Archive, type Kept } from './archive.js'
import type { Keeper, Log } from './keeper.js'
import { measure } from './measured.js'
import { checkFree, checkSame, demandsOf } from './opening.js'
import { pendingImport } from './receive-state.js'
import { Turns } from './turns.js'

// Of one view of memory.
const { MAX_LENGTH } = constants

/** The run that an `open` gave, the connection's place in it, and whether the run existed before. */
export type Opened = { run: Run; member: Member; resumed: boolean }

/** What runs live on; without `data` their state ends with the process. */
export type RunsMeans = {
  device: Device
  config: Config
  presets: Presets
  metrics: Metrics
  log: Log
  data: DataFolder | undefined
}

/** After which step a run goes on from imported state, with which digest, and the checkpoint that has it. */
export type Imported = { step: number; digest: string; checkpoint?: string }

/** The table of runs: it creates, finds, restores, hands over and deletes them, within the limits of the settings. */
export class Runs {
  draining = false
  #restoring: Promise<void> | undefined
  readonly #device: Device
  readonly #config: Config
  readonly #presets: Presets
  readonly #metrics: Metrics
  readonly #log: Log
  readonly #archive: Archive | undefined
  #runs = new Map<string, Run>()
  /** Runs that wait for their kernels: they count as runs already. */
  #creating = 0
  readonly #turns = new Turns()
  readonly #imports = new Map<Run, Promise<unknown>>()
  readonly #closing = new AbortController()

  constructor(means: RunsMeans) {
    const { device, config, presets, metrics, data, log } = means
    this.#device = device
    this.#config = config
    this.#presets = presets
    this.#metrics = metrics
    this.#log = log
    const build: Runs['build'] = (...of) => this.build(...of)
    this.#archive = data && new Archive({ ...means, data, build })
    device.onFailure = () => this.#expelAll()
  }

  list(): Run[] {
    return [...this.#runs.values()]
  }

  /** Runs on the disk that are not in memory, each with the reason; empty where it waits to be restored. */
  get stored(): ReadonlyMap<string, string> {
    return this.#archive?.stored ?? new Map()
  }

  get(name: string): Run {
    const run = this.#runs.get(name)
    if (run) return run
    throw this.#notFound(name)
  }

  /** Why a run cannot be had. */
  #notFound(name: string): ServiceError {
    const problem = this.stored.get(name)
    if (problem === '') return new ServiceError('RESTORING', `run '${name}' waits to be restored`)
    if (problem) return new ServiceError('CHECKPOINT_UNREADABLE', problem)
    return new ServiceError('RUN_NOT_FOUND', `there is no run '${name}'`)
  }

  /** What takes a run's checkpoints. Throws RUN_NOT_FOUND, and PARAMETER_INVALID where nothing is kept. */
  keeper(name: string): Keeper {
    const { name: known } = this.get(name)
    if (this.#archive) return this.#archive.keeper(known)
    throw new ServiceError(
      'PARAMETER_INVALID',
      'this service keeps no checkpoints: it was started without a data folder',
    )
  }

  /** The last step of a run that a crash leaves. */
  durableStep(run: Run): number {
    if (run.journal) return run.step
    return this.#archive?.keeper(run.name).folder.newest?.step ?? 0
  }

  /** Whether runs on the disk are still to be restored. */
  get restoring(): boolean {
    return this.#restoring !== undefined
  }

  /** Restores every run on the disk, one after the other; one that cannot be restored keeps no other from it. */
  restore(): Promise<void> {
    this.#restoring = this.#restoreAll().finally(() => {
      this.#restoring = undefined
    })
    return this.#restoring
  }

  /** Opens a run for a connection. Calls for one name are served one after the other, in their order. */
  open(frame: OpenFrame, connection: Connection): Promise<Opened> {
    return this.#turns.take(frame.run, () => this.#open(frame, connection))
  }

  /** Deletes a run with its state and checkpoints; its connection is closed. */
  delete(name: string): Promise<void> {
    return this.#turns.take(name, async () => {
      const run = this.#runs.get(name)
      if (!run && !this.stored.has(name)) this.get(name)
      this.#runs.delete(name)
      run?.expel(new ServiceError('RUN_NOT_FOUND', `run '${name}' was deleted`, { close: 1008 }))
      await run?.settled()
      try {
        await this.#archive?.remove(name, run)
      } finally {
        run?.dispose()
      }
    })
  }

  /** Admits a run and makes the device ready for it. */
  async build(name: string, declaration: Declaration, created_at?: string): Promise<Run> {
    const runs = this.#runs.size + this.#creating
    if (runs >= this.#config.max_runs) {
      const remedy = 'delete one (DELETE /v1/runs/{run}), or start the service with a larger --max-runs'
      throw new ServiceError(
        'OVER_CAPACITY',
        `the service holds ${runs} runs, at most ${this.#config.max_runs}: ${remedy}`,
      )
    }
    this.#checkSizes(declaration.parameters)
    this.#creating += 1
    try {
      const grant = await this.#admit(name, declaration)
      return new Run(this.#device, { name, created_at, ...declaration, grant, receipts: this.#config })
    } finally {
      this.#creating -= 1
    }
  }

  async #admit(name: string, { groups, parameters, attentions }: Declaration): Promise<Grant> {
    // A slow reader may leave the row scales with their update.
    const scales = rowScaleBytes(attentions, parameters)
    const held = this.#archive !== undefined
    const demands = await inSlices(demandsOf(parameters, { groups, scales, held }))
    const grant = this.#device.admit(demands, `run '${name}'`)
    await this.#device.load(demands).catch((error) => {
      this.#device.dismiss(grant)
      throw error
    })
    return grant
  }

  /**
   * Does the `work` of an import into a run, one at a time. Throws DRAINING, and RUN_BUSY where another one is under
   * way. A shutdown waits for it.
   */
  async import<T>(run: Run, work: () => Promise<T>): Promise<T> {
    if (this.draining) throw new ServiceError('DRAINING', 'the service shuts down and imports nothing')
    if (this.#imports.has(run))
      throw new ServiceError('RUN_BUSY', `state is being imported into run '${run.name}' already`)
    const importing = work()
    this.#imports.set(run, importing)
    try {
      return await importing
    } finally {
      this.#imports.delete(run)
    }
  }

  /**
   * Has a run go on from state that was received for it, once that is on the disk where there is one; answers where
   * it goes on. Throws STEP_INCOMPLETE where a step has begun, STORAGE_FAILED, and RUN_NOT_FOUND where the run is
   * gone.
   */
  takeOver(run: Run, state: ImportedState): Promise<Imported> {
    return this.#turns.take(run.name, async () => {
      if (this.#runs.get(run.name) !== run)
        throw new ServiceError('RUN_NOT_FOUND', `run '${run.name}' was deleted while its state was received`)
      return run.boundary.between('state is imported between two steps', async () => {
        const pending = await pendingImport(this.#device, run, state)
        const { step } = run
        const { digest } = pending
        if (!this.#archive) {
          run.takeOver(pending)
          return { step, digest }
        }
        const { checkpoint } = await this.#archive.keeper(run.name).import(pending)
        return { step, digest, checkpoint }
      })
    })
  }

  /** Aborted when the service shuts down. */
  get closing(): AbortSignal {
    return this.#closing.signal
  }

  /** Has what is not on the disk yet taken there, for a shutdown. */
  async checkpoint(): Promise<void> {
    await this.#archive?.checkpointAll()
  }

  /** When everything that was begun is on the disk. No run has a connection any more. */
  async close(): Promise<void> {
    this.draining = true
    this.#closing.abort()
    await this.#restoring
    await Promise.allSettled(this.#imports.values())
    for (const run of this.list()) await run.settled()
    await this.#archive?.close(this.list())
  }

  async #restoreAll(): Promise<void> {
    for (const name of [...this.stored.keys()]) {
      if (this.draining) return
      await this.#turns
        .take(name, () => this.#find(name))
        .catch((error) => {
          this.#log.error({ event: 'run_unreadable', run: name, reason: String(error) })
        })
    }
  }

  async #open(frame: OpenFrame, connection: Connection): Promise<Opened> {
    const { run: name, mode, checkpoint } = frame
    refuseUnsupported(frame, this.#archive !== undefined)
    if (this.draining) throw new ServiceError('DRAINING', 'the service shuts down and opens no run')
    // The runs are not gone: a service that is started again has those that are on the disk.
    if (this.#device.failed) throw this.#deviceFailure()
    if (checkpoint !== undefined) return this.#goBack(frame, checkpoint, connection)
    const exists = this.#runs.has(name) || this.stored.has(name)
    if (exists && mode === 'create') throw new ServiceError('RUN_EXISTS', `run '${name}' exists`)
    const known = await this.#find(name)
    if (!known && mode === 'resume') this.get(name)
    if (known) return this.#resume(known, frame, connection)
    return this.#create(frame, connection)
  }

  async #find(name: string): Promise<Run | undefined> {
    const known = this.#runs.get(name)
    if (known) return known
    const restored = await this.#archive?.load(name)
    if (restored) this.#enter(restored)
    return restored
  }

  /** From here on a run is known by its name, and its steps are counted. */
  #enter(run: Run): void {
    this.#runs.set(run.name, run)
    measure(run, this.#metrics)
  }

  async #resume(run: Run, frame: OpenFrame, connection: Connection, kept?: Kept): Promise<Opened> {
    checkFree(run, frame)
    const groups = await checkSame(run, frame, this.#presets)
    await this.#archive?.opened(run)
    const member = await run.attach(connection)
    const opened = { run, member, resumed: true }
    if (kept) await this.#takeBack(run, member, kept)
    if (!groups) return opened
    await this.#archive?.replaced(run, groups).catch((error) => {
      run.detach(member)
      throw error
    })
    run.replaceGroups(groups)
    return opened
  }

  /** Opens a run as it was at one of its checkpoints, once nothing can be refused any more. */
  async #goBack(frame: OpenFrame, checkpoint: string, connection: Connection): Promise<Opened> {
    const { run: name } = frame
    const archive = this.#archive
    const known = this.#runs.get(name)
    if (!archive || !known) return this.#loadBack(frame, checkpoint, connection)
    checkFree(known, frame)
    await checkSame(known, frame, this.#presets)
    const kept = await archive.fetch(known, checkpoint)
    try {
      return await this.#resume(known, frame, connection, kept)
    } finally {
      archive.release(kept)
    }
  }

  /** The same for a run that is on the disk only: its newest checkpoint may be the one that cannot be read. */
  async #loadBack(frame: OpenFrame, checkpoint: string, connection: Connection): Promise<Opened> {
    const run = await this.#archive?.load(frame.run, checkpoint)
    if (!run) throw this.#notFound(frame.run)
    try {
      await checkSame(run, frame, this.#presets)
      await this.#archive?.goBack(run)
    } catch (error) {
      await this.#drop(run)
      throw error
    }
    this.#enter(run)
    return this.#resume(run, frame, connection)
  }

  // What is half gone from the disk is read from there again.
  async #takeBack(run: Run, member: Member, kept: Kept): Promise<void> {
    try {
      await this.#archive?.goBack(run, kept)
    } catch (error) {
      run.detach(member)
      await this.#drop(run)
      throw error
    }
  }

  /** Lets a run go that is on the disk: the next `open` restores it. */
  async #drop(run: Run): Promise<void> {
    this.#runs.delete(run.name)
    await this.#archive?.evict(run)
    run.dispose()
  }

  async #create(frame: OpenFrame, connection: Connection): Promise<Opened> {
    const run = await this.build(frame.run, await inSlices(declarationOf(frame, this.#presets)))
    try {
      await this.#archive?.create(run)
    } catch (error) {
      run.dispose()
      throw error
    }
    this.#enter(run)
    return { run, member: await run.attach(connection), resumed: false }
  }

  #checkSizes(parameters: readonly Parameter[]): void {
    const { max_parameters } = this.#config
    const { length } = parameters
    if (length > max_parameters)
      throw new ServiceError('OVER_CAPACITY', `a run holds at most ${max_parameters} parameters, given are ${length}`)
    const large = parameters.find((parameter) => largestTensor(parameter) > MAX_LENGTH)
    if (large === undefined) return
    const message = `parameter '${large.name}' has tensors of ${largestTensor(large)} bytes, node ${process.version} reaches ${MAX_LENGTH}: run the service on a newer one`
    throw new ServiceError('OVER_CAPACITY', message, { parameter: large.index })
  }

  #expelAll(): void {
    const error = this.#deviceFailure({ close: 1011 })
    for (const run of this.#runs.values()) run.expel(error)
    this.#runs.clear()
  }

  #deviceFailure(fields: { close?: number } = {}): ServiceError {
    const { backend, failed } = this.#device
    return new ServiceError('DEVICE_FAILED', `the device ${backend.name} has failed: ${failed?.message}`, fields)
  }
}

/** The bytes of the largest tensor of a parameter that travels. */
function largestTensor({ gradient_bytes, update_bytes }: Parameter): number {
  return Math.max(gradient_bytes, update_bytes)
}
