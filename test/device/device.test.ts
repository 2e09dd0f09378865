import { readdirSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import t from 'tap'
import type { KernelSpec } from '../../kernels/kernel.js'
import { missingLibraries } from '../../src/device/cuda/cuda.js'
import { Device, type DeviceOptions } from '../../src/device/device.js'
import type { LaneRequest } from '../../src/device/executor.js'
import { type Demand, type Job, SLICE_ELEMENTS } from '../../src/device/job.js'
import { StateMemory } from '../../src/device/memory.js'
import { bundledLibraryFolder } from '../../src/device/onnx/onnxruntime.js'
import type { Plan } from '../../src/optimizer/plan.js'
import { gaussian } from '../reference.js'

const normal = (n: number, seed: number) => Float32Array.from(gaussian(seed, n))

const OPTIONS: DeviceOptions = {
  device: 'cpu',
  onnxruntime_dir: '',
  lanes: 2,
  threads: 1,
  staging_bytes: 1 << 26,
  state_bytes_limit: 1 << 28,
}
const SGD: KernelSpec = { kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'float32' }

function sgdPlan(n: number): Plan {
  const scalars = { c_m: 0.5, c_g: 1, n_m: 1, n_g: 0 }
  return { kernel: SGD, tasks: [{ dims: [n], offset: 0 }], scalars, scale: -1, decay: 0, rms_factor: 1 }
}

/** Puts a gradient into the device's staging arena and gives everything that a job on it needs. */
function prepare(device: Device, gradient: Float32Array, plan: Plan) {
  const bytes = gradient.byteLength
  const region = device.staging.tryReserve(bytes)!
  region.view.set(new Uint8Array(gradient.buffer))
  const update = device.allocateHost(bytes)
  const next = device.memory.allocate(bytes)
  const job: Job = {
    plan,
    gradient: region,
    gradient_scale: 1,
    state: undefined,
    next: [next.pointer],
    update,
  }
  return { job, next, update: update.view }
}

// tap compares typed arrays element by element, which takes minutes here.
const sameBytes = (a: Uint8Array | Float32Array, b: Float32Array) =>
  Buffer.from(a.buffer, a.byteOffset, a.byteLength).equals(new Uint8Array(b.buffer))
const neverAsked = (): Job => {
  throw new Error('a cancelled job must not be asked for')
}
const ticket = () => ({ cancelled: false })
const NO_CUDA = { skip: missingLibraries().length === 0 && 'this machine has all of them' }

t.test('a job on a tensor of many slices computes every element', async (t) => {
  const device = await Device.start(OPTIONS)
  const n = 2 * SLICE_ELEMENTS + 17
  const gradient = normal(n, 1)
  const { job, next, update } = prepare(device, gradient, sgdPlan(n))
  const result = await device.run(() => job, ticket())
  t.equal(result?.outcome, 'computed')
  t.ok(sameBytes(update, gradient), 'the update is the gradient: n_m is 1, the buffer was zero')
  t.ok(sameBytes(Buffer.concat([...device.read([next])]), gradient))
  const again = await device.run(() => ({ ...job, expected: result!.gradientFingerprint + 1n }), ticket())
  t.equal(again?.outcome, 'other_gradient')
  await device.close()
})

t.test('state is read in pieces of one size, whatever the sizes of the tensors, and no byte is lost', async (t) => {
  const device = await Device.start(OPTIONS)
  const MIB = 1 << 20
  const sizes = [1, 2, MIB / 2, MIB / 2, MIB, 3 * MIB, 5, MIB, 7]
  const contents = sizes.map((bytes, i) => new Uint8Array(bytes).map((_, at) => at * (2 * i + 1)))
  const tensors = contents.map((content) => {
    const tensor = device.memory.allocate(content.length)
    device.write(tensor, 0, content)
    return tensor
  })
  const pieces = [...device.read(tensors)]
  t.same(
    pieces.map(({ length }) => length),
    [...Array.from({ length: 6 }, () => MIB), 15],
  )
  t.ok(Buffer.concat(pieces).equals(Buffer.concat(contents)))
  t.ok(Buffer.concat([...device.read([tensors[5]])]).equals(contents[5]))
  const many = new Array(2049).fill(tensors[6])
  t.same(
    [...device.read(many)].map(({ length }) => length),
    [2048 * 5, 5],
    'small tensors are a piece before they have its bytes',
  )
  t.same([...device.read([])], [])
  t.same([...device.read([device.memory.allocate(0)])], [])
  for (const tensor of tensors) device.memory.release(tensor)
  await device.close()
})

t.test('small jobs of one turn go to a lane together until a large one fills their group', async (t) => {
  const device = await Device.start({ ...OPTIONS, lanes: 1 })
  const sizes: number[] = []
  const post = Worker.prototype.postMessage
  Worker.prototype.postMessage = function (request: LaneRequest, ...rest) {
    if (request.type === 'run') sizes.push(request.jobs.count)
    return post.call(this, request, ...rest)
  }
  t.teardown(() => {
    Worker.prototype.postMessage = post
  })
  const gradients = [...Array.from({ length: 100 }, () => 64), SLICE_ELEMENTS, 64].map((n, i) => normal(n, i))
  const prepared = gradients.map((gradient) => prepare(device, gradient, sgdPlan(gradient.length)))
  const results = await Promise.all(prepared.map(({ job }) => device.run(() => job, ticket())))
  t.same(sizes, [64, 37, 1])
  t.ok(results.every((result) => result?.outcome === 'computed'))
  t.ok(prepared.every(({ update }, i) => sameBytes(update, gradients[i]!)))
  await device.close()
})

t.test('what a pool keeps for the next one goes where there is no other memory', async (t) => {
  let [next, left] = [0n, 100]
  const sizes = new Map<bigint, number>()
  const allocate = (bytes: number) => {
    if (bytes > left) throw new Error('CUDA_ERROR_OUT_OF_MEMORY')
    left -= bytes
    next += 1n
    sizes.set(next, bytes)
    return next
  }
  const free = (pointer: bigint) => {
    left += sizes.get(pointer)!
  }
  const memory = new StateMemory([{ state: { allocate, free }, pooledBytes: 1000 }])
  memory.release(memory.allocate(60))
  t.equal(left, 40)
  const tensor = memory.allocate(80)
  t.equal(left, 20, 'the pooled 60 bytes were given back')
  t.throws(() => memory.allocate(30), /OUT_OF_MEMORY/)
  memory.release(tensor)
})

t.test('a cancelled ticket and a job that is not wanted any more cost nothing', async (t) => {
  const device = await Device.start(OPTIONS)
  t.equal(await device.run(neverAsked, { cancelled: true }), undefined)
  t.equal(await device.run(() => undefined, ticket()), undefined)
  await device.close()
})

/** Gradient, state and update that have so many bytes together. */
const demandOf = (bytes: number): Demand => ({
  plan: sgdPlan(bytes / 12),
  gradient_bytes: bytes / 3,
  update_bytes: bytes / 3,
  state_bytes: bytes / 3,
})

t.test('more is admitted only while there is room, with both numbers in the refusal', async (t) => {
  const device = await Device.start({ ...OPTIONS, state_bytes_limit: 1920 })
  // Of each run the largest gradient counts.
  const granted = device.admit([demandOf(768), demandOf(384)], 'run a')
  t.equal(device.admittedBytes, 768 + 256)
  t.throws(() => device.admit([demandOf(960)], 'run b'), {
    code: 'OVER_CAPACITY',
    message:
      'run b needs 960 bytes of memory on cpu, 896 are left: delete a run, or start the service with a larger --state-bytes-limit',
  })
  device.dismiss(granted)
  device.admit([demandOf(1920)], 'run b')
  t.equal(device.admittedBytes, 1920)
  await device.close()
})

t.test('the event loop goes on while a 2048x2048 step runs', async (t) => {
  const device = await Device.start({ ...OPTIONS, lanes: 1 })
  const size = 2048
  const kernel: KernelSpec = {
    kind: 'muon',
    coefficients: [[3.4445, -4.775, 2.0315]],
    tall: false,
    gradient_dtype: 'float32',
    update_dtype: 'float32',
  }
  const scalars = { c_m: 0.95, c_g: 0.05, n_m: 1, n_g: 0, eps: 1e-7, output_scale: 1 }
  const plan: Plan = { kernel, tasks: [{ dims: [size, size], offset: 0 }], scalars, scale: -1, decay: 0, rms_factor: 1 }
  const { job } = prepare(device, normal(size * size, 2), plan)
  let turns = 0
  let running = true
  const turn = () => {
    turns += 1
    if (running) setImmediate(turn)
  }
  setImmediate(turn)
  const result = await device.run(() => job, ticket())
  running = false
  t.equal(result?.outcome, 'computed')
  t.ok(turns > 100, `the loop turned ${turns} times in ${result?.computeSeconds} s: a blocked one turns once or twice`)
  await device.close()
})

t.test(
  'a lane that fails marks the device failed: its job, the waiting ones and all later ones are refused',
  async (t) => {
    const device = await Device.start({ ...OPTIONS, lanes: 1 })
    const told = new Promise<Error>((resolve) => {
      device.onFailure = resolve
    })
    const { job } = prepare(device, normal(16, 3), sgdPlan(16))
    const broken = { ...job, plan: { ...job.plan, scalars: {} } }
    const jobs = Array.from({ length: 5 }, () => device.run(() => broken, ticket()))
    for (const outcome of await Promise.allSettled(jobs)) {
      t.match(outcome, { status: 'rejected', reason: { code: 'DEVICE_FAILED' } })
    }
    t.match((await told).message, 'the plan gives no c_m')
    await t.rejects(
      device.run(() => job, ticket()),
      { code: 'DEVICE_FAILED' },
    )
    await device.close()
  },
)

t.test(
  'cuda without a provider is an error that says what is missing, and auto falls to the cpu and says so',
  async (t) => {
    await t.rejects(
      Device.start({ ...OPTIONS, device: 'cuda' }),
      /device cuda is not usable: .* lacks libonnxruntime_providers_cuda.so and .*: set MUOND_ONNXRUNTIME_DIR/,
    )
    const device = await Device.start({ ...OPTIONS, device: 'auto', lanes: 0, threads: 0, state_bytes_limit: 0 })
    t.match(device.backend.note, 'lacks libonnxruntime_providers_cuda.so')
    t.ok(device.lanes >= 1)
    await device.close()
  },
)

t.test('cuda without its libraries is an error that names each with what brings it', NO_CUDA, async (t) => {
  const folder = t.testdir({ 'libonnxruntime_providers_cuda.so': '', 'libonnxruntime_providers_shared.so': '' })
  const library = readdirSync(bundledLibraryFolder()).find((name) => name.startsWith('libonnxruntime.so'))!
  symlinkSync(join(bundledLibraryFolder(), library), join(folder, library))
  await t.rejects(
    Device.start({ ...OPTIONS, device: 'cuda', onnxruntime_dir: folder }),
    /libcuda.so.1 cannot be loaded \(it comes with the NVIDIA driver\).*; libcublas.so.13 cannot be loaded \(it comes with CUDA 13, nvidia-cublas on PyPI\)/,
  )
})

t.test('an update that is not finite is not committed, though the next state is', async (t) => {
  const device = await Device.start({ ...OPTIONS, lanes: 1 })
  const kernel: KernelSpec = { ...SGD, kind: 'muon', coefficients: [[1.5, -0.5, 0]], tall: false }
  const scalars = { c_m: 0, c_g: 1, n_m: 1, n_g: 0, eps: 1e-7, output_scale: Number.MAX_VALUE }
  const plan: Plan = { kernel, tasks: [{ dims: [8, 8], offset: 0 }], scalars, scale: -1, decay: 0, rms_factor: 1 }
  const { job } = prepare(device, normal(64, 4), plan)
  t.match(await device.run(() => job, ticket()), { outcome: 'not_finite' })
  await device.close()
})

/** Memory whose pool keeps 64 MiB of small tensors, and the numbers of the allocations that it has freed. */
function countedMemory() {
  const freed: number[] = []
  let next = 0n
  const state = { allocate: () => ++next, free: (pointer: bigint) => freed.push(Number(pointer)) }
  return { freed, memory: new StateMemory([{ state, pooledBytes: 2 ** 26 }]) }
}

t.test('of small tensors a pool keeps only so many bytes, and only so many tensors', async (t) => {
  const { memory, freed } = countedMemory()
  const tensors = Array.from({ length: 5 }, () => memory.allocate(2 ** 24))
  for (const tensor of tensors) memory.release(tensor)
  t.same(freed, [1], 'the oldest makes room')
  t.equal(memory.allocate(2 ** 24).pointer, tensors[4]!.pointer)
  for (const tensor of Array.from({ length: 600 }, () => memory.allocate(8))) memory.release(tensor)
  t.equal(freed.length, 1 + 3 + 600 - 512)
})

t.test('of large tensors a pool keeps the state of the largest parameter', async (t) => {
  const { memory, freed } = countedMemory()
  memory.release(memory.allocate(2 ** 27))
  t.same(freed, [1], 'nobody has asked for any')
  memory.keep(2 ** 28)
  const [a, b, small] = [memory.allocate(2 ** 27), memory.allocate(2 ** 27), memory.allocate(2 ** 24)]
  for (const tensor of [a, b, small]) memory.release(tensor)
  t.same(freed, [1], 'both states of the parameter, and small ones beside them')
  t.equal(memory.allocate(2 ** 27).pointer, b.pointer)
  t.equal(memory.allocate(2 ** 27).pointer, a.pointer)
  memory.release(memory.allocate(2 ** 29))
  t.same(freed, [1, 5], 'more than the largest parameter has')
  for (const tensor of [a, b]) memory.release(tensor)
  memory.keep(0)
  t.same(freed, [1, 5, 2, 3], 'the run of that parameter has gone')
  t.equal(memory.allocate(2 ** 24).pointer, small.pointer)
  memory.trim()
})

t.test('a step takes the memory that the step before has freed, also for the largest parameter', async (t) => {
  const device = await Device.start(OPTIONS)
  const bytes = 2 ** 25
  const plan = sgdPlan(bytes / 4)
  const grant = device.admit([{ plan, gradient_bytes: bytes, update_bytes: bytes, state_bytes: bytes }], 'run a')
  const tensor = device.memory.allocate(bytes)
  device.memory.release(tensor)
  const again = device.memory.allocate(bytes)
  t.equal(again.pointer, tensor.pointer)
  device.memory.release(again)
  device.dismiss(grant)
  t.equal(device.memory.bytes, 0)
  await device.close()
})

t.test('state memory is counted by reference and comes back from the pool', async (t) => {
  const device = await Device.start(OPTIONS)
  const { memory } = device
  const tensor = memory.allocate(64)
  memory.retain(tensor)
  memory.release(tensor)
  t.equal(memory.bytes, 64, 'one reference is left')
  memory.release(tensor)
  t.equal(memory.bytes, 0)
  t.equal(memory.allocate(64).pointer, tensor.pointer, 'the same memory again')
  const many = Array.from({ length: 20 }, () => memory.allocate(128))
  for (const one of many) memory.release(one)
  t.equal(memory.bytes, 64)
  memory.trim()
  await device.close()
})
