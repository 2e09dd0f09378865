import { encodeFrame } from '../../wire/codec.js'
import type { UpdateFrame } from '../../wire/frame.js'

/** How long updates are gathered whose chunks then alternate. A client that waits for one gets it after so long. */
const GATHERED_MS = 20
/** So many chunks of one update are small; the last one has the rest. */
const SMALL_CHUNKS = 8

/**
 * Cuts updates into chunks of 1, 2, 4… elements, and has those of several updates alternate, the last update first.
 */
export class Alternation {
  readonly #waiting = new Map<number, Buffer[]>()
  #timer: NodeJS.Timeout | undefined

  /** `unit`: so many bytes stay together. `tell` gets each chunk when its turn has come. */
  add(frame: UpdateFrame, unit: number, tell: (message: Buffer) => void): void {
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

function* cutUp({ data, ...frame }: UpdateFrame, unit: number): Generator<Buffer> {
  const { type, parameter, step, offset } = frame
  const bytes = data ?? new Uint8Array()
  for (let at = 0, chunk = 0; at < bytes.length; chunk++) {
    const end = chunk < SMALL_CHUNKS ? Math.min(at + unit * 2 ** chunk, bytes.length) : bytes.length
    const keys = at === 0 ? frame : { type, parameter, step, offset: offset + at }
    yield encodeFrame({ ...keys, data: bytes.subarray(at, end) })
    at = end
  }
}
