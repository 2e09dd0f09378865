import {
  type CheckpointedFrame,
  type GroupDeclaration,
  type MemberStatus,
  type Mode,
  type OpenedFrame,
  type OpenFrame,
  PROTOCOL,
  type ReceiptFrame,
} from '../wire/frame.js'
import { isLocal } from './connection.js'
import { MuondError } from './error.js'
import { Feed } from './receipts.js'
import { frameError } from './refusal.js'
import { type Groups, mergeGroups, owedOf } from './settings.js'
import { WholeWriter } from './shards/whole-writer.js'
import { Route } from './steps/handshake.js'
import {
  type Bound,
  bind,
  bytesOf,
  declarationOf,
  emptyGradient,
  type Gradient,
  type Parameter,
} from './steps/parameter.js'
import { Step, type StepOptions } from './steps/step.js'
import { Updates } from './steps/updates.js'
import { type Host, type Outcome, type RunWriter, Writer } from './steps/writer.js'
import { Transport } from './transport/transport.js'

export type OpenOptions = {
  run: string
  /** Default `create_or_resume`. */
  mode?: Mode
  groups?: readonly GroupDeclaration[]
  /** In index order; updates are applied to their `data`. */
  parameters: readonly Parameter[]
  /** What QK-clip watches; a parameter is given by its index. */
  attentions?: OpenFrame['attentions']
  /**
   * The run has `world_size` members, and this client is one of them: it sends and receives the `ranges` of each
   * parameter. With `replicas` it has as many in each, and every step is made with the mean of what they send.
   */
  member?: OpenFrame['member']
  /** When a step may be closed without all replicas; default never. Each replica gets its updates all the same. */
  quorum?: OpenFrame['quorum']
  /**
   * A digest, of the caller's choice, of the weights that a replica begins with: with another one than those of the
   * other replicas it is refused.
   */
  weights?: OpenFrame['weights']
  /** Take the run, or the member's place in it, from a connection that still holds it. */
  takeover?: boolean
  /** With `resume`: go back to this checkpoint. */
  checkpoint?: string
  /**
   * The run is a new one that begins with the state of a checkpoint of another run of this service, and goes on with
   * its steps and its digest. The checkpoint is given by its id or a tag; the weights must be those of its step.
   */
  from?: { run: string; checkpoint: string }
  /** Free text for the service's logs. */
  client?: string
  /**
   * Over so many processes of the service a new run is spread, each of which has some of the parameters; default: as
   * the service is set. Nothing else is different.
   */
  shards?: number
}

export type EndOptions = {
  /** Names or indices of the parameters without a gradient in this step. */
  skipped?: readonly (string | number)[]
  /** Of the replica in the mean of replicas, say the tokens of its batch; default 1. All ranks of one give the same. */
  weight?: number
}

/** By index, or by name. */
export type Gradients = readonly (Gradient | undefined)[] | Readonly<Record<string, Gradient>>

/** `refused`: the errors of the gradients that the step was ended without, see `skip_refused`. */
export type Receipt = ReceiptFrame & { readonly refused: readonly MuondError[] }

/** A checkpoint on the service's disk: its id, step and digest, and the bytes of its files. */
export type Checkpointed = Omit<CheckpointedFrame, 'type'>

type Flight = { step: Step; outcome: Promise<Outcome> }

/** Opens a run for `Client.open`, which says what it throws. */
export async function openRun(host: Host, { parameters, ...options }: OpenOptions): Promise<Run> {
  const declarations = parameters.map(declarationOf)
  const bound = bind(parameters)
  const frame = { type: 'open', protocol: PROTOCOL, shards: 0, ...options, parameters: declarations } as const
  return new Run(await openWriter(host, frame, bound), { parameters: bound, signal: host.signal })
}

/** A first `open` is not retried: a wrong address, key or run should be heard of at once. */
async function openWriter(host: Host, frame: OpenFrame, parameters: readonly Bound[]): Promise<RunWriter> {
  const transport = new Transport(host.transport, isLocal(host.url), parameters)
  const route = new Route(host)
  host.signal.addEventListener('abort', () => transport.close(), { once: true })
  try {
    const shaken = await transport.agree((offers) => route.open({ ...frame, ...offers }, host.signal))
    if (shaken.opened) return new Writer(host, { frame, transport, route }, shaken)
    transport.close()
    return await WholeWriter.open(host, { frame, route, parameters }, shaken)
  } catch (error) {
    transport.close()
    throw error
  }
}

type RunParts = { parameters: readonly Bound[]; signal: AbortSignal }

/**
 * One run of the service, and the one place that changes the trainer's weights. One step at a time; a lost connection
 * is replaced and the step sent again from the beginning, so its gradients must not change before its promise settles.
 */
export class Run {
  readonly parameters: readonly Bound[]
  readonly #writer: RunWriter
  readonly #views = new Map<number, Gradient>()
  readonly #byName: ReadonlyMap<string, Bound>
  readonly #updates: Updates
  readonly #receipts = new Feed<Receipt>()
  #flight: Flight | undefined
  #isReopening = false
  /** Hyperparameters of a step that was closed before they came: they are said again with the next one. */
  #owed: Groups | undefined

  constructor(writer: RunWriter, { parameters, signal }: RunParts) {
    this.parameters = parameters
    this.#writer = writer
    this.#byName = new Map(parameters.map((parameter) => [parameter.name, parameter]))
    this.#updates = new Updates(parameters, writer.step + 1)
    signal.addEventListener('abort', () => this.#receipts.end(), { once: true })
  }

  /** The service's answer to the newest `open`: name, epoch, groups, limits, device and more. */
  get opened(): OpenedFrame {
    return this.#writer.opened
  }

  /** Every member of the run by its rank, and whether it has a connection; empty for a run without members. */
  get members(): readonly MemberStatus[] {
    return this.#writer.members
  }

  /** The last finished step, 0 at first. */
  get step_count(): number {
    return this.#writer.step
  }

  /** Of the last finished step: equal digests are equal histories, bit for bit. */
  get digest(): string {
    return this.#writer.digest
  }

  /** How gradients and updates travel at present: `shm` or `websocket`. */
  get transport(): 'shm' | 'websocket' {
    return this.#writer.transport
  }

  /**
   * An array for a parameter's gradient, always the same one, to be filled and given to `step` or `gradient`. With
   * transport `shm` it is the memory that the service reads, so that the gradient is not copied; else it is ordinary
   * memory. It is the service's until the promise of its step settles, and leads to zeros once the client is closed.
   * @throws MuondError PARAMETER_UNKNOWN
   */
  gradientView(parameter: string | number): Gradient {
    const bound = this.#find(parameter)
    const known = this.#views.get(bound.index)
    if (known) return known
    const view = emptyGradient(bound, this.#writer.slot(bound.index))
    this.#views.set(bound.index, view)
    return view
  }

  /** Parameters that the service had applied for the next step when the run was opened, until that step is over. */
  get ahead(): readonly number[] {
    return this.step_count === this.opened.step ? this.opened.ahead : []
  }

  /**
   * Receipts as they come, from this call on; a reader more than RECEIPTS_KEPT behind loses the oldest. Ends with the
   * client.
   */
  receipts(): AsyncIterableIterator<Receipt> {
    return this.#receipts.read()
  }

  /**
   * Takes one step: sends every gradient and applies every update to the parameters' `data`.
   * @throws MuondError; `fields.refused` names the parameters whose gradients were refused, the other updates are
   *   applied. A step that rejected can be taken again: with the same options, and the same gradients for every
   *   parameter that is not refused, since their updates may be applied on either side. Nothing is applied a second
   *   time.
   */
  async step(gradients: Gradients, { skipped, weight, ...options }: StepOptions & EndOptions = {}): Promise<Receipt> {
    const step = this.#newStep(options)
    for (const [key, gradient] of entriesOf(gradients)) this.#add(step, key, gradient)
    step.finish(this.#complete(step, skipped), weight)
    return this.#land(this.#start(step))
  }

  /** Begins a step whose gradients come one by one; only needed to give it options. @throws MuondError STEP_CONFLICT */
  begin(options: StepOptions = {}): void {
    this.#start(this.#newStep(options))
  }

  /**
   * Sends one gradient while the backward pass goes on, and begins the step if it has not begun. What the service or
   * the network has to say comes with `end`.
   * @throws MuondError PARAMETER_UNKNOWN, SHAPE_MISMATCH, DTYPE_UNSUPPORTED, STEP_CONFLICT
   */
  gradient(parameter: string | number, gradient: Gradient): void {
    this.#add(this.#growing().step, parameter, gradient)
  }

  /** Ends the step that `gradient` began; resolves and rejects as `step` does. */
  async end({ skipped, weight }: EndOptions = {}): Promise<Receipt> {
    const flight = this.#growing()
    flight.step.finish(this.#complete(flight.step, skipped), weight)
    return this.#land(flight)
  }

  /**
   * Has the service write a checkpoint of the last finished step; the next step may be taken at once. Resolves when the
   * checkpoint is on the service's disk.
   * @throws MuondError STEP_CONFLICT while a step is in flight, STORAGE_FAILED, PARAMETER_INVALID (the tag),
   *   CONNECTION_LOST
   */
  async checkpoint(options: { tag?: string } = {}): Promise<Checkpointed> {
    this.#requireIdle()
    const { type: _, ...checkpointed } = await this.#writer.checkpoint(options.tag)
    return checkpointed
  }

  /**
   * Opens the run again wherever the service has it now, or goes back to a checkpoint, and takes it from whoever holds
   * it. Afterwards `step_count` and `digest` are the service's, and the weights must be those of that step: bringing
   * them back is the caller's part. A step in flight is given up and rejects with CLIENT_CLOSED; some of its updates
   * may be applied. Tried again as a step is; where it rejects, the run takes no step until `reopen` resolves.
   * @throws MuondError NOT_FOUND (the checkpoint), CHECKPOINT_UNREADABLE, RUN_NOT_FOUND, CONNECTION_LOST, STEP_CONFLICT
   *   while another `reopen` is under way
   */
  async reopen({ checkpoint }: { checkpoint?: string } = {}): Promise<void> {
    if (this.#isReopening) throw conflict(this.step_count + 1, 'is where the run is being opened again')
    this.#isReopening = true
    try {
      const what = `reopen() ended the connection of run '${this.opened.run}': until it resolves, the run takes no step`
      this.#writer.release(new MuondError('CLIENT_CLOSED', what))
      await this.#flight?.outcome
      this.#flight = undefined
      await this.#writer.reopen(checkpoint)
      this.#owed = undefined
      this.#updates.next(this.step_count + 1)
    } finally {
      this.#isReopening = false
    }
  }

  /**
   * Ends a step that an earlier trainer left in the middle, whose gradients nobody has any more. The service has
   * applied them to the state of the parameters `ahead`; their updates are lost, and all other parameters are skipped.
   * Resolves with the names of the parameters that lost their update; with none where nothing is ahead, or a step is in
   * flight. For an exact state go back to a checkpoint with `reopen` instead.
   */
  async settle(): Promise<string[]> {
    const ahead = new Set(this.ahead)
    if (ahead.size === 0 || this.#flight !== undefined) return []
    const step = this.#newStep({})
    step.finish(this.parameters.map(({ index }) => index).filter((index) => !ahead.has(index)))
    await this.#land(this.#start(step))
    return this.parameters.filter(({ index }) => ahead.has(index)).map(({ name }) => name)
  }

  #newStep(options: StepOptions): Step {
    this.#requireIdle()
    const groups = this.#owed && mergeGroups(this.#owed, options.groups)
    return new Step(this.step_count + 1, groups ? { ...options, groups } : options)
  }

  #requireIdle(): void {
    if (this.#flight !== undefined) throw conflict(this.#flight.step.number, 'is still in flight')
    if (this.#isReopening) throw conflict(this.step_count + 1, 'cannot begin while the run is opened again')
  }

  #start(step: Step): Flight {
    this.#flight = { step, outcome: this.#writer.take(step, this.#updates) }
    return this.#flight
  }

  #growing(): Flight {
    const flight = this.#flight ?? this.#start(this.#newStep({}))
    if (flight.step.end !== undefined) throw conflict(flight.step.number, 'has ended')
    return flight
  }

  async #land(flight: Flight): Promise<Receipt> {
    const outcome = await flight.outcome
    this.#flight = undefined
    if ('error' in outcome) throw outcome.error
    this.#updates.next(this.step_count + 1)
    this.#owed = outcome.receipt.contributed === false ? owedOf(flight.step.frame, outcome.receipt) : undefined
    const refused = [...flight.step.leftOut.values()].map((frame) => frameError(frame))
    const receipt = { ...outcome.receipt, refused }
    this.#receipts.push(receipt)
    return receipt
  }

  #add(step: Step, key: string | number, gradient: Gradient): void {
    const parameter = this.#find(key)
    if (step.has(parameter.index)) throw conflict(step.number, `has a gradient of '${parameter.name}' already`)
    const bytes = bytesOf(gradient, parameter)
    if (parameter.size > 0) step.add(parameter.index, bytes)
  }

  #find(key: string | number): Bound {
    const parameter = typeof key === 'number' ? this.parameters[key] : this.#byName.get(key)
    if (parameter !== undefined) return parameter
    throw new MuondError('PARAMETER_UNKNOWN', `run '${this.opened.run}' has no parameter ${JSON.stringify(key)}`)
  }

  /** Indices of the skipped parameters, once every parameter is accounted for. */
  #complete(step: Step, skipped: EndOptions['skipped'] = []): readonly number[] {
    const indices = new Set(skipped.map((key) => this.#find(key).index))
    const names = (wrong: (index: number) => boolean) =>
      this.parameters.filter(({ index }) => wrong(index)).map(({ name }) => `'${name}'`)
    const both = names((index) => step.has(index) && indices.has(index))
    if (both.length > 0)
      throw conflict(step.number, `has both a gradient and a place in skipped for ${both.join(', ')}`)
    const missing = names((index) => !step.has(index) && !indices.has(index) && this.parameters[index].size > 0)
    if (missing.length === 0) return [...indices]
    const message = `step ${step.number} has neither a gradient nor a place in skipped for ${missing.join(', ')}`
    throw new MuondError('STEP_INCOMPLETE', message, { step: step.number })
  }
}

function conflict(number: number, what: string): MuondError {
  return new MuondError('STEP_CONFLICT', `step ${number} ${what}`, { step: number })
}

function* entriesOf(gradients: Gradients): Generator<[string | number, Gradient]> {
  const entries = isList(gradients) ? gradients.entries() : Object.entries(gradients)
  for (const [key, gradient] of entries) if (gradient !== undefined) yield [key, gradient]
}

/** Array.isArray does not narrow a readonly array. */
function isList(gradients: Gradients): gradients is readonly (Gradient | undefined)[] {
  return Array.isArray(gradients)
}
