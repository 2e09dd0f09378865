import type { Demand } from '../../device/job.js'
import { planStep } from '../../optimizer/algorithms/algorithm.js'
import { type Groups, groupOf } from '../../optimizer/hyperparameters.js'
import { type Parameter, stateBytes } from '../../optimizer/parameter.js'

/** A parameter as a mean of replicas is computed for it: that is float32, whatever they send. */
export function withMeanGradient(parameter: Parameter): Parameter {
  const gradient_bytes = parameter.elements * Float32Array.BYTES_PER_ELEMENT
  const kernel_dtypes = { ...parameter.kernel_dtypes, gradient_dtype: 'float32' } as const
  return { ...parameter, gradient_dtype: 'float32', kernel_dtypes, gradient_bytes }
}

/** What steps of means demand of a device beside those of what is sent: the same where float32 is sent. */
export function meanDemands(parameters: readonly Parameter[], groups: Groups): Demand[] {
  const narrow = parameters.filter(({ gradient_dtype }) => gradient_dtype !== 'float32')
  return narrow.map(withMeanGradient).map((parameter) => {
    const { gradient_bytes, update_bytes } = parameter
    const plan = planStep(parameter, groupOf(parameter, groups), { step: 1, replay: false })
    return { plan, gradient_bytes, update_bytes, state_bytes: stateBytes(parameter) }
  })
}
