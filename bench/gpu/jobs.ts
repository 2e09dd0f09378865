import type { Cuda } from '../../src/device/cuda/cuda.js'
import type { Device } from '../../src/device/device.js'
import type { Job } from '../../src/device/job.js'
import { viewMemory } from '../../src/device/onnx/onnxruntime.js'
import { type Span, wholeOf } from '../../src/device/region.js'
import { planStep } from '../../src/optimizer/algorithms/algorithm.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { type Parameter, parseParameters } from '../../src/optimizer/parameter.js'
import type { ParameterDeclaration } from '../../src/wire/frame.js'

const NOISE_BYTES = 2 << 20

/** A job and the unit that has its memory. */
type UnitJob = Job & { unit: number }

type Options = { parameters: readonly ParameterDeclaration[]; resident: boolean }

/** Makes a job with Gaussian gradients for each parameter; a step runs all of them, and throws where one fails. */
export async function prepare(device: Device, gpu: Cuda, { parameters: declared, resident }: Options) {
  const group = parseGroup({ name: 'muon', algorithm: 'muon' })
  const parameters = parseParameters(declared, new Map([['muon', group]]))
  const freed: (() => void)[] = []
  const state = (bytes: number, unit: number) => {
    const { state: memory } = device.backend.units[unit]
    const pointer = memory.allocate(bytes)
    freed.push(() => memory.free(pointer))
    return pointer
  }
  const allocate = (bytes: number, unit: number): Span => {
    if (resident) return wholeOf({ pointer: state(bytes, unit), bytes }, 'gpu')
    const pointer = gpu.allocateHost(bytes)
    freed.push(() => gpu.freeHost(pointer))
    return wholeOf({ pointer, bytes }, 'host')
  }
  const fill = filler(gpu)
  const plan = (parameter: Parameter, step: number) => planStep(parameter, group, { step, replay: false })
  const demands = parameters.map((parameter) => ({
    plan: plan(parameter, 1),
    gradient_bytes: parameter.gradient_bytes,
    update_bytes: parameter.update_bytes,
    state_bytes: parameter.state[0].bytes,
  }))
  const { units } = device.admit(demands, 'the benchmark')
  await device.load(demands)
  const jobs = parameters.map((parameter, index): UnitJob => {
    const unit = units[index]
    const [gradient, update] = [allocate(parameter.gradient_bytes, unit), allocate(parameter.update_bytes, unit)]
    fill(gradient)
    const [tensor, next] = [state(parameter.state[0].bytes, unit), state(parameter.state[0].bytes, unit)]
    const tensors = { gradient, update, state: [tensor], next: [next] }
    return { plan: plan(parameter, 1), gradient_scale: 1, ...tensors, unit }
  })
  // Fresh memory may hold NaN: the first step starts from zeros.
  for (const job of jobs) await run(device, { ...job, state: undefined })
  let current = jobs.map((job) => ({ ...job, state: job.next, next: job.state ?? [] }))
  const step = async () => {
    await Promise.all(current.map((job) => run(device, job)))
    current = current.map((job) => ({ ...job, state: job.next, next: job.state }))
  }
  const free = () => {
    for (const release of freed) release()
  }
  return { step, free }
}

async function run(device: Device, job: UnitJob): Promise<void> {
  const result = await device.run(() => job, { cancelled: false }, job.unit)
  if (result?.outcome !== 'computed') throw new Error(`the device answered ${result?.outcome}`)
}

/** Fills host or device memory with the same Gaussian bfloat16 numbers, over and over. */
function filler(gpu: Cuda): (span: Span) => void {
  const gaussian = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random())
  const noise = Uint16Array.from(
    { length: NOISE_BYTES / 2 },
    () => new Uint32Array(Float32Array.of(gaussian()).buffer)[0] >>> 16,
  )
  const host = gpu.allocateHost(NOISE_BYTES)
  viewMemory(host, NOISE_BYTES).set(new Uint8Array(noise.buffer))
  const stream = gpu.createStream()
  return ({ pointer, bytes }) => {
    for (let at = 0; at < bytes; at += NOISE_BYTES)
      stream.copy(pointer + BigInt(at), host, Math.min(NOISE_BYTES, bytes - at))
    stream.synchronize()
  }
}
