import { ServiceError } from '../../src/errors.js'
import { FIRST_DIGEST } from '../../src/run/digest.js'
import type { Placed } from './head.js'
import type { Site } from './site.js'
import { Actor } from './world.js'

const AGAIN_MS = 300
/** A step takes a trainer so long at most, so that what goes wrong comes in every part of one. */
const COMPUTE_MS = 3000

/** A trainer that follows the protocol: it opens the whole and its shards, and sends a step until it has a receipt. */
export class Trainer {
  readonly actor = new Actor('trainer', 'trainer')
  isDone = false
  readonly #site: Site
  readonly #steps: number
  /** The digests of the steps that it has receipts of. */
  readonly #digests: string[]
  /** The head that has placed the whole. */
  #head: string | undefined
  /** Of the gradients: they are other ones each time that it has gone back. */
  #variant = 0

  constructor(site: Site, steps: number) {
    this.#site = site
    this.#steps = steps
    this.#digests = [FIRST_DIGEST]
    void this.#train()
  }

  get step(): number {
    return this.#digests.length - 1
  }

  async #train(): Promise<void> {
    const { world } = this.#site
    while (this.step < this.#steps) {
      try {
        const placed = await this.#open()
        while (this.step < this.#steps) await this.#takeStep(placed)
      } catch (error) {
        world.note(() => `trainer at step ${this.step}: ${error}`)
        await this.#resolve(error)
      }
      await world.sleep(AGAIN_MS, this.actor)
    }
    this.isDone = true
  }

  /** Opens the whole where it is, and its shards. */
  async #open(): Promise<Placed> {
    const { world, processes, monitor } = this.#site
    const asked = world.random.one(processes)
    const head = await this.#site.call(this.actor, asked.url, async ({ headUrl }) => headUrl)
    const placed = await this.#site.call(this.actor, head, (process) => process.place())
    monitor.told(placed.generation)
    this.#head = placed.head
    this.#compare(placed)
    const opened = placed.peers.map((peer, index) =>
      this.#site.call(this.actor, peer, (process) => process.enter(index, placed.generation)),
    )
    for (const { step } of await Promise.all(opened))
      if (step !== this.step && step !== this.step + 1)
        throw new ServiceError('STEP_CONFLICT', `a shard is at step ${step}, the trainer at ${this.step}`)
    return placed
  }

  /** The digest after the trainer's next step, if nothing but it makes the steps. */
  #next(): string {
    return this.#site.monitor.next(this.#digests.at(-1)!, this.step + 1, this.#variant)
  }

  /** Goes back where the whole has gone back, which it notes as an error that it was told. */
  #compare({ step, digest }: Placed): void {
    const { monitor } = this.#site
    // The whole may have committed a step whose receipt was lost.
    if (step === this.step + 1 && digest === this.#next()) return
    if (step < this.step) {
      monitor.errors.push(`the run has gone back from step ${this.step} to ${step}`)
      this.#digests.length = step + 1
      monitor.wentBack(step)
      this.#variant += 1
      monitor.variants += 1
    }
    if (step !== this.step || digest !== this.#digests[step])
      monitor.violated(`the trainer is at step ${this.step}, the whole at step ${step} with digest ${digest}`)
  }

  async #takeStep({ generation, head, peers }: Placed): Promise<void> {
    const { world, monitor } = this.#site
    const step = this.step + 1
    const variant = this.#variant
    await world.sleep(world.random.fraction() * COMPUTE_MS, this.actor)
    const sent = peers.map((peer, index) =>
      this.#site.call(this.actor, peer, (process) => process.shard(index).train(generation, step, variant)),
    )
    await Promise.all(sent)
    const digest = await this.#site.call(this.actor, head, (process) => process.end(step))
    monitor.received(step, digest)
    if (digest !== this.#next()) monitor.violated(`the receipt of step ${step} has digest ${digest}`)
    world.note(() => `trainer has receipt ${step}`)
    this.#digests.push(digest)
  }

  /**
   * Notes what sending again cannot get over; with a journal there is nothing of that kind. Where shards do not move the
   * head waits until somebody asks for going back.
   */
  async #resolve(error: unknown): Promise<void> {
    if (!(error instanceof ServiceError) || error.code !== 'STEP_CONFLICT') return
    const { monitor, moves } = this.#site
    monitor.errors.push(error.message)
    // Whether it comes to that shows when the trainer opens the whole again.
    if (!moves) await this.#site.call(this.actor, this.#head, (head) => head.goBack()).catch(() => undefined)
  }
}
