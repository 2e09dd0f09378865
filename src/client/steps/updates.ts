import { Assembly } from '../../wire/chunks.js'
import type { UpdateFrame, UpdatesFrame } from '../../wire/frame.js'
import { Extent } from '../../wire/ranges.js'
import { MuondError } from '../error.js'
import { applyUpdate, type Update } from './apply.js'
import type { Bound } from './parameter.js'

/** An update whose first chunk came and whose last did not. */
type IncomingUpdate = { update: Update; chunks: Assembly; buffer: Uint8Array<ArrayBuffer> }

const NOTHING = new Uint8Array(0)

/**
 * Applies each parameter's update of the step in progress once, however often the service sends it: an update is
 * applied only when it is complete, and the parameter is remembered until the step is over, past any number of
 * connections.
 */
export class Updates {
  readonly #parameters: readonly Bound[]
  readonly #incoming = new Map<number, IncomingUpdate>()
  readonly #applied = new Set<number>()
  #step: number
  /**
   * The buffer of the last finished update, for the next: memory touched for the first time is the dearest there is.
   */
  #spare = new ArrayBuffer(0)

  /** `step` is the step in progress. */
  constructor(parameters: readonly Bound[], step: number) {
    this.#parameters = parameters
    this.#step = step
  }

  /** How many parameters have their update of the step in progress. */
  get applied(): number {
    return this.#applied.size
  }

  nameOf(parameter: number): string {
    return this.#parameters[parameter].name
  }

  /** Where the bytes of a parameter's gradient lie in the whole tensor. */
  gradient(parameter: number): Extent {
    const { ranges, gradient_dtype } = this.#parameters[parameter]
    return Extent.of(gradient_dtype, ranges)
  }

  has(parameter: number): boolean {
    return this.#applied.has(parameter)
  }

  /** The step is over: its updates never count again. */
  next(step: number): void {
    this.#step = step
    this.#applied.clear()
    this.forget()
  }

  /** The connection is gone: what it began to send begins again on the next. */
  forget(): void {
    this.#incoming.clear()
  }

  /**
   * Takes one frame; true if it was the last of its update.
   * @throws MuondError, ServiceError FRAME_UNEXPECTED, SHAPE_MISMATCH, PARAMETER_UNKNOWN: what no service sends;
   *   nothing was applied
   */
  take(frame: UpdateFrame): boolean {
    const { parameter, step, offset, data = NOTHING } = frame
    const bound = this.#bound(parameter)
    if (step !== this.#step) throw unexpected(frame, `step ${step}, expected ${this.#step}`)
    const first = frame.data === undefined ? 0 : extentOf(bound).offsetOf(0)
    if (offset === first) this.#incoming.set(parameter, this.#begin(frame, bound))
    const incoming = this.#incoming.get(parameter)
    if (incoming === undefined) throw unexpected(frame, `offset ${offset}, expected ${first}`)
    if (offset === first && frame.data === undefined) return this.#finish(incoming, bound)
    const { received } = incoming.chunks
    incoming.chunks.accept({ offset, length: data.length })
    incoming.buffer.set(data, received)
    return incoming.chunks.complete && this.#finish(incoming, bound)
  }

  /**
   * Takes one frame of updates that lie in shared memory, where `slotOf` finds their bytes.
   * @throws MuondError FRAME_UNEXPECTED, SHAPE_MISMATCH, PARAMETER_UNKNOWN: what no service sends
   */
  takeShared(frame: UpdatesFrame, slotOf: (parameter: number) => Uint8Array): void {
    const { step, parameters, scale, decay, row_scale = {} } = frame
    for (const [i, parameter] of parameters.entries()) {
      const bound = this.#bound(parameter)
      if (step !== this.#step) throw unexpected({ parameter }, `step ${step}, expected ${this.#step}`)
      if (scale.length <= i || decay.length <= i) throw unexpected({ parameter }, 'no scale or decay')
      const rows = Object.hasOwn(row_scale, parameter) ? float32(row_scale[parameter]) : undefined
      const factors = { scale: scale[i], decay: decay[i], row_scale: rows }
      this.#apply({ ...factors, dtype: bound.update_dtype, data: slotOf(parameter) }, bound)
    }
  }

  #bound(parameter: number): Bound {
    const bound = this.#parameters[parameter]
    if (bound !== undefined) return bound
    throw new MuondError('PARAMETER_UNKNOWN', `update for parameter ${parameter}`, { parameter })
  }

  #begin(frame: UpdateFrame, bound: Bound): IncomingUpdate {
    const { scale, decay, row_scale } = frame
    if (scale === undefined || decay === undefined) throw unexpected(frame, 'no scale or decay')
    const { name, update_dtype } = bound
    const chunks = new Assembly(extentOf(bound), `update of '${name}'`)
    const buffer = this.#room(frame.data === undefined ? 0 : chunks.extent.bytes)
    const rows = row_scale === undefined ? undefined : float32(row_scale)
    const data = frame.data === undefined ? undefined : buffer
    return { update: { scale, decay, dtype: update_dtype, row_scale: rows, data }, chunks, buffer }
  }

  #apply(update: Update, { index, data, ...part }: Bound): void {
    if (!this.#applied.has(index)) applyUpdate(data, update, part)
    this.#applied.add(index)
  }

  #finish({ update, buffer }: IncomingUpdate, bound: Bound): true {
    this.#incoming.delete(bound.index)
    this.#apply(update, bound)
    if (buffer.buffer.byteLength > this.#spare.byteLength) this.#spare = buffer.buffer
    return true
  }

  #room(bytes: number): Uint8Array<ArrayBuffer> {
    const buffer = this.#spare.byteLength < bytes ? new ArrayBuffer(bytes) : this.#spare
    if (bytes > 0) this.#spare = new ArrayBuffer(0)
    return new Uint8Array(buffer, 0, bytes)
  }
}

/** Where the bytes of a parameter's update lie in the whole tensor. */
function extentOf({ ranges, update_dtype }: Bound): Extent {
  return Extent.of(update_dtype, ranges)
}

function unexpected({ parameter }: Pick<UpdateFrame, 'parameter'>, what: string): MuondError {
  return new MuondError('FRAME_UNEXPECTED', `update of parameter ${parameter} with ${what}`, { parameter })
}

/** The bytes stand anywhere in their message; a Float32Array wants a multiple of 4. */
function float32(bytes: Uint8Array): Float32Array {
  return new Float32Array(Uint8Array.from(bytes).buffer)
}
