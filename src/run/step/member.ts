import type { Ticket } from '../../device/device.js'
import type { ServiceError } from '../../errors.js'

/** The connection that a member speaks through. */
export type Connection = {
  /** Ends the connection with 4409: another one has taken its place in the run. */
  fence(): void
  /** Ends the connection because its run is gone or the device has failed. */
  expel(error: ServiceError): void
}

/**
 * One connection's place in a run, from the `open` that gave it until it is lost. Its jobs are computed as long as it
 * lasts.
 */
export class Member {
  /** Cancelled when the member is lost: jobs that no lane has begun are dropped. */
  readonly ticket: Ticket = { cancelled: false }
  readonly #connection: Connection | undefined

  /** A journal whose steps are computed again is a member without a connection: nobody can take its place. */
  constructor(connection?: Connection) {
    this.#connection = connection
  }

  get lost(): boolean {
    return this.ticket.cancelled
  }

  /** Its connection is gone. */
  lose(): void {
    this.ticket.cancelled = true
  }

  /** Another connection has taken its place. */
  fence(): void {
    this.lose()
    this.#connection?.fence()
  }

  /** Tells the connection why it has to go. */
  expel(error: ServiceError): void {
    this.#connection?.expel(error)
  }
}
