import { errorText, ServiceError } from '../../../errors.js'
import type { Journal, JournalOptions } from '../../journal/journal.js'
import { type AppliedHead, type EndHead, encodeHead } from '../../journal/journal-format.js'
import type { Upload } from '../objects.js'
import { encodeEnd } from './journal-entry.js'
import type { JournalLog } from './journal-log.js'

/** The gradients of a step are in the object of the step up to so many bytes, and else in one of their own. */
const MOST_INLINE = 8 << 20
/** What parts of 8 MiB are enough for: more cannot be known before the step has ended. */
const MOST_BYTES = 10_000 * (8 << 20)

/** What was appended of the step in progress. */
type Pending = { records: Buffer[]; inline: Buffer[]; bytes: number; data?: { name: string; upload: Upload } }

const nothing = (): Pending => ({ records: [], inline: [], bytes: 0 })

/** Writes each finished step of a branch as an object; gradients of large steps go up while the step is received. */
export class ObjectJournal implements Journal {
  readonly #log: JournalLog
  readonly #branch: number
  readonly #what: string
  /** The steps up to this one are in a checkpoint. */
  #checkpointed: number
  #pending = nothing()
  #attempts = 0
  /** Parameters of the step in progress whose gradients were appended. */
  readonly #held = new Set<number>()
  #work: Promise<void> = Promise.resolve()
  #failure: { error: unknown } | undefined

  constructor(log: JournalLog, branch: number, { what, checkpointed }: JournalOptions) {
    this.#log = log
    this.#branch = branch
    this.#what = what
    this.#checkpointed = checkpointed
  }

  get bytes(): number {
    return this.#log.bytesAfter(this.#branch, this.#checkpointed)
  }

  holds(parameter: number): boolean {
    return this.#held.has(parameter)
  }

  append(head: AppliedHead, payload: Uint8Array): Promise<void> {
    this.#held.add(head.parameter)
    const taken = this.#work.then(() => (this.#failure ? undefined : this.#take(head, payload)))
    this.#work = taken.catch((error) => {
      this.#failure = { error }
    })
    return this.#work
  }

  async commit(end: EndHead, parameters: readonly number[]): Promise<void> {
    await this.#work
    try {
      if (this.#failure) throw this.#failure.error
      const lost = parameters.filter((parameter) => !this.#held.has(parameter))
      if (lost.length > 0) throw new Error(`the gradients of ${lost.length} parameters have to be sent again`)
      await this.#put(end)
    } catch (error) {
      await this.#takeBack()
      throw new ServiceError(
        'STORAGE_FAILED',
        `${this.#what} cannot be written, step ${end.step} is not finished: ${errorText(error)}`,
        { step: end.step, retry_after_seconds: 1 },
      )
    }
    this.#pending = nothing()
    this.#held.clear()
  }

  /** Each step is an object of its own. */
  async rotate(): Promise<void> {}

  async drop(step: number, until = step): Promise<void> {
    this.#checkpointed = step
    await this.#log.drop(this.#branch, until)
  }

  async close(): Promise<void> {
    await this.#work
    await this.#takeBack()
  }

  async #take(head: AppliedHead, payload: Uint8Array): Promise<void> {
    const pending = this.#pending
    pending.records.push(encodeHead(head, payload.length))
    pending.bytes += payload.length
    if (!pending.data && pending.bytes <= MOST_INLINE) {
      pending.inline.push(Buffer.from(payload))
      return
    }
    pending.data ??= this.#beginData()
    const { upload } = pending.data
    for (const piece of [...pending.inline.splice(0), payload]) await upload.write(piece)
  }

  #beginData(): { name: string; upload: Upload } {
    const name = this.#log.dataName(++this.#attempts)
    return { name, upload: this.#log.upload(name, MOST_BYTES) }
  }

  async #put(end: EndHead): Promise<void> {
    const { records, inline, bytes, data } = this.#pending
    await data?.upload.end()
    const heads = Buffer.concat([...records, encodeEnd(end)])
    const { generation } = this.#log
    const head = { kind: 'step', generation, branch: this.#branch, step: end.step } as const
    const sizes = { records: heads.length, gradients: bytes, data: data?.name }
    await this.#log.put({ ...head, ...sizes }, [heads, ...inline])
  }

  /** Forgets what was appended of the step in progress. What cannot be removed now is when the run is taken again. */
  async #takeBack(): Promise<void> {
    const { data } = this.#pending
    this.#pending = nothing()
    this.#held.clear()
    this.#failure = undefined
    await data?.upload.abort().catch(() => undefined)
  }
}
