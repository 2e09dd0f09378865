import { MuondError } from '../../src/client/client.js'
import type { Durability } from './site.js'
import { judge, lost, type Reference, type Verdict } from './stage.js'
import type { Outcome, Remedy, Trainer } from './trainer.js'

export type Decide = (error: MuondError) => Remedy | undefined | Promise<Remedy | undefined>

/** The remedy for a service that cannot write: ask again, or go back where the run was lost up to a checkpoint. */
export function askAgain({ code, fields }: MuondError): Remedy | undefined {
  if (code === 'STORAGE_FAILED' || code === 'CONNECTION_LOST') return 'again'
  return fields.expected_step === undefined ? 'give up' : undefined
}

/** Without a journal only the request for a checkpoint is told that it cannot be written. */
export async function takeCheckpoint(trainer: Trainer, decide: Decide): Promise<void> {
  try {
    await trainer.run.checkpoint()
  } catch (error) {
    if (!(error instanceof MuondError)) throw error
    trainer.refusals.push({ code: error.code, message: error.message, step: trainer.acknowledged })
    await decide(error)
  }
}

/**
 * The result must be the undisturbed run's, and an error must have said that writing failed: else nothing was shown.
 */
export function judgeUnwritable(outcome: Outcome, reference: Reference, durability: Durability): Verdict {
  const verdict = judge(outcome, reference, durability === 'journal')
  const codes = outcome.refusals.map(({ code }) => code)
  if (verdict.result === 'lost' || codes.includes('STORAGE_FAILED')) return verdict
  return lost(`no STORAGE_FAILED was told, only ${codes.join(', ') || 'nothing'}`)
}
