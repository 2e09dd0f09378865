import type { Step } from '../steps/step.js'
import type { Part } from './part.js'

/** Gives each shard its own of a step that grows, until that has ended. */
export async function shareOut(step: Step, parts: readonly Part[], steps: readonly Step[]): Promise<void> {
  const owner = new Map(parts.flatMap(({ indices }, part) => indices.map((index, local) => [index, { part, local }])))
  for (let shared = 0; ; ) {
    for (; shared < step.gradients.length; shared++) {
      const [index, bytes] = step.gradients[shared]
      const own = owner.get(index)
      if (own) steps[own.part].add(own.local, bytes)
    }
    const { end } = step
    if (end !== undefined && shared === step.gradients.length) {
      for (const [i, part] of parts.entries()) steps[i].finish(ownOf(end.skipped, part), end.weight)
      return
    }
    await step.more()
  }
  /* c8 ignore next -- the loop ends with return */
}

function ownOf(skipped: readonly number[] = [], part: Part): number[] {
  return skipped.flatMap((index) => part.local(index) ?? [])
}
