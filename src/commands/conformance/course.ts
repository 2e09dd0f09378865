import { bytesPerElement, isDtype } from '../../../kernels/dtype.js'
import { type Bound, bind } from '../../client/steps/parameter.js'
import { Updates } from '../../client/steps/updates.js'
import type { ErrorFrame, GradientFrame, OpenFrame, ServerFrame } from '../../wire/frame.js'
import type { Findings } from './checks.js'
import type { Scene } from './scene.js'

type Parameters = NonNullable<OpenFrame['parameters']>

/** A gradient of which some chunks have come; `bytes` are those of all of them. */
type Coming = { chunks: Uint8Array[]; bytes: number }

/** What may be between two correct float32 results where one of them fuses multiply and add (docs/protocol.md). */
const FUSED = 2 ** -23

/**
 * A run as the client trains it, or one member of it. It has a client of its own, the one of this repository, that is
 * told what the client is told: so it knows which updates have arrived, and which weights they lead to.
 */
export class Course {
  readonly name: string
  /** What happens in the step that the client takes. */
  scene: Scene | undefined
  /** Whether there are scenes: not where a step needs several clients. */
  plays = true
  readonly #findings: Findings
  /** Whether every gradient is the weights, as with the loss |W|²/2. */
  readonly #quadratic: boolean
  #bound: readonly Bound[] = []
  #updates = new Updates([], 1)
  #step = 0
  /** Parameters whose gradient the client has sent in this step, and whose update it therefore needs. */
  readonly #asked = new Set<number>()
  readonly #coming = new Map<number, Coming>()
  /** Parameters whose weights are known. */
  readonly #weighed = new Set<number>()
  #isOver = true
  #settled: Promise<void> = Promise.resolve()
  #settle: () => void = () => {}

  constructor(name: string, findings: Findings, quadratic: boolean) {
    this.name = name
    this.#findings = findings
    this.#quadratic = quadratic
  }

  /** The newest step that the client has begun, 0 before the first. */
  get step(): number {
    return this.#step
  }

  /** Begins behind the steps that the run has taken already. */
  resume(step: number): void {
    if (this.#step > 0) return
    this.#step = step
    this.#updates.next(step)
  }

  get parameters(): number {
    return this.#bound.length
  }

  /** Takes the declaration of the run, unless it is known. */
  declare(parameters: Parameters | undefined): void {
    if (!parameters || this.#bound.length > 0) return
    this.#bound = bind(parameters.map((of) => ({ ...of, data: new Float32Array(elementsOf(of)) })))
    this.#updates = new Updates(this.#bound, this.#step)
  }

  /** Waits for the answer to the last `end`; false where the step in progress is not over. */
  async over(): Promise<boolean> {
    await this.#settled
    return this.#isOver
  }

  /** Begins the next step. */
  begin(): void {
    this.#close()
    this.#step += 1
    this.#isOver = false
    this.#updates.next(this.#step)
  }

  /** The client has sent `end`. */
  ending(): void {
    this.#settled = new Promise((resolve) => {
      this.#settle = resolve
    })
  }

  /** The step is over, whether the client is told or not. */
  finish(): void {
    this.#isOver = true
    this.#settle()
  }

  /** The connection is gone: gradients and updates that were not whole begin again. */
  lost(): void {
    this.#updates.forget()
    this.#coming.clear()
  }

  /** How many bytes of an update must stay together. */
  unitOf(parameter: number): number {
    const { update_dtype } = this.#bound[parameter]
    return isDtype(update_dtype) ? bytesPerElement(update_dtype) : 1
  }

  /** A chunk that the client has sent. */
  sent({ parameter, offset, data }: GradientFrame): void {
    const bound = this.#bound[parameter]
    if (bound === undefined) return
    const coming = (offset > 0 && this.#coming.get(parameter)) || { chunks: [], bytes: 0 }
    coming.chunks.push(data)
    coming.bytes += data.length
    this.#coming.set(parameter, coming)
    this.#asked.add(parameter)
    if (bound.gradient_dtype === 'float32' && coming.bytes === 4 * bound.size) this.#whole(bound, coming)
  }

  /** A frame that the client is told. */
  told(frame: ServerFrame): void {
    if (frame.type === 'update' && frame.step === this.#step) this.#updates.take(frame)
    if (frame.type === 'error') this.#refused(frame)
    if (frame.type === 'receipt' && frame.step === this.#step) this.#receipt(frame)
  }

  #refused({ parameter }: ErrorFrame): void {
    if (parameter !== undefined) this.#asked.delete(parameter)
    this.#settle()
  }

  #receipt(frame: Extract<ServerFrame, { type: 'receipt' }>): void {
    for (const check of ['order', 'steps'] as const) this.#findings.pass(check)
    if (frame.skipped > 0) this.#findings.pass('skipped')
    this.#close()
    this.finish()
  }

  /** Whether the client has every update that it needs of the step. */
  #close(): void {
    for (const parameter of this.#asked) {
      if (this.#updates.has(parameter)) this.#findings.pass('answers')
      else this.#findings.fail('answers', this.#lacks(parameter))
    }
    this.#asked.clear()
    this.#coming.clear()
  }

  #lacks(parameter: number): string {
    const { name } = this.#bound[parameter]
    return `the update of '${name}' for step ${this.#step} was lost with the connection, and the client went on without it: its gradient has to be sent again`
  }

  #whole(bound: Bound, { chunks }: Coming): void {
    if (chunks.length > 1) this.#findings.pass('chunks')
    this.#coming.delete(bound.index)
    if (this.#quadratic && !this.#updates.has(bound.index)) this.#weigh(bound, Buffer.concat(chunks))
  }

  /** Holds a gradient, which is the weights, against those that the updates have led to. */
  #weigh({ index, name, data }: Bound, bytes: Uint8Array): void {
    const given = new Float32Array(Uint8Array.from(bytes).buffer)
    const isFirst = !this.#weighed.has(index)
    const wrong = isFirst ? -1 : given.findIndex((value, i) => !isClose(value, data[i]))
    if (wrong >= 0) {
      const what = `element ${wrong} of '${name}' is ${given[wrong]}, expected ${data[wrong]}`
      this.#findings.fail('arithmetic', `before step ${this.#step} ${what}`)
    } else if (!isFirst) this.#findings.pass('arithmetic')
    data.set(given)
    this.#weighed.add(index)
  }
}

/** How many elements of a parameter the client has. */
function elementsOf({ shape, ranges }: Parameters[number]): number {
  if (ranges) return ranges.reduce((sum, [start, stop]) => sum + stop - start, 0)
  return shape.reduce((product, extent) => product * extent, 1)
}

function isClose(one: number, other: number): boolean {
  return Object.is(one, other) || Math.abs(one - other) <= FUSED * (1 + Math.abs(one) + Math.abs(other))
}
