import assert from 'node:assert'
import type { components } from '../../src/http/openapi.js'
import { numbersOf } from '../../src/store/checkpoint/checkpoint-id.js'

export type Listed = components['schemas']['Checkpoint']

/** The steps that a run has gone through: which step's gradients each of them had. */
export type History = readonly number[]

type Checkpoint = { id: string; branch: number; history: History; tags: string[]; path: readonly string[] }

/* c8 ignore start -- which of its branches are taken is for the random histories to say */
/** What a run and its checkpoints must be, told without a disk: a history is a list, and going back cuts it. */
export class RunModel {
  history: History
  /** The ids of the checkpoints that the run has gone through. */
  #path: readonly string[] = []
  readonly #checkpoints = new Map<string, Checkpoint>()
  readonly #kept: number
  /** A new checkpoint of this branch begins it. */
  constructor(kept: number, history: History) {
    this.#kept = kept
    this.history = history
  }

  /** Of all checkpoints, the oldest first. */
  get ids(): string[] {
    return this.#ordered([...this.#checkpoints.keys()])
  }

  get tags(): string[] {
    return [...new Set([...this.#checkpoints.values()].flatMap(({ tags }) => tags))].sort()
  }

  get #line(): Checkpoint[] {
    return this.#ordered(this.#path).flatMap((id) => this.#checkpoints.get(id) ?? [])
  }

  /** Whether a checkpoint would be another one than the newest. */
  get hasCheckpoint(): boolean {
    return this.#line.at(-1)?.history.join() === this.history.join()
  }

  /** The service has taken the checkpoint `listed`, or given the newest one a tag. */
  take({ checkpoint: id, branch }: Pick<Listed, 'checkpoint' | 'branch'>, tag?: string): void {
    if (this.hasCheckpoint) {
      const newest = this.#line.at(-1)
      assert.equal(id, newest?.id)
      if (tag !== undefined && !newest?.tags.includes(tag)) newest?.tags.push(tag)
      return
    }
    assert(!this.#checkpoints.has(id), `${id} is there already`)
    this.#path = [...this.#path, id]
    const tags = tag === undefined ? [] : [tag]
    this.#checkpoints.set(id, { id, branch, history: this.history, tags, path: this.#path })
    const untagged = this.#line.filter((each) => !isLedTo(each, this.#line))
    for (const each of untagged.slice(0, Math.max(0, untagged.length - this.#kept))) this.#checkpoints.delete(each.id)
  }

  /** The checkpoint that an id or a tag leads to. */
  find(name: string): Checkpoint | undefined {
    const isTagged = ({ tags }: Checkpoint) => tags.includes(name)
    const others = this.ids.flatMap((id) => this.#checkpoints.get(id) ?? []).filter(isTagged)
    const newest = Math.max(...others.map(({ branch }) => branch))
    return (
      this.#checkpoints.get(name) ?? this.#line.findLast(isTagged) ?? others.findLast(({ branch }) => branch === newest)
    )
  }

  /** The run is where a checkpoint is; what came after it stays where a tag leads to it. */
  goBack({ history, path }: Checkpoint): void {
    this.history = history
    this.#path = path
    const line = this.#line
    const left = this.ids.flatMap((id) => this.#checkpoints.get(id) ?? []).filter((each) => !line.includes(each))
    for (const each of left) {
      const same = left.filter(({ branch }) => branch === each.branch)
      if (!isLedTo(each, same)) this.#checkpoints.delete(each.id)
    }
  }

  /** The service was killed, and had no journal. */
  fallBack(): void {
    const newest = this.#line.at(-1)
    assert(newest)
    this.history = newest.history
  }

  /** What the service must list. */
  listed(
    digestOf: (history: History) => string,
  ): Pick<Listed, 'checkpoint' | 'step' | 'digest' | 'tags' | 'in_history'>[] {
    return this.ids.flatMap((id) => {
      const found = this.#checkpoints.get(id)
      if (!found) return []
      const { history, tags } = found
      const in_history = this.#path.includes(id)
      return [{ checkpoint: id, step: history.length, digest: digestOf(history), tags, in_history }]
    })
  }

  #ordered(ids: readonly string[]): string[] {
    return ids.toSorted((one, other) => {
      const [a, b] = [numbersOf(one), numbersOf(other)]
      return a[0] - b[0] || a[1] - b[1]
    })
  }
}

function isLedTo(each: Checkpoint, among: readonly Checkpoint[]): boolean {
  return each.tags.some((tag) => among.findLast(({ tags }) => tags.includes(tag)) === each)
}
