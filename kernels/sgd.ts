import type { Dtype } from './dtype.js'
import type { Graph } from './graph/graph.js'
import type { KernelValues } from './kernel.js'
import { momentum } from './momentum.js'

/** SGD with torch's momentum: the direction itself is the update. Without momentum c = (1, 0) and n = (0, 1). */
export function sgd(graph: Graph, gradient: string, updateDtype: Dtype): KernelValues {
  const { buffer, direction } = momentum(graph, gradient)
  // The update has the gradient's scale: a narrower type can overflow where float32 does not, so the cast value is
  // checked.
  const sent = updateDtype === 'float32' ? direction : graph.cast(graph.cast(direction, updateDtype), 'float32')
  return { next: [buffer], data: direction, checked: sent }
}
