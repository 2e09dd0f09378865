import type { Principal } from '../access/principal.js'
import { RunQuotas } from '../access/quotas.js'
import type { Config } from '../config.js'
import type { Grant } from '../device/admission.js'
import type { Device } from '../device/device.js'
import { ServiceError } from '../errors.js'
import type { Metrics } from '../metrics.js'
import { rowScaleBytes } from '../optimizer/attention.js'
import type { Presets } from '../optimizer/preset.js'
import { type Declaration, declarationOf, refuseUnsupported } from '../run/declaration.js'
import type { ImportedState } from '../run/imported-state.js'
import type { Connection, Member } from '../run/members/member.js'
import { Run } from '../run/run.js'
import { inSlices } from '../run/slices.js'
import type { DataStore } from '../store/data-store.js'
import type { OpenFrame, Source } from '../wire/frame.js'
import { notFound } from './absent.js'
import { Archive } from './archive.js'
import type { IdleRun } from './idle.js'
import { type Imported, Imports } from './importing/imports.js'
import type { Keeper, Log } from './keeper.js'
import { type Kept, releaseKept } from './kept.js'
import {
  checkFree,
  checkSame,
  checkSizes,
  demandsOf,
  findingPlace,
  isFresh,
  mayJoin,
  type Opener,
  type Place,
  reserve,
  sizeOf,
  sizesOf,
  UNKNOWN_SIZE,
} from './opening.js'
import { Residents } from './residents.js'
import { Turns } from './turns.js'

/** The run that an `open` gave, the connection's place in it, and whether the run existed before. */
export type Opened = { run: Run; member: Member; resumed: boolean }

/** What runs live on; without `data` their state ends with the process. */
export type RunsMeans = {
  device: Device
  config: Config
  presets: Presets
  metrics: Metrics
  /** Hears of every run that comes to memory. */
  watch?: (run: Run) => void
  log: Log
  data: DataStore | undefined
}

/** The table of runs: it creates, finds, restores, hands over and deletes them, within the limits of the settings. */
export class Runs {
  draining = false
  #restoring: Promise<void> | undefined
  readonly #device: Device
  readonly #config: Config
  readonly #presets: Presets
  readonly #log: Log
  readonly #archive: Archive | undefined
  readonly #residents: Residents
  /** The runs that a start is about to bring back. */
  readonly #starting = new Set<string>()
  readonly #turns = new Turns()
  /** What runs take of the quotas of keys, also those on the disk. */
  readonly quotas = new RunQuotas(() => sizesOf(this))
  readonly #imports: Imports
  readonly #closing = new AbortController()

  constructor(means: RunsMeans) {
    const { device, config, presets, data, log } = means
    this.#device = device
    this.#config = config
    this.#presets = presets
    this.#log = log
    const build: Runs['build'] = (...of) => this.build(...of)
    this.#archive = data && new Archive({ ...means, data, build })
    device.onFailure = () => this.#expelAll()
    this.#imports = new Imports(device, this.#archive)
    const [archive, turns] = [this.#archive, this.#turns]
    this.#residents = new Residents({ ...means, archive, turns, isNeeded: (run) => this.#imports.has(run) })
  }

  list(): Run[] {
    return this.#residents.list()
  }

  /** Runs on the disk that are to be restored, each with the reason why they are not; empty where one waits for it. */
  get stored(): ReadonlyMap<string, string> {
    return this.#archive?.absent.stored ?? new Map()
  }

  /** Runs on the disk that nobody uses: they take no memory until somebody does. */
  get idle(): ReadonlyMap<string, IdleRun> {
    return this.#archive?.absent.idle ?? new Map()
  }

  /** Whether there is a run of this name, in memory or on the disk. */
  has(name: string): boolean {
    return this.#residents.get(name) !== undefined || (this.#archive?.absent.has(name) ?? false)
  }

  get(name: string): Run {
    const run = this.#residents.get(name)
    if (run) return run
    throw this.#notFound(name)
  }

  /** A run in memory, which an idle one is brought back to first. Throws as `get`, OVER_CAPACITY and DRAINING. */
  async wake(name: string): Promise<Run> {
    if (!this.idle.has(name)) return this.get(name)
    if (this.draining) throw new ServiceError('DRAINING', 'the service shuts down and brings no run back to memory')
    /* c8 ignore next -- it may be deleted while others have their turn, and `get` says so */
    return this.#turns.take(name, async () => (await this.#find(name)) ?? this.get(name))
  }

  /** Why a run cannot be had. */
  #notFound(name: string): ServiceError {
    return this.#archive?.absent.notInMemory(name) ?? this.absent(name)
  }

  /** What is told of a run that does not exist, and of one that is not for whoever asks. */
  absent(name: string): ServiceError {
    return notFound(name, this.#archive ? 0 : this.#config.idle_seconds)
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
    return this.#archive?.keeper(run.name).store.newest?.step ?? 0
  }

  /** Has the runs leave memory that no connection has had for `idle_seconds`; `now` is as `performance.now` counts. */
  restIdle(now?: number): Promise<void> {
    return this.#residents.restIdle(now)
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

  /** Opens a run for a connection, within the quotas of a principal. Calls for one name are served in their order. */
  open(frame: OpenFrame, connection: Connection, principal?: Principal): Promise<Opened> {
    const names = frame.from ? [frame.run, frame.from.run] : [frame.run]
    return this.#turns.takeAll(names, () => this.#open(frame, { connection, principal }))
  }

  /** Deletes a run with its state and checkpoints; its connection is closed. */
  delete(name: string): Promise<void> {
    return this.#turns.take(name, async () => {
      const run = this.#residents.get(name)
      if (!run && !this.#archive?.absent.has(name)) this.get(name)
      this.#residents.leave(name)
      run?.intake.expel(new ServiceError('RUN_NOT_FOUND', `run '${name}' was deleted`, { close: 1008 }))
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
    checkSizes(declaration.parameters, this.#config)
    const grant = await this.#admit(name, declaration)
    return new Run(this.#device, { name, created_at, ...declaration, grant, receipts: this.#config })
  }

  async #admit(name: string, { groups, parameters, attentions }: Declaration): Promise<Grant> {
    // A slow reader may leave the row scales with their update.
    const scales = rowScaleBytes(attentions, parameters)
    const held = this.#archive !== undefined
    const demands = await inSlices(demandsOf(parameters, { groups, scales, held }))
    const what = `run '${name}'`
    const admit = () => this.#device.admit(demands, what)
    const grant = this.#starting.has(name)
      ? admit()
      : await this.#residents.admit(admit, (leaving) => this.#device.checkAdmission(leaving, demands, what))
    await this.#device.load(demands).catch((error) => {
      this.#device.dismiss(grant)
      throw error
    })
    return grant
  }

  /** As `Imports.import`. Throws DRAINING, too. */
  import<T>(run: Run, work: () => Promise<T>): Promise<T> {
    if (this.draining) throw new ServiceError('DRAINING', 'the service shuts down and imports nothing')
    return this.#imports.import(run, work)
  }

  /**
   * Has a run go on from state that was received for it, once that is on the disk where there is one; answers where
   * it goes on. Throws STEP_INCOMPLETE where a step has begun, STORAGE_FAILED, and RUN_NOT_FOUND where the run is
   * gone.
   */
  takeOver(run: Run, state: ImportedState): Promise<Imported> {
    return this.#turns.take(run.name, async () => {
      if (this.#residents.get(run.name) === run) return this.#imports.takeOver(run, state)
      throw new ServiceError('RUN_NOT_FOUND', `run '${run.name}' was deleted while its state was received`)
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
    await this.#residents.close()
    this.#closing.abort()
    await this.#restoring
    await this.#imports.settled()
    for (const run of this.list()) await run.settled()
    await this.#archive?.close(this.list())
  }

  async #restoreAll(): Promise<void> {
    for (const name of [...this.stored.keys()]) {
      if (this.draining) return
      await this.#turns
        .take(name, () => this.#restoreIfRoom(name))
        .catch((error) => {
          this.#log.error({ event: 'run_unreadable', run: name, reason: String(error) })
        })
    }
  }

  /** A start makes no room: of the runs that it would bring back one would only push the other out. */
  async #restoreIfRoom(name: string): Promise<void> {
    this.#starting.add(name)
    try {
      if (!this.#residents.isFull) await this.#find(name)
      if (!this.stored.has(name)) return
    } catch (error) {
      if (!(error instanceof ServiceError) || error.code !== 'OVER_CAPACITY') throw error
    } finally {
      this.#starting.delete(name)
    }
    await this.#archive?.describe(name)
    this.#log.info({ event: 'run_stays_on_disk', run: name })
  }

  async #open(frame: OpenFrame, opener: Opener): Promise<Opened> {
    const { run: name, mode, checkpoint, from } = frame
    refuseUnsupported(frame, this.#archive !== undefined)
    if (this.draining) throw new ServiceError('DRAINING', 'the service shuts down and opens no run')
    // The runs are not gone: a service that is started again has those that are on the disk.
    if (this.#device.failed) throw this.#deviceFailure()
    if (checkpoint !== undefined) return this.#goBack(frame, checkpoint, opener.connection)
    if (this.has(name) && (from || (mode === 'create' && !mayJoin(this.#residents.get(name), frame))))
      throw new ServiceError('RUN_EXISTS', `run '${name}' exists`)
    if (from) return this.#branch(frame, from, opener)
    const known = await this.#find(name)
    if (!known && mode === 'resume') this.get(name)
    if (known) return this.#resume(known, frame, opener.connection)
    return this.#create(frame, opener)
  }

  async #find(name: string): Promise<Run | undefined> {
    const known = this.#residents.get(name)
    const archive = this.#archive
    if (known || !archive?.absent.has(name)) return known
    return this.#residents.place(() => archive.load(name))
  }

  async #resume(run: Run, frame: OpenFrame, connection: Connection, kept?: Kept): Promise<Opened> {
    checkFree(run, frame)
    const groups = await checkSame(run, frame, this.#presets)
    const { seat, layout } = await inSlices(findingPlace(run, frame))
    // Of a run with members each one opens a run that exists, but for the first.
    const resumed = seat === undefined || !isFresh(run)
    await run.intake.prepare(layout)
    await this.#archive?.opened(run)
    const member = await run.attach(connection, seat, layout)
    const opened = { run, member, resumed }
    if (kept) await this.#takeBack(run, member, kept)
    if (!groups) return opened
    try {
      await this.#archive?.replaced(run, groups)
      run.replaceGroups(groups)
    } catch (error) {
      run.intake.detach(member)
      throw error
    }
    return opened
  }

  /** Opens a run as it was at one of its checkpoints, once nothing can be refused any more. */
  async #goBack(frame: OpenFrame, checkpoint: string, connection: Connection): Promise<Opened> {
    const { run: name } = frame
    const archive = this.#archive
    const known = this.#residents.get(name)
    if (!archive || !known) return this.#loadBack(frame, checkpoint, connection)
    checkFree(known, frame)
    if (known.intake.members.hasOthers(frame.member)) {
      const message = `checkpoint '${checkpoint}': other members have run '${name}', one of them goes back before the others open it`
      throw new ServiceError('RUN_BUSY', message)
    }
    await checkSame(known, frame, this.#presets)
    const kept = await archive.fetch(known, checkpoint)
    try {
      return await this.#resume(known, frame, connection, kept)
    } finally {
      releaseKept(this.#device, kept)
    }
  }

  /** The same for a run that is on the disk only: its newest checkpoint may be the one that cannot be read. */
  async #loadBack(frame: OpenFrame, checkpoint: string, connection: Connection): Promise<Opened> {
    const archive = this.#archive
    if (!archive?.absent.has(frame.run)) throw this.#notFound(frame.run)
    const run = await this.#residents.place(async () => {
      const loaded = await archive.load(frame.run, checkpoint)
      /* c8 ignore next -- it may be deleted while others have their turn */
      if (!loaded) throw this.#notFound(frame.run)
      try {
        await checkSame(loaded, frame, this.#presets)
        await archive.goBack(loaded, checkpoint)
        return loaded
      } catch (error) {
        await this.#drop(loaded)
        throw error
      }
    })
    return this.#resume(run, frame, connection)
  }

  // What is half gone from the disk is read from there again.
  async #takeBack(run: Run, member: Member, kept: Kept): Promise<void> {
    try {
      await this.#archive?.goBack(run, kept.manifest.checkpoint, kept)
    } catch (error) {
      run.intake.detach(member)
      await this.#drop(run)
      throw error
    }
  }

  /** Lets a run go that is on the disk: the next `open` restores it. */
  async #drop(run: Run): Promise<void> {
    this.#residents.leave(run.name)
    await this.#archive?.evict(run)
    run.dispose()
  }

  async #create(frame: OpenFrame, opener: Opener): Promise<Opened> {
    const declaration = await inSlices(declarationOf(frame, this.#presets))
    let place: Place | undefined
    const release = reserve(this.quotas, opener, sizeOf({ name: frame.run, ...declaration }))
    const make = async () => {
      const made = await this.build(frame.run, declaration)
      try {
        place = await inSlices(findingPlace(made, frame))
        await made.intake.prepare(place.layout)
        await this.#archive?.create(made)
        return made
      } catch (error) {
        made.dispose()
        throw error
      }
    }
    const run = await this.#residents.place(make).finally(release)
    return { run, member: await run.attach(opener.connection, place?.seat, place?.layout), resumed: false }
  }

  /** Makes a run that begins with the state of a checkpoint of another one, and goes on with its steps and digest. */
  async #branch(frame: OpenFrame, from: Source, opener: Opener): Promise<Opened> {
    const archive = this.#archive
    if (!archive || !this.has(from.run)) throw this.#notFound(from.run)
    // Before others make room for it. Of a source that was not read yet the size is known once the run is made.
    const source = [...sizesOf(this)].find(({ name }) => name === from.run)
    let release = reserve(this.quotas, opener, { ...UNKNOWN_SIZE, ...source, name: frame.run })
    const check = (made: Run) => {
      release()
      release = reserve(this.quotas, opener, sizeOf(made))
      return checkSame(made, frame, this.#presets)
    }
    const run = await this.#residents.place(() => archive.branch(frame.run, from, check)).finally(() => release())
    const { seat, layout } = await inSlices(findingPlace(run, frame))
    return { run, member: await run.attach(opener.connection, seat, layout), resumed: false }
  }

  #expelAll(): void {
    const error = this.#deviceFailure({ close: 1011 })
    for (const run of this.list()) {
      run.intake.expel(error)
      this.#residents.leave(run.name)
    }
  }

  #deviceFailure(fields: { close?: number } = {}): ServiceError {
    const { backend, failed } = this.#device
    return new ServiceError('DEVICE_FAILED', `the device ${backend.name} has failed: ${failed?.message}`, fields)
  }
}
