import { mkdirSync } from 'node:fs'
import { type Durability, Site } from './site.js'
import { type Fault, judge, type Reference } from './stage.js'

/** An undisturbed run, with which every other one is compared. */
export async function referenceOf(folder: string): Promise<Reference> {
  mkdirSync(folder, { recursive: true })
  const site = await Site.start({ folder, durability: 'journal' })
  const signal = AbortSignal.timeout(60_000)
  // The first run has the code compiled, so the second one takes as long as later ones.
  await site.train('first', signal)
  const framesByType = new Map<string, number>()
  site.proxy.meddle = ({ frame, label }) => {
    const type = label?.type ?? 'control'
    framesByType.set(type, (framesByType.get(type) ?? 0) + 1)
    return [frame.bytes]
  }
  const started = performance.now()
  const { weights, digests } = await site.train('second', signal)
  const seconds = (performance.now() - started) / 1000
  await site.clear()
  const frames = [...framesByType.values()].reduce((sum, count) => sum + count, 0)
  return { weights, digests: [...digests.values()], seconds, frames, framesByType }
}

/** No fault: both modes have the same result. */
export function undisturbed(): Fault[] {
  return (['journal', 'checkpoint'] as const).map((durability: Durability) => ({
    fault: 'none',
    aimed: durability,
    full: 3,
    isQuick: durability === 'journal',
    attempt: async ({ folder, signal, reference }) => {
      const site = await Site.start({ folder, durability })
      const outcome = await site.train('run', signal).finally(() => site.close())
      return judge(outcome, reference, durability === 'journal')
    },
  }))
}
