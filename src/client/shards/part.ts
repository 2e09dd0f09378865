import type { OpenedFrame, OpenFrame, PlacedFrame, StepFrame } from '../../wire/frame.js'
import { type Connection, isLocal } from '../connection.js'
import { MuondError } from '../error.js'
import { followed, handshake } from '../steps/handshake.js'
import type { Bound } from '../steps/parameter.js'
import { Step } from '../steps/step.js'
import { Updates } from '../steps/updates.js'
import type { Host } from '../steps/writer.js'
import { Transport } from '../transport/transport.js'

type Shard = PlacedFrame['shards'][number]

/** One shard of a whole as this client has it: its parameters, counted as the shard counts, and its connection. */
export class Part {
  /** The whole's index of each parameter. */
  readonly indices: readonly number[]
  readonly updates: Updates
  readonly transport: Transport
  readonly #index: number
  readonly #local: ReadonlyMap<number, number>
  #connected: { connection: Connection; opened: OpenedFrame } | undefined

  constructor(host: Host, { shard, index, parameters }: { shard: Shard; index: number; parameters: readonly Bound[] }) {
    this.#index = index
    this.indices = indicesOf(shard)
    this.#local = new Map(this.indices.map((whole, local) => [whole, local]))
    const bound = this.indices.map((whole, local) => ({ ...parameters[whole], index: local }))
    this.updates = new Updates(bound, 0)
    this.transport = new Transport(host.transport, isLocal(new URL(shard.url)), bound)
  }

  /** The answer to the newest `open`. */
  get opened(): OpenedFrame {
    return this.#now.opened
  }

  get connection(): Connection {
    return this.#now.connection
  }

  /** Whether the connection is there and not over. */
  get isConnected(): boolean {
    return this.#connected !== undefined && this.#connected.connection.reason === undefined
  }

  /** The names of its attentions. */
  get attentions(): ReadonlySet<string> {
    return new Set(this.opened.attentions.map(({ name }) => name))
  }

  /** The index that the shard has for a parameter of the whole; undefined where another shard has it. */
  local(whole: number): number | undefined {
    return this.#local.get(whole)
  }

  /** Opens the shard where `placed` says that it is; `frame` is the `open` of the whole. */
  async open(
    host: Host,
    { placed, frame, signal }: { placed: PlacedFrame; frame: OpenFrame; signal: AbortSignal },
  ): Promise<void> {
    const shard = placed.shards[this.#index]
    if (String(indicesOf(shard)) !== String(this.indices))
      throw new MuondError('RUN_MISMATCH', `shard '${shard.run}' has other parameters than when it was opened first`)
    const own = this.#frame(frame, { shard, generation: placed.generation })
    const url = followed(shard.url, host.url)
    const shake = async (offers: Partial<OpenFrame>) => handshake(await host.dial(signal, url), { ...own, ...offers })
    const shaken = await this.transport.agree(shake)
    this.#connected = shaken
    const { step } = shaken.opened
    if (step === placed.step || step === placed.step + 1) return
    const message = `shard '${shard.run}' is at step ${step}, run '${placed.run}' at step ${placed.step}`
    throw new MuondError('STEP_CONFLICT', message, { step, expected_step: placed.step + 1 })
  }

  /**
   * What a `step` frame of the whole says to this shard; an attention that no shard has is the first one's to refuse.
   */
  stepOf({ number, frame, skip_refused }: Step, known: ReadonlySet<string>): Step {
    if (frame === undefined) return new Step(number, { skip_refused })
    const { type: _, step: __, max_logits, ...options } = frame
    const mine = this.attentions
    const isMine = (name: string) => mine.has(name) || (this.#index === 0 && !known.has(name))
    const logits = max_logits && Object.entries(max_logits).filter(([name]) => isMine(name))
    const own: Pick<StepFrame, 'max_logits'> =
      logits && logits.length > 0 ? { max_logits: Object.fromEntries(logits) } : {}
    return new Step(number, { ...options, ...own, skip_refused })
  }

  fail(reason: unknown): void {
    this.#connected?.connection.fail(reason)
  }

  get #now(): { connection: Connection; opened: OpenedFrame } {
    if (this.#connected) return this.#connected
    /* c8 ignore next 2 -- a bug: a part is opened before it is used */
    throw new Error(`shard ${this.#index} was never opened`)
  }

  #frame(
    { checkpoint: _, from: __, shards: ___, parameters = [], attentions, ...frame }: OpenFrame,
    { shard, generation }: { shard: Shard; generation: number },
  ): OpenFrame {
    const mine = attentions?.filter(({ query }) => this.#local.has(query.parameter))
    const counted = (rows: { parameter: number; first_row?: number }) => {
      const parameter = this.#local.get(rows.parameter)
      if (parameter !== undefined) return { ...rows, parameter }
      throw new MuondError(
        'RUN_MISMATCH',
        `shard '${shard.run}' has one part of an attention, and another shard the rest`,
      )
    }
    const own = mine?.map(({ query, key, query_bias, key_bias, ...attention }) => ({
      ...{ ...attention, query: counted(query), key: counted(key) },
      ...(query_bias && { query_bias: counted(query_bias) }),
      ...(key_bias && { key_bias: counted(key_bias) }),
    }))
    return {
      ...frame,
      run: shard.run,
      shard: { index: this.#index, generation },
      parameters: this.indices.map((index) => parameters[index]),
      ...(own && { attentions: own }),
      ...(shard.checkpoint !== undefined && { checkpoint: shard.checkpoint, mode: 'resume' }),
    }
  }
}

function indicesOf({ parameters }: Shard): number[] {
  return parameters.flatMap(([start, stop]) => Array.from({ length: stop - start }, (_, i) => start + i))
}
