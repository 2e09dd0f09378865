import type { ControlConnection } from '../cluster/head/head.js'
import type { OpenedWhole } from '../cluster/head/wholes.js'
import { ServiceError } from '../errors.js'
import { checkTag } from '../keep/keeper.js'
import type { CheckpointFrame, ClientFrame, EndFrame, OpenFrame, ServerFrame } from '../wire/frame.js'

export type ControlMeans = {
  send: (frame: ServerFrame) => void
  report: (error: unknown) => void
  /** Throws FORBIDDEN where the key may take no checkpoint. */
  checkCheckpoint: () => void
  /** An `end` was answered. */
  ended: () => void
}

/** A connection that has opened a whole: it asks for receipts and checkpoints of all shards together. */
export class Control implements ControlConnection {
  readonly #opened: OpenedWhole
  readonly #means: ControlMeans
  readonly #leave: () => void
  /** The step that the client waits for. */
  #waiting: number | undefined
  /** The last step that it was told of. */
  #told: number

  constructor(opened: OpenedWhole, means: ControlMeans) {
    this.#opened = opened
    this.#means = means
    this.#told = opened.placement.step
    this.#leave = opened.head.join(this)
  }

  get run(): string {
    return this.#opened.head.run
  }

  /** Whether the client waits for a receipt. */
  get busy(): boolean {
    return this.#waiting !== undefined
  }

  /** Takes a frame; the answer comes when there is one, and the connection is read meanwhile. */
  take(frame: Exclude<ClientFrame, OpenFrame>): void {
    if (frame.type === 'end') return void this.#end(frame)
    if (frame.type === 'checkpoint') return this.#checkpoint(frame)
    const message = `a frame '${frame.type}' on the control connection of run '${this.run}', expected end or checkpoint: others go to its shards`
    throw new ServiceError('FRAME_UNEXPECTED', message)
  }

  superseded(error: ServiceError): void {
    this.#means.report(error)
  }

  /** The connection is gone. */
  close(): void {
    this.#leave()
  }

  #end({ step, skipped, weight }: EndFrame): void {
    if (skipped !== undefined || weight !== undefined)
      throw new ServiceError(
        'FRAME_UNEXPECTED',
        "an 'end' with skipped or weight on a control connection: they go to the shards",
      )
    if (this.#waiting !== undefined)
      throw new ServiceError('FRAME_UNEXPECTED', `an 'end' for step ${step} while that of step ${this.#waiting} waits`)
    this.#waiting = step
    const over = () => {
      this.#waiting = undefined
    }
    this.#opened.head.ended(step).then(
      (receipt) => {
        over()
        this.#means.send({ ...receipt, replayed: step <= this.#told })
        this.#told = Math.max(this.#told, step)
        this.#means.ended()
      },
      (error) => {
        over()
        this.#means.report(error)
      },
    )
  }

  #checkpoint({ tag }: CheckpointFrame): void {
    this.#means.checkCheckpoint()
    this.#opened.head.checkpoint(checkTag(tag)).then(
      ({ checkpoint, step, digest, bytes }) => {
        this.#means.send({ type: 'checkpointed', checkpoint, step, digest, bytes })
      },
      (error) => this.#means.report(error),
    )
  }
}
