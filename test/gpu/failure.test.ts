import t from 'tap'
import { openCuda } from '../../src/device/cuda/cuda.js'
import type { Pointer } from '../../src/device/onnx/onnxruntime.js'
import { normal, RawClient, startService } from '../service.js'
import { CUDA, NO_GPU } from './gpu.js'

const ON_GPU = { skip: NO_GPU, timeout: 120_000 }
const GROUPS = [{ name: 'muon', algorithm: 'muon' }]
const parameter = (rows: number, cols: number) => ({ name: 'w', shape: [rows, cols], group: 'muon' })

t.test('memory that another program has taken is the trouble of the run that asks for it', ON_GPU, async (t) => {
  const service = await startService(CUDA)
  const gpu = openCuda(0)
  const [small, large] = [await RawClient.connect(service.url), await RawClient.connect(service.url)]
  await small.open({ run: 'small', groups: GROUPS, parameters: [parameter(64, 64)] })
  await small.step(1, [normal(1, 64 * 64)])
  await small.step(2, [normal(2, 64 * 64)])
  await large.open({ run: 'large', groups: GROUPS, parameters: [parameter(2048, 4096)] })
  const taken = takeAll(gpu, 2 ** 24)
  const gradient = normal(3, 2048 * 4096)
  large.gradient(0, 1, { values: gradient })
  t.match(await large.expect('error'), { code: 'OVER_CAPACITY', parameter: 0, step: 1 })
  t.match(await small.step(3, [normal(3, 64 * 64)]), { step: 3, applied: 1 })
  for (const pointer of taken) gpu.free(pointer)
  t.match(await large.step(1, [gradient]), { step: 1, applied: 1 }, 'the gradient is taken once there is memory')
  t.equal((await fetch(`${service.http}/readyz`)).status, 200)
  for (const client of [small, large]) await client.close()
  await service.app.close()
})

t.test('a run that the GPU cannot hold is refused with the numbers', ON_GPU, async (t) => {
  const service = await startService(CUDA)
  const client = await RawClient.connect(service.url)
  // Each of them fits into the staging arena, all together into no GPU.
  const parameters = Array.from({ length: 20_000 }, (_, i) => ({ ...parameter(2048, 4096), name: `w${i}` }))
  client.send({ type: 'open', protocol: 1, run: 'huge', groups: GROUPS, parameters })
  t.match(await client.expect('error'), {
    code: 'OVER_CAPACITY',
    message: /^run 'huge' needs \d+ bytes of memory on cuda:0 NVIDIA .*, \d+ are left: /,
  })
  t.equal(service.device.admittedBytes, 0)
  await client.close()
  await service.app.close()
})

// The last test of this process: what it does to the GPU's context cannot be undone.
t.test('an error of the GPU ends its runs and turns readyz red', ON_GPU, async (t) => {
  const service = await startService(CUDA)
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters: [parameter(64, 64)] })
  await client.step(1, [normal(1, 64 * 64)])
  const { device } = service
  const [gradient, update] = [0, 1].map(() => device.allocateHost(4 * 64 * 64))
  const kernel = { kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'float32' } as const
  const plan = {
    ...{ kernel, tasks: [{ dims: [64 * 64], offset: 0 }], scale: 1, decay: 0, rms_factor: 1 },
    scalars: { c_m: 1, c_g: 1, n_m: 1, n_g: 1 },
  }
  // Nothing lies at address 8.
  const job = { plan, gradient: gradient!, update: update!, gradient_scale: 1, state: [8n], next: [8n] }
  await t.rejects(
    device.run(() => job, { cancelled: false }),
    { code: 'DEVICE_FAILED', message: /CUDA_ERROR_ILLEGAL_ADDRESS/ },
  )
  t.match(await client.expect('error'), { code: 'DEVICE_FAILED', message: /CUDA_ERROR_ILLEGAL_ADDRESS/ })
  t.match(await client.closed(), { code: 1011 })
  const ready = await fetch(`${service.http}/readyz`)
  t.equal(ready.status, 503)
  t.match(await ready.text(), /DEVICE_FAILED|device/)
  const next = await RawClient.connect(service.url)
  next.send({ type: 'open', protocol: 1, run: 'r', groups: GROUPS, parameters: [parameter(64, 64)] })
  t.match(await next.expect('error'), { code: 'DEVICE_FAILED' })
  await next.close()
  await service.app.close()
})

/** Takes device memory until less than `left` bytes are free. */
function takeAll(gpu: ReturnType<typeof openCuda>, left: number): Pointer[] {
  const taken: Pointer[] = []
  for (let bytes = 2 ** 34; bytes >= left / 2; bytes /= 2) {
    while (gpu.memory().free >= bytes + left / 2) {
      try {
        taken.push(gpu.allocate(bytes))
      } catch {
        // What is free may be in pieces.
        break
      }
    }
  }
  return taken
}
