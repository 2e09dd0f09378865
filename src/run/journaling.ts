import assert from 'node:assert'
import type { Region } from '../device/region.js'
import type { Journal } from '../store/journal/journal.js'
import type { Receipt } from './history.js'
import { appliedRecord, settingsRecord } from './record.js'
import type { Shard } from './shard.js'
import type { Step } from './step/step.js'
import type { Steps } from './step/steps.js'

type JournalingMeans = {
  shard: Shard
  steps: Steps
  /** The gradient that was applied to a parameter in a step; undefined where it is not kept. The caller releases it. */
  applied: (index: number, step: number) => Region | undefined
}

/** What a run's journal is given. */
export class Journaling {
  /** Has every step before it is acknowledged; undefined where a step is only in the next checkpoint. */
  journal: Journal | undefined
  readonly #means: JournalingMeans

  constructor(means: JournalingMeans) {
    this.#means = means
  }

  /** Has the journal take a gradient that it lacks: it was just applied, or is sent again because the disk was full. */
  store({ number: step }: Step, index: number, gradient: Region): void {
    const { journal } = this
    const { steps, shard } = this.#means
    const { record } = shard.place(index)
    if (journal === undefined || step !== steps.current.number || journal.holds(index)) return
    assert(record, 'what was computed has a record')
    const kept = gradient.retain()
    void journal
      .append({ type: 'gradient', step, parameter: index, applied: appliedRecord(record) }, kept.view)
      .then(() => kept.release())
  }

  /** Has a journal write the end of the step in progress, and all that it lacks of it. */
  async commit(journal: Journal, receipt: Receipt): Promise<void> {
    const { current: step } = this.#means.steps
    const { digest } = receipt
    const settings = settingsRecord(step.settings)
    const skipped = this.#means.shard.parameters.flatMap(({ index }) => (step.hasApplied(index) ? [] : [index]))
    this.#storeApplied(step)
    await step.end(() =>
      journal.commit({ type: 'end', step: step.number, digest, skipped, settings, receipt }, step.applied),
    )
  }

  /** What the journal lacks of the gradients that members have put together: they need not send it again. */
  #storeApplied(step: Step): void {
    for (const index of step.applied) {
      const gradient = this.#means.applied(index, step.number)
      if (gradient) this.store(step, index, gradient)
      gradient?.release()
    }
  }
}
