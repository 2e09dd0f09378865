/* c8 ignore start -- needs a GPU: npm run test:gpu */

import { addressOf, type HostRange } from '../job.js'
import type { TensorSpace } from '../onnx/onnx-executor.js'
import { openCuda } from './cuda.js'
import { ScratchMemory } from './scratch-memory.js'

/** Tensors in a GPU's memory, where nothing but ONNX Runtime computes: every step of a job is waited for. */
export function cudaSpace(gpu: number): TensorSpace {
  const cuda = openCuda(gpu)
  const stream = cuda.createStream()
  const scratch = new ScratchMemory(cuda)
  const place = (region: 'gradients' | 'updates', { block, bytes }: HostRange) => {
    if (block.resident) throw new Error(`${region} that lie on the GPU need kernels of our own`)
    return scratch.dealer()(region, bytes)
  }
  return {
    target: { gpu, stream: stream.pointer },
    receive: (gradient) => {
      const pointer = place('gradients', gradient)
      stream.copy(pointer, addressOf(gradient), gradient.bytes)
      return pointer
    },
    updateOf: (update) => place('updates', update),
    send: (update) => {
      stream.copy(addressOf(update), place('updates', update), update.bytes)
      stream.synchronize()
    },
    wait: () => stream.synchronize(),
    zeros: (bytes) => scratch.dealer()('products', bytes),
    load: (sizes) => {
      if (!sizes || !scratch.growTo(sizes, () => stream.synchronize())) return
      stream.clear(scratch.start('products'), scratch.bytes('products'))
    },
    close: () => {
      scratch.free()
      stream.destroy()
    },
  }
}
