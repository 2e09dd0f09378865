import type { Attention } from '../../optimizer/attention.js'
import type { Groups } from '../../optimizer/hyperparameters.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { MemberStatus } from '../../wire/frame.js'
import type { Receipt, Waited } from '../history.js'
import type { Shard } from '../shard.js'
import type { Compute } from './part.js'
import type { Step } from './step.js'
import type { Steps } from './steps.js'

/** A run, as far as what its members send has to know it. */
export type Host = {
  readonly name: string
  readonly parameters: readonly Parameter[]
  readonly attentions: readonly Attention[]
  readonly shard: Shard
  readonly steps: Steps
  /** The groups with the hyperparameters of the step in progress. */
  groups(): Groups
  /** Set while work is done between two steps: no step may end before it resolves. */
  held(): Promise<unknown> | undefined
  /** When every job has been committed or dropped. */
  settled(): Promise<void>
  /** The step that a gradient is to be applied in, or computed again. Throws STEP_CONFLICT. */
  stepOfGradient(index: number, number: number): Step
  /** Computes a gradient of which all parts have come, or the mean of several. */
  readonly compute: Compute
  /** A member has come or gone. */
  changed(status: MemberStatus): void
  /** The receipt of the last finished step. */
  last(): Receipt | undefined
  /** Finishes the step in progress; `waited` are the seconds that its members have waited for each rank. */
  conclude(step: Step, waited: readonly Waited[]): Receipt | Promise<Receipt>
  /** The step in progress was closed without so many replicas. */
  leftOut(replicas: number): void
  /** Too few replicas have ended the step in progress. */
  quorumLost(): void
}
