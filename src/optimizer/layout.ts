import type { Dtype, WireDtype } from '../../kernels/dtype.js'
import type { Layout } from '../wire/frame.js'

/** One matrix of a parameter: contiguous, rows x cols, `offset` in elements from the tensor's start. */
export type Block = { readonly rows: number; readonly cols: number; readonly offset: number }

/**
 * A parameter as an algorithm plans it, before its state tensors are known. `blocks` are its matrices, one behind the
 * other; there are none where the algorithm is elementwise.
 */
export type LaidParameter = Layout & {
  readonly shape: readonly number[]
  readonly group: string
  readonly gradient_dtype: WireDtype
  readonly update_dtype: WireDtype
  /** The types in which kernels read the gradient and write the update. */
  readonly kernel_dtypes: { readonly gradient_dtype: Dtype; readonly update_dtype: Dtype }
  readonly elements: number
  readonly gradient_bytes: number
  readonly update_bytes: number
  readonly blocks: readonly Block[]
}
