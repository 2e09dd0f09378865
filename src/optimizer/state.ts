import { bytesPerElement } from '../../kernels/dtype.js'
import { type KernelSpec, kernelIo, type StateIo } from '../../kernels/kernel.js'
import type { Block, Laid } from './parameter.js'

/** One tensor that the service keeps for a parameter, under torch's name for it where torch has it. */
export type StateTensor = {
  readonly name: string
  readonly dtype: StateIo['dtype']
  readonly shape: readonly number[]
  readonly bytes: number
}

/** The state tensors of a parameter, in the order of its kernel. */
export function stateTensors(kernel: KernelSpec, { shape, blocks }: Laid): StateTensor[] {
  return kernelIo(kernel).state.map(({ name, dtype, per }) => {
    const own = per === 'element' ? shape : lineShape(blocks)
    const bytes = own.reduce((product, size) => product * size, bytesPerElement(dtype))
    return { name, dtype, shape: own, bytes }
  })
}

/**
 * One number for each line of the longer side of each matrix: [rows, 1] or [1, cols] for one matrix, with the number of
 * matrices in front for several of one shape, and one list, matrix after matrix, where their shapes differ.
 */
function lineShape(blocks: readonly Block[]): number[] {
  const [{ rows, cols }] = blocks
  const alike = blocks.every((block) => block.rows === rows && block.cols === cols)
  if (!alike) return [blocks.reduce((sum, block) => sum + Math.max(block.rows, block.cols), 0)]
  const one = rows >= cols ? [rows, 1] : [1, cols]
  return blocks.length === 1 ? one : [blocks.length, ...one]
}
