import type { MemberStatus } from '../wire/frame.js'

/**
 * Members of a run that have come or gone, of which a connection's client was not told yet. The changes of one turn of
 * the event loop are told in one frame, and none before `opened`.
 */
export class News {
  readonly #tell: (members: readonly MemberStatus[]) => void
  readonly #changes = new Map<string, MemberStatus>()
  #isOpened = false

  constructor(tell: (members: readonly MemberStatus[]) => void) {
    this.#tell = tell
  }

  add(status: MemberStatus): void {
    this.#changes.set(`${status.replica} ${status.rank}`, status)
    if (this.#changes.size === 1 && this.#isOpened) setImmediate(() => this.#tellAll())
  }

  /** `opened` says how it is now. */
  forget(): void {
    this.#changes.clear()
  }

  /** `opened` is out. */
  begin(): void {
    this.#isOpened = true
    /* c8 ignore next -- another member comes while the answer is made */
    if (this.#changes.size > 0) this.#tellAll()
  }

  #tellAll(): void {
    const members = [...this.#changes.values()]
    this.#changes.clear()
    this.#tell(members)
  }
}
