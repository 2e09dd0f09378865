import type { Attention } from '../optimizer/attention.js'
import { allStateBytes } from '../optimizer/parameter.js'
import type { Run } from '../run/run.js'
import { effectiveGroups } from '../run/step/conclusion.js'
import type { Manifest } from '../store/checkpoint/manifest.js'
import type { Identity } from '../store/identity.js'
import type { OpenedFrame } from '../wire/frame.js'
import { keptDeclaration } from './restore.js'

/** What is known of a run that is on the disk and not in memory: as it was when it left, or as its manifest says. */
export type IdleRun = Pick<OpenedFrame, 'epoch' | 'step' | 'digest' | 'groups' | 'note'> & {
  readonly attentions: readonly Attention[]
  readonly name: string
  readonly created_at: string
  /** How many parameters it has. */
  readonly parameters: number
  readonly durable_step: number
  /** Bytes of state that it takes when it is back in memory. */
  readonly state_bytes: number
}

/** A run as it leaves memory; `durable_step` is the one that it comes back at. */
export function idleRun(run: Run, durable: { step: number; digest: string }): IdleRun {
  const { name, created_at, parameters, attentions, fullStateBytes } = run
  const { epoch, groups, note } = run.opened(true)
  const { step, digest } = durable
  return {
    ...{ name, created_at, epoch, step, digest, durable_step: step, parameters: parameters.length },
    ...{ groups, attentions, state_bytes: fullStateBytes, ...(note !== undefined && { note }) },
  }
}

/** A run that nobody has brought to memory yet: after its newest checkpoint a journal may have more steps. */
export function idleOnDisk(manifest: Manifest, { epoch }: Identity): IdleRun {
  const { run: name, created_at, step, digest } = manifest
  const { groups, attentions, parameters } = keptDeclaration(manifest)
  return {
    ...{ name, created_at, epoch, step, digest, durable_step: step, parameters: parameters.length },
    ...{ groups: effectiveGroups(groups), attentions, state_bytes: allStateBytes(parameters) },
  }
}
