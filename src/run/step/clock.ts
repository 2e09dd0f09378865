import type { StepSeconds } from '../../wire/frame.js'

/** Seconds that a step has spent in each phase, summed over its parameters. */
export type Seconds = { -readonly [Phase in keyof StepSeconds]: number }

/** When the first work of a phase began and the last one ended, in milliseconds as `performance.now` counts. */
export type Span = { began: number; ended: number }

/** Where the time of one step goes. Work of a phase overlaps: its seconds may be more than its span. */
export class StepClock {
  readonly seconds: Seconds = { receive: 0, queue: 0, compute: 0, send: 0 }
  readonly spans = new Map<keyof Seconds, Span>()
  #began = performance.now()
  #hasBegun = false

  /** When the first frame of the step came; before that, when the step was made. */
  get began(): number {
    return this.#began
  }

  /** A frame of the step has come. */
  begin(): void {
    if (!this.#hasBegun) this.#began = performance.now()
    this.#hasBegun = true
  }

  /** Adds work of a phase that ends now. */
  spend(phase: keyof Seconds, seconds: number): void {
    this.seconds[phase] += seconds
    const ended = performance.now()
    const began = ended - seconds * 1000
    const span = this.spans.get(phase)
    if (span === undefined) this.spans.set(phase, { began, ended })
    else Object.assign(span, { began: Math.min(span.began, began), ended })
  }
}
