import { DTYPES } from '../kernels/dtype.js'
import { newtonSchulzFlops } from '../kernels/flops.js'
import { Graph } from '../kernels/graph/graph.js'
import type { KernelSpec } from '../kernels/kernel.js'
import { expandCoefficients, NAMED_COEFFICIENTS } from '../kernels/orthogonalize/coefficients.js'
import { Device } from '../src/device/device.js'
import type { Job } from '../src/device/job.js'
import { openOnnxRuntime, viewMemory } from '../src/device/onnx/onnxruntime.js'
import type { Efficiency, Speed } from './efficiency.js'
import { noise } from './trainer.js'

/**
 * Muon's whole job on one square matrix, as a lane computes it, against one large MatMul: the same process, library and
 * threads, in alternating pairs. Started by bench.ts with the size, the threads and the pairs; answers an Efficiency.
 */
const [size, threads, pairs] = process.argv.slice(2).map(Number)
const COEFFICIENTS = expandCoefficients(NAMED_COEFFICIENTS.keller_jordan.coefficients, 5)
// About as much work as Newton-Schulz has, so that other work on the machine disturbs both alike.
const PRODUCTS = 15

const bytes = size * size * 4
const device = await Device.start({
  device: 'cpu',
  onnxruntime_dir: '',
  lanes: 1,
  threads,
  staging_bytes: bytes,
  state_bytes_limit: 0,
})
const values = noise(size * size)
const orthogonalize = await muonJob()
const multiply = matMul()

await orthogonalize()
multiply()
const results: Efficiency['pairs'] = []
for (let pair = 0; pair < pairs; pair++) {
  const newton_schulz = await speed(newtonSchulzFlops(COEFFICIENTS, [size, size]), orthogonalize)
  const matmul = await speed(PRODUCTS * 2 * size ** 3, () => {
    for (let i = 0; i < PRODUCTS; i++) multiply()
  })
  results.push({ newton_schulz, matmul })
}
await device.close()
process.send?.({ size, threads, pairs: results } satisfies Efficiency)
process.disconnect?.()

/** GFLOP/s of `work`, by the clock and by CPU seconds: together they tell a slow kernel from a busy machine. */
async function speed(flops: number, work: () => unknown): Promise<Speed> {
  const started = performance.now()
  const before = process.cpuUsage()
  await work()
  const { user, system } = process.cpuUsage(before)
  return { gflops: flops / (performance.now() - started) / 1e6, gflops_per_cpu: flops / (user + system) / 1e3 }
}

async function muonJob(): Promise<() => Promise<void>> {
  const kernel: KernelSpec = {
    kind: 'muon',
    coefficients: COEFFICIENTS,
    tall: false,
    gradient_dtype: 'float32',
    update_dtype: 'float32',
  }
  const scalars = { c_m: 0.95, c_g: 0.05, n_m: 0.95, n_g: 0.05, eps: 1e-7, output_scale: 1 }
  const tasks = [{ dims: [size, size], offset: 0 }]
  const plan = { kernel, tasks, scalars, scale: -1e-3, decay: 1e-4, rms_factor: 1 }
  const [state, next] = [device.memory.allocate(bytes), device.memory.allocate(bytes)]
  const [gradient, update] = [device.staging.tryReserve(bytes), device.allocateHost(bytes)]
  if (gradient === undefined) throw new Error(`the staging arena has no ${bytes} bytes`)
  new Float32Array(viewMemory(state.pointer, bytes).buffer).set(values)
  gradient.view.set(new Uint8Array(values.buffer))
  const job: Job = {
    plan,
    gradient,
    gradient_scale: 1,
    state: [state.pointer],
    next: [next.pointer],
    update,
  }
  await device.load([{ plan, gradient_bytes: bytes, update_bytes: bytes, state_bytes: bytes }])
  return async () => {
    const result = await device.run(() => job, { cancelled: false })
    if (result?.outcome !== 'computed') throw new Error(`the lane answered ${result?.outcome}`)
  }
}

function matMul(): () => void {
  const runtime = openOnnxRuntime()
  const graph = new Graph('product')
  graph.input('a', 'float32', ['m', 'k'])
  graph.input('b', 'float32', ['k', 'n'])
  graph.output('c', graph.node('MatMul', ['a', 'b']), { dims: ['m', 'n'] })
  const session = runtime.createSession(graph.bytes(), { inputs: ['a', 'b'], outputs: ['c'] }, { threads })
  const tensor = () => {
    const pointer = runtime.allocate(bytes)
    new Float32Array(viewMemory(pointer, bytes).buffer).set(values)
    return runtime.createTensor({ pointer, bytes }, [size, size], DTYPES.float32.onnx)
  }
  const [a, b, c] = [tensor(), tensor(), tensor()]
  return () => runtime.run(session, [a, b], [c])
}
