import { isWireDtype, tensorBytes, type WireDtype } from '../../kernels/dtype.js'
import { bind } from '../../src/client/steps/parameter.js'
import { Arenas } from '../../src/client/transport/arenas.js'
import type { OpenFrame, ParameterDeclaration, ReceiptFrame, UpdatesFrame } from '../../src/wire/frame.js'
import { Extent, type Range, Ranges } from '../../src/wire/ranges.js'
import { bytesOf, normal, RawClient } from '../service.js'

/** What a run declares, as its only member would. */
export type Model = Pick<OpenFrame, 'groups' | 'attentions'> & { parameters: readonly ParameterDeclaration[] }

export const elementsOf = ({ shape }: Pick<ParameterDeclaration, 'shape'>) => shape.reduce((all, size) => all * size, 1)

/** The ranges of each member: `split[i]` are those of parameter i, of each rank. */
export type Split = readonly (readonly (readonly Range[])[])[]

/** Rows of the first dimension, as evenly as FSDP2 cuts them: the last ranks may have fewer, or none. */
export function evenly({ parameters }: Model, world_size: number): Split {
  return parameters.map(({ shape }) => {
    const [rows = 1] = shape
    const row = elementsOf({ shape }) / rows
    const most = Math.ceil(rows / world_size)
    return Array.from({ length: world_size }, (_, rank) => {
      const [start, stop] = [Math.min(rows, rank * most), Math.min(rows, (rank + 1) * most)]
      return start < stop ? [[start * row, stop * row]] : []
    })
  })
}

/** Columns of the last dimension: a range for each row. */
export function byColumns({ parameters }: Model, world_size: number): Split {
  return parameters.map(({ shape }) => {
    const columns = shape.at(-1) ?? 1
    const rows = elementsOf({ shape }) / columns
    const bounds = Array.from({ length: world_size + 1 }, (_, i) => Math.floor((i * columns) / world_size))
    return Array.from({ length: world_size }, (_, rank) => {
      const [start, stop] = [bounds[rank]!, bounds[rank + 1]!]
      const each = Array.from({ length: rows }, (_, row): Range => [row * columns + start, row * columns + stop])
      return start < stop ? each : []
    })
  })
}

function dtypeOf(declared: ParameterDeclaration, key: 'gradient_dtype' | 'update_dtype'): WireDtype {
  const { [key]: name = 'float32' } = declared
  /* c8 ignore next -- fails the test */
  if (!isWireDtype(name)) throw new Error(name)
  return name
}

export const bytesOfUpdate = (one: ParameterDeclaration) => tensorBytes(dtypeOf(one, 'update_dtype'), elementsOf(one))

/** `among`: which replica the member is of, of how many; `shares`: whether its tensors lie in shared memory. */
export type MateOptions = {
  model: Model
  split: Split
  rank: number
  among?: { replica: number; replicas: number }
  quorum?: NonNullable<OpenFrame['quorum']>
  shares?: boolean
}

/** One member of a run as a client: it sends its elements of whole gradients, and puts its elements of updates down. */
export class Mate {
  readonly rank: number
  readonly frame: OpenFrame
  readonly #url: string
  readonly #model: Model
  readonly #split: Split
  readonly arenas: Arenas | undefined
  client!: RawClient
  opened!: Awaited<ReturnType<RawClient['open']>>

  constructor(url: string, run: string, { model, split, rank, among, quorum, shares = false }: MateOptions) {
    this.#url = url
    this.#model = model
    this.#split = split
    this.rank = rank
    const world_size = split[0]!.length
    const parameters = model.parameters.map((one, i) => ({ ...one, ranges: split[i]![rank]! }))
    const member = { rank, world_size, ...among }
    const bound = bind(parameters.map((one) => ({ ...one, data: new Float32Array(0) })))
    this.arenas = shares ? new Arenas(bound) : undefined
    this.frame = { type: 'open', protocol: 1, run, ...model, parameters, member, ...(quorum && { quorum }) }
  }

  async open(keys: Partial<OpenFrame> = {}): Promise<this> {
    this.client = await RawClient.connect(this.#url)
    const transport = this.arenas && [this.arenas.offer()]
    this.opened = await this.client.open({ ...this.frame, ...(transport && { transport }), ...keys })
    /* c8 ignore next 2 -- fails the test */
    if (this.arenas && this.opened.transport?.kind !== 'shm') throw new Error(JSON.stringify(this.opened.transport))
    return this
  }

  has(parameter: number): boolean {
    return this.#split[parameter]![this.rank]!.length > 0
  }

  /** The parameters of which it has elements. */
  get own(): number[] {
    return this.#model.parameters.flatMap((_, i) => (this.has(i) ? [i] : []))
  }

  extent(parameter: number, dtype: 'gradient_dtype' | 'update_dtype' = 'gradient_dtype'): Extent {
    const name = dtypeOf(this.#model.parameters[parameter]!, dtype)
    return Extent.of(name, new Ranges(this.#split[parameter]![this.rank]!))
  }

  /** Sends its part of a whole gradient. */
  send(parameter: number, step: number, values: Float32Array | Uint8Array, chunk?: number): void {
    const extent = this.extent(parameter)
    if (!this.arenas) return this.client.gradient(parameter, step, { values, extent, ...(chunk && { chunk }) })
    this.#put(this.arenas, parameter, values)
    this.client.send({ type: 'gradients', step, parameters: [parameter] })
  }

  /** Puts its part of each whole gradient into the memory that it shares. */
  put(gradients: readonly (Float32Array | Uint8Array)[]): void {
    for (const [parameter, values] of gradients.entries()) this.#put(this.arenas!, parameter, values)
  }

  #put(arenas: Arenas, parameter: number, values: Float32Array | Uint8Array): void {
    const [bytes, extent] = [bytesOf(values), this.extent(parameter)]
    let done = 0
    for (const { offset, length } of extent.pieces(0, extent.bytes)) {
      arenas.gradient(parameter).set(bytes.subarray(offset, offset + length), done)
      done += length
    }
  }

  end(step: number, skipped?: readonly number[], weight?: number): void {
    this.client.send({ type: 'end', step, ...(skipped && { skipped }), ...(weight !== undefined && { weight }) })
  }

  /** The next receipt; frames that tell of other members may come before it. */
  async receipt(): Promise<ReceiptFrame> {
    for (;;) {
      const frame = await this.client.next()
      if (frame.type === 'receipt') return frame
      if (frame.type === 'updates') {
        this.#take(frame)
        continue
      }
      /* c8 ignore next -- fails the test */
      if (frame.type !== 'members') throw new Error(`rank ${this.rank} was sent ${JSON.stringify(frame)}`)
    }
  }

  /** The next error; frames that tell of other members may come before it. */
  async error() {
    for (;;) {
      const frame = await this.client.next()
      if (frame.type === 'error') return frame
      /* c8 ignore next -- fails the test */
      if (frame.type !== 'members') throw new Error(`rank ${this.rank} was sent ${JSON.stringify(frame)}`)
    }
  }

  /** Its memory is given back; the connection, too. */
  async close(): Promise<void> {
    await this.client.close()
    this.arenas?.close()
  }

  /** Updates in shared memory, as the socket would have brought them. */
  #take({ parameters, ...lists }: UpdatesFrame): void {
    for (const [i, parameter] of parameters.entries()) {
      const one = (key: 'scale' | 'decay' | 'gradient_norm' | 'update_rms') => lists[key][i]!
      const factors = { scale: one('scale'), decay: one('decay') }
      const measured = { gradient_norm: one('gradient_norm'), update_rms: one('update_rms') }
      /* c8 ignore next 4 -- the seed says which member shares memory, and whether a head of it is clipped then */
      const row_scale = lists.row_scale?.[parameter]
      const data = Buffer.from(this.arenas!.update(parameter))
      const update = { ...factors, ...measured, data, replayed: lists.replayed }
      this.client.updates.set(parameter, { ...update, ...(row_scale && { row_scale: Buffer.from(row_scale) }) })
    }
  }

  /** Puts its elements of the newest updates into whole tensors. */
  place(updates: readonly Uint8Array[]): void {
    for (const parameter of this.own) {
      const extent = this.extent(parameter, 'update_dtype')
      const data = this.client.updates.get(parameter)?.data
      /* c8 ignore next -- fails the test */
      if (data?.length !== extent.bytes) throw new Error(`rank ${this.rank} has ${data?.length} bytes of ${parameter}`)
      let done = 0
      for (const { offset, length } of extent.pieces(0, extent.bytes)) {
        updates[parameter]!.set(data.subarray(done, done + length), offset)
        done += length
      }
    }
  }
}

/** All members of a run, each with its connection. */
export class Crew {
  readonly mates: readonly Mate[]
  readonly #model: Model

  private constructor(model: Model, mates: readonly Mate[]) {
    this.#model = model
    this.mates = mates
  }

  static async open(url: string, run: string, options: Omit<MateOptions, 'rank'>): Promise<Crew> {
    const { model, split } = options
    const mates = split[0]!.map((_, rank) => new Mate(url, run, { ...options, rank }))
    for (const mate of mates) await mate.open()
    return new Crew(model, mates)
  }

  /** One step, in the order of the ranks; answers the whole updates and the receipts of all. */
  async step(step: number, gradients: readonly (Float32Array | Uint8Array)[]) {
    for (const mate of this.mates) {
      for (const parameter of mate.own) mate.send(parameter, step, gradients[parameter]!)
      mate.end(step)
    }
    const receipts = await Promise.all(this.mates.map((mate) => mate.receipt()))
    return { receipts, updates: this.updates() }
  }

  /** The whole updates that the members have together. */
  updates(): Uint8Array[] {
    const updates = this.#model.parameters.map((one) => new Uint8Array(bytesOfUpdate(one)))
    for (const mate of this.mates) mate.place(updates)
    return updates
  }

  async close(): Promise<void> {
    for (const mate of this.mates) await mate.close()
  }
}

/** The same run by its only member: the updates and the receipt of each step. */
export async function alone(url: string, run: string, { model, steps }: { model: Model; steps: Gradients }) {
  const client = await RawClient.connect(url)
  await client.open({ run, ...model })
  const done: { receipt: ReceiptFrame; updates: Uint8Array[] }[] = []
  for (const [i, gradients] of steps.entries()) {
    const receipt = await client.step(i + 1, gradients)
    done.push({ receipt, updates: model.parameters.map((_, p) => new Uint8Array(client.updates.get(p)!.data)) })
  }
  await client.close()
  return done
}

/** The gradients of each step. */
export type Gradients = readonly (readonly (Float32Array | Uint8Array)[])[]

export function gradientsOf({ parameters }: Model, { seed, steps }: { seed: number; steps: number }): Float32Array[][] {
  return Array.from({ length: steps }, (_, step) =>
    parameters.map((one, i) => normal(seed + 1000 * step + i, elementsOf(one))),
  )
}

export const MODEL: Model = {
  groups: [
    { name: 'm', algorithm: 'muon', lr: 0.02 },
    { name: 'a', algorithm: 'adamw', lr: 0.01 },
    { name: 's', algorithm: 'sgd', lr: 0.1, momentum: 0.9 },
  ],
  parameters: [
    { name: 'square', shape: [8, 8], group: 'm' },
    { name: 'odd', shape: [5, 4], group: 'm' },
    { name: 'flat', shape: [2, 5], group: 'a' },
    { name: 'bias', shape: [7], group: 's' },
    { name: 'scalar', shape: [], group: 'a' },
  ],
}

export { bytesOf }
