import { fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { manage } from '../../examples/service.js'
import { firstWeights, type Weights } from './model.js'
import { preload } from './server.js'
import type { Site } from './site.js'
import type { Outcome } from './trainer.js'
import type { Order, Report } from './trainer-process.js'

const PROGRAM = fileURLToPath(new URL('./trainer-process.js', import.meta.url))
const SECONDS = 240

export type TrainerChild = {
  /** Weights by step, as far as the trainer has reported them. */
  kept: Map<number, Weights>
  signal: (signal: NodeJS.Signals) => void
  /** The end of the training: its outcome, or the code and message of its error. */
  ended: Promise<Outcome | { code: string; message: string }>
}

/** Starts a trainer in a process of its own, through a site's proxy. */
export function startTrainer(site: Site, run: string, clock?: string): TrainerChild {
  const child = fork(PROGRAM, [], {
    execArgv: preload(clock),
    serialization: 'advanced',
    env: { ...process.env, ...(clock && { CHAOS_CLOCK: clock }) },
  })
  const { stop } = manage(child)
  const kept = new Map([[0, firstWeights()]])
  const ended = new Promise<Awaited<TrainerChild['ended']>>((resolve) => {
    child.on('message', (report: Report) => {
      if (report.type === 'receipt') kept.set(report.step, report.weights)
      if (report.type === 'outcome') resolve(report.outcome)
      if (report.type === 'failed') resolve({ code: report.code, message: report.message })
    })
    once(child, 'exit').then(([code]) => resolve({ code: 'none', message: `the trainer's process ended with ${code}` }))
  })
  ended.then(stop)
  const order: Order = { url: site.proxy.url, control: site.control(), run, seconds: SECONDS }
  child.send(order)
  return { kept, signal: (signal) => void child.kill(signal), ended }
}
