import { mkdtempSync, readdirSync, rmSync, symlinkSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import t from 'tap'
import type { KernelSpec } from '../../kernels/kernel.js'
import { Device, type DeviceOptions } from '../../src/device/device.js'
import type { Job } from '../../src/device/job.js'
import { GROUPS_PER_LANE, Lanes } from '../../src/device/lanes/lanes.js'
import { bundledLibraryFolder } from '../../src/device/onnx/onnxruntime.js'
import { ServiceError } from '../../src/errors.js'
import type { Plan } from '../../src/optimizer/plan.js'

const OPTIONS: DeviceOptions = {
  device: 'cpu',
  onnxruntime_dir: '',
  lanes: 1,
  threads: 1,
  staging_bytes: 2 ** 20,
  state_bytes_limit: 2 ** 28,
}
const SCALARS = { c_m: 0.5, c_g: 1, n_m: 1, n_g: 0, eps: 1e-7, output_scale: 1 }
const SGD: KernelSpec = { kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'float32' }
const muon = (a: number): KernelSpec => ({ ...SGD, kind: 'muon', coefficients: [[a, -1.5, 0.5]], tall: false })
const ticket = () => ({ cancelled: false })
const floats = ({ buffer, byteOffset, length }: Uint8Array) => new Float32Array(buffer, byteOffset, length / 4)

/** A job on a gradient of 64 ones, whatever its plan makes of them. */
function jobOf(device: Device, plan: Pick<Plan, 'kernel' | 'tasks'>) {
  const [gradient, update] = [device.allocateHost(256), device.allocateHost(256)]
  floats(gradient.view).fill(1)
  const next = [device.memory.allocate(256).pointer]
  const all = { ...plan, scalars: SCALARS, scale: 1, decay: 0, rms_factor: 1 }
  return { plan: all, gradient, gradient_scale: 1, state: undefined, next, update } satisfies Job
}

const sgdJob = (device: Device) => jobOf(device, { kernel: SGD, tasks: [{ dims: [64], offset: 0 }] })

t.test('a job that cannot be made is refused alone', async (t) => {
  const device = await Device.start(OPTIONS)
  const job = sgdJob(device)
  const broken = new Error('a bug')
  const outcomes = await Promise.allSettled([
    device.run(() => job, ticket()),
    device.run(() => job, ticket()),
    device.run(() => {
      throw broken
    }, ticket()),
    device.run(() => {
      device.allocateHost(2 ** 48)
      return job
    }, ticket()),
    device.run(() => job, ticket()),
  ])
  t.match(outcomes, [
    { value: { outcome: 'computed' } },
    { value: { outcome: 'computed' } },
    { reason: broken },
    { reason: { code: 'OVER_CAPACITY' } },
    { value: { outcome: 'computed' } },
  ])
  t.equal(device.failed, undefined)
  await device.close()
})

t.test('a lane without memory for a job refuses it, and computes the next one right', async (t) => {
  const device = await Device.start(OPTIONS)
  const job = sgdJob(device)
  const first = await device.run(() => job, ticket())
  const huge = jobOf(device, { kernel: muon(2), tasks: [{ dims: [2 ** 23, 2 ** 23], offset: 0 }] })
  await t.rejects(
    device.run(() => huge, ticket()),
    { code: 'OVER_CAPACITY' },
  )
  t.equal(device.failed, undefined)
  // The zeros that stand for the state before the first step are still zeros.
  t.match(await device.run(() => job, ticket()), { ...first, computeSeconds: Number })
  await device.close()
})

t.test('a lane keeps the sessions of many kernels, and makes one anew that it has let go', async (t) => {
  const device = await Device.start(OPTIONS)
  const matrix = { tasks: [{ dims: [8, 8], offset: 0 }] }
  const job = jobOf(device, { kernel: muon(2), ...matrix })
  const first = await device.run(() => job, ticket())
  const bytes = { gradient_bytes: 256, update_bytes: 256, state_bytes: 256 }
  const plans = Array.from({ length: 70 }, (_, i) => ({ ...job.plan, kernel: muon(1.5 + i / 1000) }))
  await device.load(plans.map((plan) => ({ plan, ...bytes })))
  t.match(await device.run(() => job, ticket()), { ...first, computeSeconds: Number })
  await device.close()
})

t.test('closing lets the lanes end what they have and drops what waits', async (t) => {
  const device = await Device.start(OPTIONS)
  const job = sgdJob(device)
  // Two groups of jobs are the lane's, the others wait.
  const given = GROUPS_PER_LANE * device.backend.group.jobs
  const jobs = Array.from({ length: given + 3 }, () => device.run(() => job, ticket()))
  // Jobs are given out at the end of the turn that asked for them.
  await turn()
  await device.close()
  const outcomes = (await Promise.all(jobs)).map((result) => result?.outcome)
  t.same(outcomes, [...Array(given).fill('computed'), undefined, undefined, undefined])
})

t.test('a device whose lanes do not start says why, and its folder is not needed once they have', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'muond-'))
  const [library] = readdirSync(bundledLibraryFolder()).filter((name) => name.startsWith('libonnxruntime.so'))
  symlinkSync(join(bundledLibraryFolder(), library!), join(folder, library!))
  const options = { ...OPTIONS, onnxruntime_dir: folder, lanes: 2 }
  await (await Device.start(options)).close()
  const starting = Device.start(options)
  // The threads begin in a later turn: by then the library is gone.
  rmSync(join(folder, library!))
  await t.rejects(starting, { code: 'DEVICE_FAILED', message: /there is no libonnxruntime in/ })
  rmSync(folder, { recursive: true })
})

/** Lanes that are given up to four jobs at once, as those of a GPU are. */
function grouping(bytes: number): Lanes {
  const lane = { kind: 'cpu', folder: bundledLibraryFolder(), threads: 1 } as const
  return new Lanes({ lane, group: { jobs: 4, bytes } }, 1, (error) => t.fail(error.message))
}

t.test('jobs of one turn are computed in groups, and each has its own outcome', async (t) => {
  const device = await Device.start(OPTIONS)
  const lanes = grouping(2 ** 20)
  const job = sgdJob(device)
  const infinite = jobOf(device, { kernel: SGD, tasks: [{ dims: [64], offset: 0 }] })
  floats(infinite.gradient.view)[5] = Number.POSITIVE_INFINITY
  const asked = [job, infinite, job, job, job, job]
  const outcomes = await Promise.all([
    ...asked.map((one) => lanes.run(() => one, ticket())),
    lanes.run(() => job, { cancelled: true }),
    lanes.run(() => undefined, ticket()),
  ])
  t.same(
    outcomes.map((result) => result?.outcome),
    ['computed', 'not_finite', ...new Array(4).fill('computed'), undefined, undefined],
  )
  await lanes.close()
  await device.close()
})

t.test('after a failure everything that was asked for is refused, also what waits', async (t) => {
  const device = await Device.start(OPTIONS)
  const lanes = grouping(300)
  const job = sgdJob(device)
  const asked = [0, 1, 2, 3, 4, 5].map(() => lanes.run(() => job, ticket()))
  await turn()
  const failure = new ServiceError('DEVICE_FAILED', 'it is gone')
  lanes.refuse(failure)
  t.match(await Promise.allSettled([...asked, lanes.run(() => job, ticket())]), Array(7).fill({ reason: failure }))
  await lanes.close()
  await device.close()
})

t.test('a group takes no more when its gradients have enough bytes', async (t) => {
  const device = await Device.start(OPTIONS)
  const lanes = grouping(300)
  const taken: number[] = []
  const jobs = [0, 1, 2, 3, 4].map((index) => {
    const job = sgdJob(device)
    return lanes.run(() => {
      taken.push(index)
      return job
    }, ticket())
  })
  await turn()
  t.same(taken, [0, 1, 2, 3], 'two groups of two gradients of 256 bytes')
  await Promise.all(jobs)
  t.same(taken, [0, 1, 2, 3, 4])
  await lanes.close()
  await device.close()
})

t.test('what a group has no memory for is computed one by one', async (t) => {
  const device = await Device.start(OPTIONS)
  const lanes = grouping(2 ** 20)
  const job = sgdJob(device)
  const huge = jobOf(device, { kernel: muon(2), tasks: [{ dims: [2 ** 23, 2 ** 23], offset: 0 }] })
  const outcomes = await Promise.allSettled([job, huge, job].map((one) => lanes.run(() => one, ticket())))
  t.match(outcomes, [
    { value: { outcome: 'computed' } },
    { reason: { code: 'OVER_CAPACITY' } },
    { value: { outcome: 'computed' } },
  ])
  await lanes.close()
  await device.close()
})
