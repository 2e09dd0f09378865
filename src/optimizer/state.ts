import { bytesPerElement } from '../../kernels/dtype.js'
import { type KernelSpec, kernelIo, type StateIo } from '../../kernels/kernel.js'
import type { Block, LaidParameter } from './layout.js'

/** A tensor that the service keeps for a parameter, under the name that torch has for it, if any. */
export type StateTensor = {
  readonly name: string
  readonly dtype: StateIo['dtype']
  readonly shape: readonly number[]
  readonly bytes: number
}

/** The state tensors of a parameter, in the order in which its kernel takes them. */
export function stateTensors(kernel: KernelSpec, { shape, blocks }: LaidParameter): StateTensor[] {
  return kernelIo(kernel).state.map(({ name, dtype, per }) => {
    const own = per === 'element' ? shape : lineShape(blocks)
    const bytes = own.reduce((product, size) => product * size, bytesPerElement(dtype))
    return { name, dtype, shape: own, bytes }
  })
}

/**
 * The shape of a state tensor with one number for each row or column of each matrix, whichever there are more of:
 * [rows, 1] or [1, cols] for one matrix, [matrices, rows, 1] or [matrices, 1, cols] for several of one shape, and one
 * list, matrix after matrix, where the shapes differ.
 */
function lineShape(blocks: readonly Block[]): number[] {
  const [{ rows, cols }] = blocks
  const alike = blocks.every((block) => block.rows === rows && block.cols === cols)
  if (!alike) return [blocks.reduce((sum, block) => sum + Math.max(block.rows, block.cols), 0)]
  const one = rows >= cols ? [rows, 1] : [1, cols]
  return blocks.length === 1 ? one : [blocks.length, ...one]
}
