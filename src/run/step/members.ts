import { ServiceError } from '../../errors.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { MemberStatus } from '../../wire/frame.js'
import { Layout } from './layout.js'
import { type Connection, Member, ONLY, type Seat } from './member.js'

/** The members of a run: which ranks there are, and the connection that each of them has at present. */
export class Members {
  readonly #run: string
  readonly #parameters: readonly Parameter[]
  #layout: Layout
  readonly #connected = new Map<number, Member>()
  #idleSince: number | undefined = performance.now()

  readonly #changed: (status: MemberStatus) => void

  /** `run` is the run's name, for messages; `changed` is told of every member that comes or goes. */
  constructor(run: string, parameters: readonly Parameter[], changed: (status: MemberStatus) => void) {
    this.#run = run
    this.#changed = changed
    this.#parameters = parameters
    this.#layout = new Layout(parameters, { world_size: 1, named: false })
  }

  get layout(): Layout {
    return this.#layout
  }

  /** The members that have a connection. */
  get connected(): readonly Member[] {
    return [...this.#connected.values()]
  }

  /** Since when no member has a connection, as `performance.now` counts; undefined while one has. */
  get idleSince(): number | undefined {
    return this.#idleSince
  }

  /** Every rank of the run, and whether it has a connection. */
  get status(): MemberStatus[] {
    const ranks = Array.from({ length: this.#layout.world_size }, (_, rank) => rank)
    return ranks.map((rank) => ({ rank, connected: this.#connected.has(rank) }))
  }

  /** Whether a member other than that of a seat has a connection. */
  hasOthers(seat: Seat | undefined): boolean {
    const fits = this.#layout.fits(seat)
    const { rank: own } = seat ?? ONLY
    return this.connected.some(({ rank }) => !fits || rank !== own)
  }

  /**
   * Throws RUN_BUSY where connections have the place that is asked for, and RUN_MISMATCH where they have the run in
   * another layout. `seat` is undefined for a connection that is to be the only one.
   */
  checkFree(seat: Seat | undefined, takeover: boolean): void {
    const [one] = this.#connected.values()
    if (!one) return
    const run = `run '${this.#run}'`
    if (this.#layout.fits(seat)) {
      if (takeover || !this.#connected.has(seat?.rank ?? 0)) return
      const who = seat ? `rank ${seat.rank} of ${run}` : run
      throw new ServiceError('RUN_BUSY', `${who} has a connection, open it with takeover to replace that`)
    }
    // Only rank 0 speaks for a layout.
    if (takeover && (seat?.rank ?? 0) === 0) return
    const has = `${run} has ${this.#connected.size} connections of ${this.#layout.world_size} members`
    if (!seat || !this.#layout.named)
      throw new ServiceError('RUN_BUSY', `${has}, open it with takeover to replace them`)
    const remedy = 'open it with that, or have rank 0 take it over'
    throw new ServiceError('RUN_MISMATCH', `${has}, world_size ${seat.world_size} given: ${remedy}`)
  }

  /** The layout that a seat is to be taken in: the present one as long as other members of it have a connection. */
  layoutFor(seat: Seat | undefined): Layout {
    const layout = this.#layout
    if (layout.fits(seat) && this.hasOthers(seat)) return layout
    const { world_size } = seat ?? ONLY
    return new Layout(this.#parameters, { world_size, named: seat !== undefined, before: layout })
  }

  /**
   * Gives a connection its seat in a layout, and the others news of it. Answers the members whose places it has taken:
   * that of its rank, and with another layout all of them.
   */
  take(connection: Connection, layout: Layout, seat: Seat = ONLY): { member: Member; older: Member[] } {
    const older = layout === this.#layout ? this.connected.filter(({ rank }) => rank === seat.rank) : this.connected
    for (const { rank } of older) this.#connected.delete(rank)
    this.#layout = layout
    const member = new Member(connection, layout.declare(seat))
    this.#tell({ rank: member.rank, connected: true })
    this.#connected.set(member.rank, member)
    this.#idleSince = undefined
    return { member, older: [...older] }
  }

  /** A member's connection is gone; answers whether it had its place still. */
  leave(member: Member): boolean {
    if (this.#connected.get(member.rank) !== member) return false
    this.#connected.delete(member.rank)
    this.#tell({ rank: member.rank, connected: false })
    if (this.#connected.size === 0) this.#idleSince = performance.now()
    return true
  }

  #tell(status: MemberStatus): void {
    if (!this.#layout.named) return
    for (const other of this.connected) other.changed(status)
    this.#changed(status)
  }
}
