import { isBlockDtype } from '../../../kernels/dtype.js'
import type { OpenedFrame, OpenFrame, PlacedFrame } from '../../wire/frame.js'
import type { Connection } from '../connection.js'
import { MuondError } from '../error.js'
import type { Bound } from '../steps/parameter.js'
import { Arenas } from './arenas.js'

/** How gradients and updates may travel: `shm` is memory that client and service share, `auto` the fastest there is. */
export const TRANSPORTS = ['auto', 'shm', 'websocket'] as const
export type TransportKind = (typeof TRANSPORTS)[number]

export type Handshake = { connection: Connection; opened: OpenedFrame }

/** A run of several shards, and its control connection. */
export type Placing = { connection: Connection; opened?: undefined; placed: PlacedFrame }

/** The memory of one run that is offered with every `open`. Once it was taken it stays, whatever comes later. */
export class Transport {
  readonly #asked: TransportKind
  #arenas: Arenas | undefined
  #isOffered = true
  #isTold = false
  #hasAgreed = false
  /** The memory that the newest connection shares with the service. */
  taken: Arenas | undefined

  /**
   * Makes the memory that `asked` names; `auto` makes some for a service on this host alone.
   * @throws MuondError REQUEST_INVALID where it cannot be made and must be
   */
  constructor(asked: TransportKind, isLocal: boolean, parameters: readonly Bound[]) {
    this.#asked = asked
    if (asked === 'websocket' || (asked === 'auto' && (!isLocal || parameters.some(isInBlocks)))) return
    try {
      this.#arenas = new Arenas(parameters)
      /* c8 ignore next 4 -- a system without memfd, or without a descriptor left */
    } catch (error) {
      if (asked === 'auto') return
      throw new MuondError('REQUEST_INVALID', `transport 'shm' is not possible here: ${error}`, {}, { cause: error })
    }
  }

  /**
   * Opens a connection with what there is to offer; `shake` answers with it and the answer to its `open`.
   * @throws MuondError REQUEST_INVALID: what must be taken was not
   */
  async agree<S extends Handshake | Placing>(shake: (offers: Pick<OpenFrame, 'transport'>) => Promise<S>): Promise<S> {
    this.taken = undefined
    const offered = this.#isOffered ? this.#arenas : undefined
    const shaken = await shake(offered ? { transport: [offered.offer()] } : {})
    if (offered === undefined || shaken.opened === undefined) return shaken
    const { kind, refused = [] } = shaken.opened.transport ?? {}
    if (kind === 'shm' && offered.isProved) {
      this.#hasAgreed = true
      this.taken = offered
      return shaken
    }
    const isElsewhere = kind === 'shm'
    const reasons = isElsewhere
      ? "shm: the service does not see this process's memory"
      : refused.map(({ kind, reason }) => `${kind}: ${reason}`).join('; ')
    this.#fallBack(shaken.connection, reasons)
    if (!isElsewhere) return shaken
    // The service relies on memory that is not this: the run is opened again, without an offer.
    this.#isOffered = false
    await shaken.connection.close(new MuondError('CLIENT_CLOSED', reasons))
    return shake({})
  }

  /** Gives the memory back. */
  close(): void {
    this.taken = undefined
    this.#arenas?.close()
    this.#arenas = undefined
  }

  /** Tells once why no memory is shared. @throws MuondError where it must be */
  #fallBack(connection: Connection, why: string): void {
    if (this.#asked === 'shm') {
      const reason = why || 'the service shares no memory'
      const error = new MuondError('REQUEST_INVALID', `transport 'shm' was not taken: ${reason}`)
      connection.fail(error)
      throw error
    }
    // Of a step in flight the gradients may lie in memory that was taken first: that stays.
    if (!this.#hasAgreed) this.close()
    if (this.#isTold || why === '') return
    this.#isTold = true
    const message = `gradients and updates go over the socket, which is slower than shared memory: ${why}`
    process.emitWarning(`${message}. transport: 'websocket' asks for that`, { code: 'MUOND_TRANSPORT' })
  }
}

/** Whether the tensors of a parameter travel in blocks, which no memory is shared for. */
function isInBlocks({ gradient_dtype, update_dtype }: Bound): boolean {
  return isBlockDtype(gradient_dtype) || isBlockDtype(update_dtype)
}
