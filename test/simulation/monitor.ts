import type { Entry } from '../../src/cluster/commit-log.js'
import { isSameEntry } from '../../src/cluster/commit-log.js'
import { nextDigest } from '../../src/run/digest.js'
import { recordOf } from '../cluster/records.js'

/** What has happened that a cluster which nothing disturbs does not know: whether a schedule was of any use. */
export const SEEN = ['taken over', 'went back', 'lost puts', 'old votes refused', 'heads deposed'] as const
export type Seen = (typeof SEEN)[number]

/** What nobody in the cluster can do: it sees everything at once, and notes what must never be. */
export class Monitor {
  readonly violations: string[] = []
  /** Errors that the trainer was told, and could not get over by sending again. */
  readonly errors: string[] = []
  readonly seen = new Map<Seen, number>(SEEN.map((what) => [what, 0]))
  /** What a head has taken for committed. */
  readonly #believed: { readonly head: string; readonly entry: Entry }[] = []
  readonly #finished = new Set<string>()
  /** The receipts that a trainer has, by step. */
  readonly #receipts = new Map<number, string>()
  readonly #all: readonly number[]
  /** The newest generation that a trainer was told. */
  #told = 0
  /** How often a trainer has gone back: each time its gradients are other ones from there on. */
  variants = 1

  constructor(
    readonly journal: boolean,
    parameters: readonly (readonly number[])[],
  ) {
    this.#all = parameters.flat().sort((one, other) => one - other)
  }

  /** The digest of the whole after a step, from the one before it. */
  next(previous: string, step: number, variant: number): string {
    return digestAfter(this.#all, { previous, step, variant })
  }

  saw(what: Seen): void {
    this.seen.set(what, this.seen.get(what)! + 1)
  }

  violated(what: string): void {
    this.violations.push(what)
  }

  assigned(before: number, next: number): void {
    if (next <= before) this.violated(`generation ${next} is assigned after generation ${before}`)
  }

  /** A trainer is told the generation of the whole. */
  told(generation: number): void {
    if (generation < this.#told) this.violated(`the trainer is told generation ${generation} after ${this.#told}`)
    this.#told = generation
  }

  /** The process that a generation's assignment names has finished a step of a shard. */
  finished(generation: number, shard: number, { step, digest }: { step: number; digest: string }): void {
    this.#finished.add(`${generation} ${shard} ${step} ${digest}`)
  }

  believes(head: string, entry: Entry): void {
    if (entry.kind === 'begin') return
    this.#believed.push({ head, entry })
    const { generation, step, shards } = entry
    for (const [shard, own] of shards.entries())
      if (!this.#finished.has(`${generation} ${shard} ${step} ${own}`))
        this.violated(
          `step ${step} is committed by ${head} in generation ${generation}, but shard ${shard} has not finished it`,
        )
  }

  received(step: number, digest: string): void {
    const before = this.#receipts.get(step)
    if (before !== undefined && before !== digest) this.violated(`two receipts of step ${step}: ${before}, ${digest}`)
    this.#receipts.set(step, digest)
  }

  /** The trainer goes back, and has no receipts of later steps any more. */
  wentBack(step: number): void {
    for (const later of [...this.#receipts.keys()]) if (later > step) this.#receipts.delete(later)
  }

  /** Looks at the log when all is over. */
  conclude(log: readonly Entry[]): void {
    for (const { head, entry } of this.#believed) {
      const stands = log[entry.position - 1]
      if (!stands || !isSameEntry(stands, entry))
        this.violated(
          `${head} has committed step ${entry.step} at ${entry.position}, where the log has ${stands?.head}'s step ${stands?.step}`,
        )
    }
    for (const [i, entry] of log.entries()) this.#checkEntry(log[i - 1], entry)
    const last = new Map<number, string>()
    for (const { step, digest } of log) last.set(step, digest)
    const reached = log.at(-1)?.step ?? 0
    for (const [step, digest] of this.#receipts)
      if (step > reached || last.get(step) !== digest)
        this.violated(`step ${step} was acknowledged, and the log does not have it`)
  }

  #checkEntry(before: Entry | undefined, entry: Entry): void {
    const { position, kind, step, generation } = entry
    const [least, from] = [before?.generation ?? 0, before?.step ?? 0]
    const what = `entry ${position}, ${kind} of step ${step} in generation ${generation},`
    if (generation < least) this.violated(`${what} comes after generation ${least}`)
    if (kind === 'commit' && (step !== from + 1 || entry.head !== before?.head))
      this.violated(`${what} comes after step ${from} of ${before?.head}`)
    if (kind === 'commit' && before && !this.#leadsOn(before, entry))
      this.violated(`${what} has digest ${entry.digest}`)
    if (kind === 'begin' && (step > from || (this.journal && step < from)))
      this.violated(`${what} comes after step ${from}`)
  }

  /** Whether the records of one variant lead from an entry to the next: no shard has another one than the others. */
  #leadsOn({ digest }: Entry, next: Entry): boolean {
    const variants = Array.from({ length: this.variants }, (_, variant) => variant)
    return variants.some((variant) => this.next(digest, next.step, variant) === next.digest)
  }
}

const known = new Map<string, string>()

/** The digest of these parameters after a step with gradients of a variant. */
export function digestAfter(
  parameters: readonly number[],
  { previous, step, variant }: { previous: string; step: number; variant: number },
): string {
  const key = `${parameters} ${previous} ${step} ${variant}`
  let digest = known.get(key)
  if (digest === undefined) {
    digest = nextDigest(
      previous,
      step,
      parameters.map((index) => recordOf(index, step, variant)),
    )
    known.set(key, digest)
  }
  return digest
}
