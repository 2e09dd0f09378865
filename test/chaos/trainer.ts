import { setTimeout as delay } from 'node:timers/promises'
import {
  type Client,
  type ConnectOptions,
  connect,
  MuondError,
  type OpenOptions,
  type Run,
} from '../../src/client/client.js'
import { CHUNK_BYTES, declaration, firstWeights, gradientsOf, hashOf, LAST, settingsOf, type Weights } from './model.js'

/** An error that a trainer was told at a step; 0 at `open`. */
export type Refusal = { code: string; message: string; step: number }

/** A run that came back at an earlier step than the last acknowledged one. */
export type FallBack = { acknowledged: number; resumed: number }

/** The outcome of a training run. */
export type Outcome = {
  weights: string
  digest: string
  /** The digests by acknowledged step. */
  digests: ReadonlyMap<number, string>
  durable: boolean[]
  refusals: Refusal[]
  fallBacks: FallBack[]
  epoch: number
}

/** What to do about an error: ask for the step again, open the run where it is, or take it back to a checkpoint. */
export type Remedy = 'again' | 'reopen' | 'back' | 'give up'

export type TrainerOptions = {
  /** The address of the stream, which may lead through a proxy. */
  url: string
  run: string
  /** The present address of REST. */
  control: () => string
  /** What `open` says beside the declaration. */
  open?: Partial<OpenOptions>
  /** Retries within one step, and the longest wait between two. */
  retries?: number
  decide?: (error: MuondError, trainer: Trainer) => Remedy | undefined | Promise<Remedy | undefined>
  /** Called after each acknowledged step. */
  onReceipt?: (step: number, trainer: Trainer) => void | Promise<void>
  /** Weights by step, of a trainer that had the run before. */
  kept?: Map<number, Weights>
  /** Ends the training, so that no wait is endless. */
  signal: AbortSignal
}

const RETRIES = 200
const BACKOFF: ConnectOptions['backoff'] = { first_seconds: 0.02, most_seconds: 0.2 }
const MOST_REFUSALS = 100
const PAUSE_MS = 50

/** A training client as one would write it: it keeps its weights of every step, and goes on when the service does. */
export class Trainer {
  /** Weights by step. */
  readonly kept: Map<number, Weights>
  readonly refusals: Refusal[] = []
  readonly fallBacks: FallBack[] = []
  readonly durable: boolean[] = []
  /** The last acknowledged step. */
  acknowledged = 0
  readonly #digests = new Map<number, string>()
  #weights = firstWeights()
  #client: Client | undefined
  #run: Run | undefined
  readonly #options: TrainerOptions

  constructor(options: TrainerOptions) {
    this.#options = options
    this.kept = options.kept ?? new Map([[0, firstWeights()]])
  }

  get run(): Run {
    if (this.#run) return this.#run
    throw new Error('nothing was opened yet')
  }

  /** Trains up to step `last` and closes the connection. */
  async train(last = LAST): Promise<Outcome> {
    await this.#open({ takeover: this.#options.kept !== undefined })
    while (this.run.step_count < last) await this.#step(this.run.step_count + 1)
    await this.#client?.close()
    const { refusals, fallBacks, durable, run } = this
    return {
      ...{ weights: hashOf(this.#weights), digest: run.digest, digests: this.#digests, durable },
      ...{ refusals, fallBacks, epoch: run.opened.epoch },
    }
  }

  async #step(step: number): Promise<void> {
    // The weights before the step: those in use may have some of its updates already.
    const { gradients, skipped } = gradientsOf(this.#at(step - 1), step)
    try {
      const receipt = await this.run.step(gradients, { ...settingsOf(step), skipped })
      this.#digests.set(step, receipt.digest)
      this.durable.push(receipt.durable)
      this.acknowledged = step
      this.kept.set(
        step,
        this.#weights.map((values) => values.slice()),
      )
    } catch (error) {
      return this.#remedy(error, step)
    }
    await this.#options.onReceipt?.(step, this)
  }

  async #remedy(error: unknown, step: number): Promise<void> {
    if (!(error instanceof MuondError)) throw error
    const { code, message } = error
    this.refusals.push({ code, message, step })
    const remedy = (await this.#options.decide?.(error, this)) ?? resumesEarlier(error, step)
    if (remedy === 'give up') throw error
    if (remedy === 'reopen') await this.#open({ mode: 'resume', takeover: true })
    if (remedy === 'back') await this.#goBack()
  }

  /** Opens the run, again and again until the signal, and sets the weights to those of its step. */
  async #open(options: Partial<OpenOptions>): Promise<void> {
    const { run, signal, open } = this.#options
    for (;;) {
      try {
        const client = await this.#connected()
        this.#run = await client.open({ ...declaration(run, this.#weights), ...open, ...options })
        break
      } catch (error) {
        if (!(error instanceof MuondError) || !(await this.#opensAgain(error))) throw error
        // An earlier `open` may have succeeded although its answer was lost.
        options = { ...options, takeover: true }
        await delay(PAUSE_MS, undefined, { signal })
      }
    }
    await this.#resume(this.run)
  }

  /** Whether an `open` that was refused is to be tried again. A service that is not there yet is no refusal. */
  async #opensAgain(error: MuondError): Promise<boolean> {
    if (error.code === 'CONNECTION_LOST') return true
    this.refusals.push({ code: error.code, message: error.message, step: 0 })
    if (this.refusals.length > MOST_REFUSALS) return false
    return (await this.#options.decide?.(error, this)) === 'again'
  }

  async #resume({ opened }: Run): Promise<void> {
    const { step, digest } = opened
    if (!this.kept.has(step)) return this.#goBack()
    const known = this.#digests.get(step)
    if (known !== undefined && known !== digest) throw new Error(`step ${step} has digest ${digest}, it was ${known}`)
    if (step < this.acknowledged) this.fallBacks.push({ acknowledged: this.acknowledged, resumed: step })
    this.acknowledged = step
    for (const [i, values] of this.#at(step).entries()) this.#weights[i].set(values)
  }

  /** Takes the run back to its newest checkpoint of a step whose weights are kept. */
  async #goBack(): Promise<void> {
    const { control, run } = this.#options
    const answer = await fetch(`${control()}/v1/runs/${run}/checkpoints`)
    const { checkpoints } = (await answer.json()) as { checkpoints: { checkpoint: string; step: number }[] }
    const newest = checkpoints.findLast(({ step }) => this.kept.has(step))
    if (newest === undefined) throw new Error(`run '${run}' has no checkpoint whose weights are kept`)
    this.acknowledged = newest.step
    await this.#open({ mode: 'resume', takeover: true, checkpoint: newest.checkpoint })
  }

  async #connected(): Promise<Client> {
    const { url, retries = RETRIES, signal } = this.#options
    this.#client ??= await connect(url, {
      transport: 'websocket',
      retries,
      backoff: BACKOFF,
      chunk_bytes: CHUNK_BYTES,
      signal,
    })
    return this.#client
  }

  #at(step: number): Weights {
    const weights = this.kept.get(step)
    if (weights) return weights
    throw new Error(`no weights of step ${step} are kept`)
  }
}

/** Goes back with a run that came back at an earlier step. A trainer can mend no other error. */
function resumesEarlier({ code, fields }: MuondError, step: number): Remedy {
  const earlier = fields.expected_step !== undefined && fields.expected_step < step
  return code === 'STEP_CONFLICT' && earlier ? 'reopen' : 'give up'
}
