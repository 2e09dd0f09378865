import type { GroupRecord } from '../store/checkpoint/manifest.js'
import type { Segment } from '../store/journal/journal.js'
import { readSteps, type StoredStep } from '../store/journal/journal-reader.js'

/** What has to be known of all steps before the first one is computed again. */
export type Scanned = {
  readonly step: number
  /** Bytes of its gradients. */
  readonly bytes: number
  /** Whether a gradient is the mean of several replicas. */
  readonly isMean: boolean
  /** The learning rate of each group. */
  readonly lr: ReadonlyMap<string, number>
}

/**
 * The newest steps of a journal without a gap between them, the oldest first. Throws UnreadableError where a damaged
 * record stands before the end of a step.
 */
export async function scan(segments: readonly Segment[]): Promise<Scanned[]> {
  let scanned: Scanned[] = []
  for (const segment of segments) {
    for await (const stored of readSteps([segment], segment.first - 1)) {
      const before = scanned.at(-1)
      if (before && before.step + 1 !== stored.step) scanned = []
      scanned.push(factsOf(stored))
    }
  }
  return scanned
}

function factsOf({ step, gradients, end }: StoredStep): Scanned {
  return {
    step,
    bytes: gradients.reduce((sum, { bytes }) => sum + bytes, 0),
    isMean: gradients.some(({ applied }) => applied.contributors !== undefined),
    lr: new Map(end.settings.groups.map((group) => [group.name, lrOf(group)])),
  }
}

/** Every algorithm has one. */
function lrOf({ hyperparameters }: GroupRecord): number {
  return Number(hyperparameters.lr)
}
