import type { EndFrame, ErrorFrame, StepFrame } from '../../wire/frame.js'

export type StepOptions = {
  /** {group: {hyperparameter: value}}, from this step on. */
  groups?: StepFrame['groups']
  /** Multiplied into every gradient of this step; default 1. */
  gradient_scale?: number
  /** {attention: the largest softmax input of each query head over the whole batch}; left out, nothing is clipped. */
  max_logits?: StepFrame['max_logits']
  /**
   * The span of the trainer that the service's span of this step is below: the W3C's `00-<trace>-<span>-<flags>`.
   */
  traceparent?: string
  /**
   * End the step without the gradients that the service refuses because they are not finite; `refused` of its receipt
   * has their errors. Default false: a refused gradient rejects the step.
   */
  skip_refused?: boolean
}

/**
 * What the trainer said about one step, kept until its receipt so that all of it can be sent again. Gradients are held
 * by reference. It grows while it is being sent: `more` tells the sender.
 */
export class Step {
  readonly number: number
  readonly frame: StepFrame | undefined
  readonly skip_refused: boolean
  /** Parameter index and bytes, in the order the trainer gave them. */
  readonly gradients: [parameter: number, bytes: Uint8Array][] = []
  /**
   * The refusals that the step is ended without, by parameter; those of earlier connections too. Such a gradient is not
   * sent again: once the step has ended without it, the service would refuse it with STEP_CONFLICT.
   */
  readonly leftOut = new Map<number, ErrorFrame>()
  #end: EndFrame | undefined
  readonly #parameters = new Set<number>()
  readonly #waiting: (() => void)[] = []

  constructor(number: number, { skip_refused = false, ...options }: StepOptions) {
    this.number = number
    this.skip_refused = skip_refused
    const said = Object.values(options).some((value) => value !== undefined)
    this.frame = said ? { type: 'step', step: number, ...options } : undefined
  }

  /** Set once all gradients are there. */
  get end(): EndFrame | undefined {
    return this.#end
  }

  has(parameter: number): boolean {
    return this.#parameters.has(parameter)
  }

  add(parameter: number, bytes: Uint8Array): void {
    this.#parameters.add(parameter)
    this.gradients.push([parameter, bytes])
    this.#grew()
  }

  finish(skipped: readonly number[], weight?: number): void {
    const given = { ...(skipped.length > 0 && { skipped }), ...(weight !== undefined && { weight }) }
    this.#end = { type: 'end', step: this.number, ...given }
    this.#grew()
  }

  /** Resolves when there is another gradient, or the end. */
  more(): Promise<void> {
    return new Promise((resolve) => this.#waiting.push(resolve))
  }

  /** A sender whose connection is gone may be waiting beside its successor: it wakes too, fails and ends. */
  #grew(): void {
    for (const resolve of this.#waiting.splice(0)) resolve()
  }
}
