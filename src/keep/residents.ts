import type { Config } from '../config.js'
import type { Grant } from '../device/admission.js'
import { ServiceError } from '../errors.js'
import type { Metrics } from '../metrics.js'
import type { Run } from '../run/run.js'
import type { Archive } from './archive.js'
import type { Log } from './keeper.js'
import { measure } from './measured.js'
import type { Turns } from './turns.js'

export type ResidentsMeans = {
  config: Pick<Config, 'max_runs' | 'idle_seconds'>
  metrics: Metrics
  /** Hears of every run that comes to memory. */
  watch?: (run: Run) => void
  log: Log
  /** Where a run lies that leaves memory; undefined where it ends then. */
  archive: Archive | undefined
  turns: Turns
  /** Whether work is under way that needs a run without a connection. */
  isNeeded: (run: Run) => boolean
}

/** Whether a run is one of those that are to leave. */
type IsFit = (run: Run) => boolean

/** How often at least it is looked for runs that nobody uses. */
const MOST_WAIT_MS = 60_000

/** The runs in memory: at most `max_runs`, and none that no connection has had for `idle_seconds`. */
export class Residents {
  readonly #means: ResidentsMeans
  readonly #runs = new Map<string, Run>()
  /** Runs that are made or brought to memory: they have a place already. */
  #coming = 0
  readonly #timer: NodeJS.Timeout
  readonly #leaving = new Set<Promise<unknown>>()
  #isClosed = false

  constructor(means: ResidentsMeans) {
    this.#means = means
    const wait = Math.min(means.config.idle_seconds * 250 || MOST_WAIT_MS, MOST_WAIT_MS)
    this.#timer = setInterval(() => this.#look(), wait).unref()
  }

  get(name: string): Run | undefined {
    return this.#runs.get(name)
  }

  list(): Run[] {
    return [...this.#runs.values()]
  }

  get isFull(): boolean {
    return this.#runs.size + this.#coming >= this.#means.config.max_runs
  }

  /** Has `work` make a run, or bring one to memory, where it has a place from the beginning. Throws OVER_CAPACITY. */
  async place<R extends Run | undefined>(work: () => Promise<R>): Promise<R> {
    while (this.isFull) await this.#makeRoom()
    this.#coming += 1
    try {
      const run = await work()
      if (run) this.#enter(run)
      return run
    } finally {
      this.#coming -= 1
    }
  }

  /**
   * Has `admit` grant a run memory. Where there is not enough, runs that nobody uses leave it, unless `check`, which is
   * given their grants, throws: nobody leaves for a run that finds no room all the same. Throws OVER_CAPACITY.
   */
  async admit(admit: () => Grant, check: (leaving: ReadonlySet<Grant>) => void): Promise<Grant> {
    for (;;) {
      try {
        return admit()
      } catch (error) {
        check(new Set(this.#dispensable.map(({ grant }) => grant)))
        /* c8 ignore next -- the disk has to fail for the one that was to leave */
        if (!(await this.#letOneGo())) throw error
      }
    }
  }

  /** A run is in memory no more, or is on its way out. */
  leave(name: string): void {
    this.#runs.delete(name)
  }

  /** No run leaves memory any more because nobody uses it; resolves when those that were about to have left or stay. */
  async close(): Promise<void> {
    this.#isClosed = true
    clearInterval(this.#timer)
    await Promise.allSettled(this.#leaving)
  }

  /**
   * Has the runs leave memory that no connection has had for `idle_seconds`; `now` is as `performance.now` counts. With
   * a data folder the next `open` brings such a run back, without one it ends.
   */
  async restIdle(now = performance.now()): Promise<void> {
    const { config, turns } = this.#means
    if (config.idle_seconds === 0) return
    const isDue = ({ idleSince }: Run) => idleSince !== undefined && now - idleSince >= config.idle_seconds * 1000
    for (const run of this.list().filter(isDue)) await turns.take(run.name, () => this.#rest(run, isDue))
  }

  /** From here on a run is known by its name, and its steps are counted. */
  #enter(run: Run): void {
    this.#runs.set(run.name, run)
    measure(run, this.#means.metrics)
    this.#means.watch?.(run)
  }

  #look(): void {
    this.restIdle().catch(
      /* c8 ignore next 3 -- needs a disk that fails */
      (error) => {
        this.#means.log.error({ event: 'idle_run_failed', reason: String(error) })
      },
    )
  }

  /** The runs that may make room: no connection has one, and nothing of it is lost. The longest unused is the first. */
  get #dispensable(): Run[] {
    return this.list()
      .filter((run) => this.#mayRest(run, this.#losesNothing))
      .sort((one, other) => Number(one.idleSince) - Number(other.idleSince))
  }

  /** Has the run leave memory that no connection has had for the longest time; answers whether there was one. */
  async #letOneGo(): Promise<boolean> {
    const { turns } = this.#means
    for (const run of this.#dispensable) {
      // Whoever comes has a turn: to wait for another one's could be to wait for oneself.
      if (!turns.has(run.name) && (await turns.take(run.name, () => this.#rest(run, this.#losesNothing)))) return true
    }
    return false
  }

  readonly #losesNothing = (run: Run) => this.#means.archive !== undefined && !isLossy(run)

  /** Has one run leave memory. Throws OVER_CAPACITY. */
  async #makeRoom(): Promise<void> {
    if (await this.#letOneGo()) return
    const { config } = this.#means
    const remedy = 'delete one (DELETE /v1/runs/{run}), or start the service with a larger --max-runs'
    const holds = this.#runs.size + this.#coming
    throw new ServiceError('OVER_CAPACITY', `the service holds ${holds} runs, at most ${config.max_runs}: ${remedy}`)
  }

  #mayRest(run: Run, isFit: IsFit): boolean {
    const isHere = this.#runs.get(run.name) === run
    const isUsed = run.connected || run.boundary.held !== undefined || this.#means.isNeeded(run)
    return isHere && !this.#isClosed && !isUsed && isFit(run)
  }

  /** Has an idle run leave memory; answers whether it has. In its turn, so that no connection gets it meanwhile. */
  async #rest(run: Run, isFit: IsFit): Promise<boolean> {
    const leaving = this.#leave(run, isFit)
    this.#leaving.add(leaving)
    return leaving.finally(() => this.#leaving.delete(leaving))
  }

  async #leave(run: Run, isFit: IsFit): Promise<boolean> {
    await run.settled()
    if (!this.#mayRest(run, isFit) || !(await this.#keep(run))) return false
    // Its state may be imported while the disk is waited for.
    if (!this.#mayRest(run, isFit)) return false
    const { archive, log } = this.#means
    const { name, step } = run
    this.#runs.delete(name)
    const durable_step = await archive?.rest(run).finally(() => run.dispose())
    if (!archive) run.dispose()
    const left = { event: archive ? 'run_left_memory' : 'run_ended', run: name, step }
    if (durable_step === undefined || durable_step === step) log.info(left)
    else log.warn({ ...left, durable_step })
    return true
  }

  /**
   * Has the disk take what it has not got of a run; answers whether it has all that it can have. In the middle of a
   * step no checkpoint can be taken: the run then comes back where a crash would leave it.
   */
  async #keep(run: Run): Promise<boolean> {
    const { archive, log } = this.#means
    if (!archive || run.journal || isLossy(run)) return true
    try {
      await archive.keeper(run.name).take()
      return true
    } catch (error) {
      log.warn({ event: 'idle_run_stays', run: run.name, step: run.step, reason: String(error) })
      return false
    }
  }
}

/** Whether a run that leaves memory now loses finished steps. */
function isLossy(run: Run): boolean {
  return run.begun && run.journal === undefined
}
