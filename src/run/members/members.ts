import { ServiceError } from '../../errors.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { MemberStatus } from '../../wire/frame.js'
import { Layout } from './layout.js'
import { type Connection, Member, memberId, ONLY, type Position, type Seat } from './member.js'

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
    this.#layout = new Layout(parameters, { seat: undefined })
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

  /** Every member of the run, and whether it has a connection. */
  get status(): MemberStatus[] {
    const { world_size } = this.#layout
    return [...this.#layout.positions()].map((position) => {
      return this.#statusOf(position, this.#connected.has(memberId({ ...position, world_size })))
    })
  }

  /** The replicas of which every rank has a connection. */
  get connectedReplicas(): number[] {
    const { replicas, world_size } = this.#layout
    const counts = Array.from({ length: replicas }, () => 0)
    for (const { replica } of this.#connected.values()) counts[replica] += 1
    return counts.flatMap((count, replica) => (count === world_size ? [replica] : []))
  }

  /** Whether a member other than that of a seat has a connection. */
  hasOthers(seat: Position | undefined): boolean {
    const fits = this.#layout.fits(seat)
    const own = memberId(seat ?? ONLY)
    return this.connected.some(({ id }) => !fits || id !== own)
  }

  /**
   * Throws RUN_BUSY where connections have the place that is asked for, and RUN_MISMATCH where they have the run in
   * another layout. `seat` is undefined for a connection that is to be the only one.
   */
  checkFree(seat: Position | undefined, takeover: boolean): void {
    const [one] = this.#connected.values()
    if (!one) return
    const run = `run '${this.#run}'`
    const own = this.#connected.get(memberId(seat ?? ONLY))
    if (this.#layout.fits(seat)) {
      if (takeover || !own) return
      const who = seat ? `${own.name} of ${run}` : run
      throw new ServiceError('RUN_BUSY', `${who} has a connection, open it with takeover to replace that`)
    }
    // Only rank 0 of replica 0 speaks for a layout.
    if (takeover && memberId(seat ?? ONLY) === 0) return
    const { world_size, replicas } = this.#layout
    const of = replicas > 1 ? ` in ${replicas} replicas` : ''
    const has = `${run} has ${this.#connected.size} connections of ${world_size * replicas} members${of}`
    if (!seat || !this.#layout.named)
      throw new ServiceError('RUN_BUSY', `${has}, open it with takeover to replace them`)
    const remedy = 'open it with that, or have rank 0 take it over'
    const given = `world_size ${seat.world_size}${replicas > 1 || seat.replicas ? `, replicas ${seat.replicas ?? 1}` : ''}`
    throw new ServiceError('RUN_MISMATCH', `${has}, ${given} given: ${remedy}`)
  }

  /** The layout that a seat is to be taken in: the present one as long as other members of it have a connection. */
  layoutFor(seat: Seat | undefined): Layout {
    const layout = this.#layout
    if (layout.fits(seat) && this.hasOthers(seat)) return layout
    return new Layout(this.#parameters, { seat, before: layout })
  }

  /**
   * Gives a connection its seat in a layout, and the others news of it. Answers the members whose places it has taken:
   * that of its rank, and with another layout all of them.
   */
  take(connection: Connection, layout: Layout, seat: Seat = ONLY): { member: Member; older: Member[] } {
    const own = memberId(seat)
    const older = layout === this.#layout ? this.connected.filter(({ id }) => id === own) : this.connected
    for (const { id } of older) this.#connected.delete(id)
    this.#layout = layout
    const member = new Member(connection, layout.declare(seat))
    this.#tell(member, true)
    this.#connected.set(member.id, member)
    this.#idleSince = undefined
    return { member, older: [...older] }
  }

  /** A member's connection is gone; answers whether it had its place still. */
  leave(member: Member): boolean {
    if (this.#connected.get(member.id) !== member) return false
    this.#connected.delete(member.id)
    this.#layout.leave(member.id)
    this.#tell(member, false)
    if (this.#connected.size === 0) this.#idleSince = performance.now()
    return true
  }

  #statusOf({ rank, replica }: { rank: number; replica: number }, connected: boolean): MemberStatus {
    return { rank, ...(this.#layout.averages && { replica }), connected }
  }

  #tell(member: Member, connected: boolean): void {
    if (!this.#layout.named) return
    const status = this.#statusOf(member, connected)
    for (const other of this.connected) other.changed(status)
    this.#changed(status)
  }
}
