import { encodeFrame } from '../../wire/codec.js'
import type { UpdateFrame } from '../../wire/frame.js'

/** An update that is not of the rows alone. */
export type WithData = UpdateFrame & { readonly data: Uint8Array }

/** How long updates are gathered whose chunks then alternate. A client that waits for one gets it after so long. */
const GATHERED_MS = 20

/**
 * Cuts updates into chunks of 1, 2, 4… elements, and has those of several updates alternate, the last update first.
 */
export class Alternation {
  readonly #waiting = new Map<number, Buffer[]>()
  #timer: NodeJS.Timeout | undefined

  /** `unit`: so many bytes stay together. `tell` gets each chunk when its turn has come. */
  add(frame: WithData, unit: number, tell: (message: Buffer) => void): void {
    const { parameter } = frame
    this.#waiting.set(parameter, [...(this.#waiting.get(parameter) ?? []), ...cutUp(frame, unit)])
    this.#timer ??= setTimeout(() => this.flush(tell), GATHERED_MS)
  }

  flush(tell: (message: Buffer) => void): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    const waiting = [...this.#waiting.values()].reverse()
    this.#waiting.clear()
    for (let i = 0; waiting.some((chunks) => i < chunks.length); i++)
      for (const chunks of waiting) if (i < chunks.length) tell(chunks[i])
  }
}

function* cutUp({ data, ...frame }: WithData, unit: number): Generator<Buffer> {
  const { type, parameter, step, offset } = frame
  for (let at = 0, chunk = 0; at < data.length; chunk++) {
    const end = Math.min(at + unit * 2 ** chunk, data.length)
    const keys = at === 0 ? frame : { type, parameter, step, offset: offset + at }
    yield encodeFrame({ ...keys, data: data.subarray(at, end) })
    at = end
  }
}
