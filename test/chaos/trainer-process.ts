import { MuondError } from '../../src/client/client.js'
import type { Weights } from './model.js'
import { type Outcome, Trainer } from './trainer.js'

/** The training that the process has to do: the first message to it. */
export type Order = { url: string; control: string; run: string; seconds: number }

/** The process's messages: weights after each step, and the end. */
export type Report =
  | { type: 'receipt'; step: number; weights: Weights }
  | { type: 'outcome'; outcome: Outcome }
  | { type: 'failed'; code: string; message: string }

// A trainer in a process of its own, which can be stopped and whose clock can be moved.
process.once('message', async ({ url, control, run, seconds }: Order) => {
  const trainer = new Trainer({
    ...{ url, run, control: () => control, signal: AbortSignal.timeout(seconds * 1000) },
    onReceipt: (step, { kept }) => say({ type: 'receipt', step, weights: kept.get(step) ?? [] }),
  })
  await say(await trainer.train().then(ended, failed))
  process.disconnect()
})

function ended(outcome: Outcome): Report {
  return { type: 'outcome', outcome }
}

function failed(error: unknown): Report {
  const code = error instanceof MuondError ? error.code : 'none'
  return { type: 'failed', code, message: String(error) }
}

function say(report: Report): Promise<void> {
  return new Promise((resolve) => process.send?.(report, () => resolve()))
}
