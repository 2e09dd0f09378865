/* c8 ignore start -- needs a GPU: npm run test:gpu */

import type { TensorSpace } from '../onnx/onnx-executor.js'
import type { Span } from '../region.js'
import { openCuda } from './cuda.js'
import { ScratchMemory } from './scratch-memory.js'

/** Tensors in the memory of a GPU on which ONNX Runtime alone computes: each step of a job waits for the one before. */
export function cudaSpace(gpu: number): TensorSpace {
  const cuda = openCuda(gpu)
  const stream = cuda.createStream()
  const scratch = new ScratchMemory(cuda)
  const place = (what: 'gradients' | 'updates', { space, bytes }: Span) => {
    if (space === 'gpu') throw new Error(`${what} that lie on the GPU need kernels of our own`)
    return scratch.part(what, bytes)
  }
  return {
    target: { gpu, stream: stream.pointer },
    receive: (gradient) => {
      const pointer = place('gradients', gradient)
      stream.copy(pointer, gradient.pointer, gradient.bytes)
      return pointer
    },
    updateOf: (update) => place('updates', update),
    send: (update) => {
      stream.copy(update.pointer, place('updates', update), update.bytes)
      stream.synchronize()
    },
    wait: () => stream.synchronize(),
    zeros: (bytes) => scratch.part('products', bytes),
    load: (sizes) => {
      if (!sizes || !scratch.growTo(sizes, () => stream.synchronize())) return
      stream.clear(scratch.part('products'), scratch.bytes('products'))
    },
    close: () => {
      scratch.free()
      stream.destroy()
    },
  }
}
