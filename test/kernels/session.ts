import assert from 'node:assert'
import { InferenceSession, Tensor } from 'onnxruntime-node'
import { type KernelSpec, kernelIo, type StateIo } from '../../kernels/kernel.js'
import { buildKernel } from '../../kernels/model.js'

export type KernelFeeds = {
  dims: readonly number[]
  gradient: ArrayLike<number>
  /** Missing tensors are zero. A missing scalar is NaN. */
  state?: Readonly<Record<string, ArrayLike<number>>>
  scalars: Readonly<Record<string, number>>
}

export type KernelRun = (feeds: KernelFeeds) => Promise<Record<string, Float32Array>>

/** A float32 kernel in ONNX Runtime's public API; its outputs by name. `half`: its products are of float16. */
export async function loadKernel(spec: KernelSpec, { half = false } = {}): Promise<KernelRun> {
  const session = await openSession(buildKernel(spec, { half }))
  const io = kernelIo(spec)
  return async ({ dims, gradient, state = {}, scalars }) => {
    const feeds: Record<string, Tensor> = { gradient: float32(gradient, dims) }
    for (const { name, per } of io.state) {
      const own = stateDims(per, dims)
      const size = own.reduce((product, dim) => product * dim, 1)
      feeds[name] = float32(state[name] ?? new Float32Array(size), own)
    }
    for (const name of io.scalars) feeds[name] = float32([scalars[name]], [1])
    const results = await session.run(feeds)
    return Object.fromEntries(Object.entries(results).map(([name, tensor]) => [name, values(tensor)]))
  }
}

function stateDims(per: StateIo['per'], dims: readonly number[]): readonly number[] {
  if (per === 'element') return dims
  return per === 'row' ? [dims[0]!, 1] : [1, dims[1]!]
}

/** One thread: the machine is shared and the tests are small. */
export function openSession(model: Uint8Array): Promise<InferenceSession> {
  return InferenceSession.create(model, { executionProviders: ['cpu'], intraOpNumThreads: 1, logSeverityLevel: 3 })
}

export function float32(data: ArrayLike<number>, dims: readonly number[]): Tensor {
  return new Tensor('float32', Float32Array.from(data), dims)
}

export function values(tensor: Tensor): Float32Array {
  assert(tensor.data instanceof Float32Array, `tensor has type ${tensor.type}, expected float32`)
  return tensor.data
}
