import type { Grant } from '../device/admission.js'
import type { Tensor } from '../device/memory.js'
import type { Attention } from '../optimizer/attention.js'
import type { Groups } from '../optimizer/hyperparameters.js'
import type { Parameter } from '../optimizer/parameter.js'
import type { ReceiptLimits } from './history.js'

/**
 * The state of a checkpoint: `tensors` has those of each parameter, undefined where it has none; `elsewhere`: of
 * another kind of device.
 */
export type RestoredState = { tensors: readonly (Tensor[] | undefined)[]; elsewhere: boolean; note: string }

/** `grant` is the memory that the device has admitted: the run gives it back. */
export type RunOptions = {
  name: string
  created_at?: string
  groups: Groups
  parameters: readonly Parameter[]
  attentions: readonly Attention[]
  grant: Grant
  receipts: ReceiptLimits
}
