import type { WebSocket } from 'ws'

/** A frame has to wait for something; small frames, or bytes, come too fast; a large message finds no room. */
export type PauseReason = 'frames' | 'small' | 'rate' | 'room'

/** Why a socket is not read: as long as there is a reason. */
export class Pauses {
  readonly #socket: WebSocket
  readonly #reasons = new Set<PauseReason>()

  constructor(socket: WebSocket) {
    this.#socket = socket
  }

  has(reason: PauseReason): boolean {
    return this.#reasons.has(reason)
  }

  begin(reason: PauseReason): void {
    this.#reasons.add(reason)
    this.#socket.pause()
  }

  end(reason: PauseReason): void {
    this.#reasons.delete(reason)
    if (this.#reasons.size === 0) this.#socket.resume()
  }

  /** Begins a pause, unless there is one for this reason, that ends once `wait` answers that no millisecond is left. */
  until(reason: PauseReason, wait: () => number): void {
    if (this.#reasons.has(reason)) return
    this.begin(reason)
    const goOn = () => {
      const more = wait()
      if (more > 0) setTimeout(goOn, more).unref()
      else this.end(reason)
    }
    setTimeout(goOn, wait()).unref()
  }
}
