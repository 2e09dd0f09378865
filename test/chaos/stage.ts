import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { seeded } from '../reference.js'
import { LAST } from './model.js'
import type { Result, Row } from './table.js'
import type { Outcome } from './trainer.js'

/** An undisturbed run: its outcome, its seconds, and the number of its frames, in all and by type. */
export type Reference = {
  weights: string
  digests: readonly string[]
  seconds: number
  frames: number
  framesByType: ReadonlyMap<string, number>
}

/** A case: its random numbers come from its seed, and its files lie in its folder. */
export type Case = {
  index: number
  seed: number
  random: () => number
  folder: string
  reference: Reference
  /** Aborts a case that waits for something that does not come. */
  signal: AbortSignal
}

/** The results of a case, `times` of them alike; `reason` says why it was lost. */
export type Verdict = { result: Result; fell?: boolean; reason?: string; times?: number }

/** A row of the table: `full` cases in a whole run. */
export type Fault = Pick<Row, 'fault' | 'aimed' | 'note'> & {
  full: number
  /** Whether a quick run has the row, too. */
  isQuick?: boolean
  attempt(the: Case): Promise<Verdict | Verdict[]>
  /** Called after the last case. */
  end?(): Promise<void>
}

export type Failure = { fault: string; aimed: string; seed: number; reason: string; folder: string }

export type Stage = {
  /** The folder that has the folders of all cases. */
  folder: string
  seed: number
  reference: Reference
  /** Called after every case. */
  done: (fault: Fault) => void
}

// Far longer than any case takes.
const CASE_MS = 300_000

/**
 * Runs the cases of a fault, one after the other. A case that throws is a loss; its reason has the seed and the
 * folder.
 */
export async function carryOut(stage: Stage, fault: Fault, count: number): Promise<{ row: Row; failures: Failure[] }> {
  const started = performance.now()
  const verdicts: Verdict[] = []
  const failures: Failure[] = []
  const { fault: name, aimed, note } = fault
  for (let index = 0; index < count; index++) {
    const seed = seedOf(`${stage.seed} ${name} ${aimed} ${index}`)
    const folder = join(stage.folder, `${name} ${aimed} ${index}`.replace(/[^\w.]+/g, '-'))
    mkdirSync(folder, { recursive: true })
    const signal = AbortSignal.timeout(CASE_MS)
    const the = { index, seed, random: seeded(seed), folder, reference: stage.reference, signal }
    const found = [await fault.attempt(the).catch(lostBy)].flat()
    verdicts.push(...found)
    for (const { result, reason = '' } of found) {
      if (result === 'lost') failures.push({ fault: name, aimed, seed, reason, folder })
    }
    stage.done(fault)
  }
  await fault.end?.()
  const seconds = (performance.now() - started) / 1000
  return { row: { fault: name, aimed, ...counted(verdicts), seconds, ...(note && { note }) }, failures }
}

function counted(verdicts: readonly Verdict[]): Omit<Row, 'fault' | 'aimed' | 'seconds' | 'note'> {
  const times = (of: (verdict: Verdict) => boolean | undefined) =>
    verdicts.filter(of).reduce((sum, { times = 1 }) => sum + times, 0)
  const isTold = verdicts.some(({ fell }) => fell !== undefined)
  return {
    count: times(() => true),
    ...(isTold && { fell: times(({ fell }) => fell) }),
    same: times(({ result }) => result === 'same'),
    error: times(({ result }) => result === 'error'),
    lost: times(({ result }) => result === 'lost'),
  }
}

export function lost(reason: string): Verdict {
  return { result: 'lost', reason }
}

function lostBy(error: unknown): Verdict {
  return lost(error instanceof Error ? `${error.name}: ${error.message}` : String(error))
}

/** Compares the outcome of a training run with the undisturbed one. With a journal no acknowledged step may be gone. */
export function judge(outcome: Outcome, { weights, digests }: Reference, journal: boolean): Verdict {
  for (const [step, digest] of outcome.digests) {
    if (digest !== digests[step - 1]) return lost(`step ${step} has digest ${digest}, expected ${digests[step - 1]}`)
  }
  if (outcome.digest !== digests[LAST - 1])
    return lost(`the digest is ${outcome.digest}, expected ${digests[LAST - 1]}`)
  if (outcome.weights !== weights) return lost(`the weights have SHA-256 ${outcome.weights}, expected ${weights}`)
  const [fallBack] = outcome.fallBacks
  if (journal && fallBack)
    return lost(`step ${fallBack.acknowledged} was acknowledged, the run resumed at step ${fallBack.resumed}`)
  const wrong = outcome.durable.find((durable) => durable !== journal)
  if (wrong !== undefined) return lost(`a receipt says durable ${wrong}, expected ${journal}`)
  return { result: outcome.refusals.length > 0 ? 'error' : 'same' }
}

/** A 32-bit hash of a text (FNV-1a). */
function seedOf(text: string): number {
  let hash = 0x811c9dc5
  for (const byte of Buffer.from(text)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0
  return hash
}
