import { once } from 'node:events'
import fc from 'fast-check'
import t from 'tap'
import type { Job } from '../../src/device/job.js'
import { encodeWithData } from '../../src/wire/codec.js'
import {
  bytesOf,
  normal,
  RawClient,
  type ReceivedUpdate,
  type Service,
  startService,
  told,
  turn,
  until,
} from '../service.js'

const MiB = 2 ** 20
const ADAMW = [{ name: 'g', algorithm: 'adamw' }]
const SGD = [{ name: 'g', algorithm: 'sgd', momentum: 0.9 }]
const sizes = (bytes: number[]) => bytes.map((size, i) => ({ name: `p${i}`, shape: [size / 4], group: 'g' }))
const gradientsOf = (parameters: { shape: number[] }[], seed: number) =>
  parameters.map(({ shape }, i) => normal(seed * 1000 + i, shape[0]!))

/** More bytes than the kernel takes, on any machine, for a socket that nobody reads. */
const MORE_THAN_SOCKETS_HOLD = 32 * MiB

function chunk(client: RawClient, parameter: number, step: number, [offset, data]: [number, Uint8Array]): void {
  client.socket.send(encodeWithData({ type: 'gradient', parameter, step, offset }, data))
}

function sendStep(client: RawClient, step: number, gradients: readonly Float32Array[]): void {
  gradients.forEach((values, index) => {
    client.gradient(index, step, { values })
  })
  client.send({ type: 'end', step })
}

function sgdPlan(elements: number, scalars: Record<string, number>): Job['plan'] {
  const kernel = { kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'float32' } as const
  return { kernel, tasks: [{ dims: [elements], offset: 0 }], scalars, scale: 1, decay: 0, rms_factor: 1 }
}

/** Resolves when everything that was sent has left this process. */
function flushed(client: RawClient): Promise<void> {
  return new Promise((resolve, reject) => {
    client.socket.ping(undefined, true, (error) => (error ? reject(error) : resolve()))
  })
}

const hexOf = (updates: Map<number, ReceivedUpdate>) =>
  [...updates]
    .sort(([a], [b]) => a - b)
    .map(([, { data, scale, decay }]) => `${scale} ${decay} ${data.toString('hex')}`)

t.test('a client that sends 300 MB before it reads anything finishes', async (t) => {
  const service = await startService({ staging_bytes: 64 * MiB })
  const parameters = sizes([40, 40, 40, 40, 30, 30, 20, 20, 20, 10, 10].map((size) => size * MiB))
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'large', groups: SGD, parameters })
  // Ten gradients of one value each keep the arithmetic off the clock; their updates are as large as any.
  const gradients = parameters.map(({ shape }, i) => new Float32Array(shape[0]!).fill(i + 1))
  client.socket.pause()
  sendStep(client, 1, gradients)
  await flushed(client)
  t.equal(client.updates.size, 0)
  client.socket.resume()
  t.match(await client.expect('receipt'), { step: 1, applied: parameters.length })
  for (const [index, { data }] of client.updates) {
    t.ok(data.equals(bytesOf(gradients[index]!)), `the update of parameter ${index} is its gradient`)
  }
  await client.close()
  await service.app.close()
})

/** A client that sends a step and reads none of its updates, which are more than the sockets hold. */
async function deafClient(service: Service): Promise<RawClient> {
  const parameters = sizes([MORE_THAN_SOCKETS_HOLD, MORE_THAN_SOCKETS_HOLD])
  const deaf = await RawClient.connect(service.url)
  await deaf.open({ run: 'deaf', groups: SGD, parameters })
  deaf.socket.pause()
  sendStep(
    deaf,
    1,
    parameters.map(({ shape }) => new Float32Array(shape[0]!)),
  )
  await until(() => service.device.staging.used === 0 && service.runs.get('deaf').ahead.length === 2)
  return deaf
}

t.test('a client that stops reading slows nobody else', async (t) => {
  const service = await startService({ staging_bytes: 64 * MiB })
  const deaf = await deafClient(service)
  const small = sizes([4096, 8192])
  const other = await RawClient.connect(service.url)
  await other.open({ run: 'other', groups: ADAMW, parameters: small })
  for (const step of [1, 2, 3]) t.match(await other.step(step, gradientsOf(small, step)), { step })
  t.equal(deaf.updates.size, 0, 'the first had not read its updates yet')
  deaf.socket.resume()
  t.match(await deaf.expect('receipt'), { step: 1, applied: 2 })
  for (const client of [deaf, other]) await client.close()
  await service.app.close()
})

t.test('a client that stops reading is closed after the timeout, and told why', async (t) => {
  const service = await startService({ staging_bytes: 64 * MiB, send_timeout_seconds: 2 })
  const deaf = await deafClient(service)
  while ((await told(service, 'OVERLOADED')) === 0) await turn()
  deaf.socket.resume()
  t.equal((await deaf.closed()).code, 1013, 'what nobody read before it does not hide why')
  t.equal(await told(service, 'OVERLOADED'), 1)
  const again = await RawClient.connect(service.url)
  t.match(await again.open({ run: 'deaf' }), { ahead: [0, 1], step: 0 }, 'what it has not read is there to be replayed')
  await again.close()
  await service.app.close()
})

t.test('two clients with gradients that do not fit together both finish', async (t) => {
  const service = await startService({ staging_bytes: MiB })
  const parameters = sizes([768 * 1024, 512 * 1024, 640 * 1024])
  const train = async (run: string) => {
    const client = await RawClient.connect(service.url)
    await client.open({ run, groups: ADAMW, parameters })
    let digest = ''
    for (const step of [1, 2, 3])
      ({ digest } = await client.step(step, gradientsOf(parameters, step), [2, 0, 1], 65_536))
    await client.close()
    return digest
  }
  const alone = await train('alone')
  t.same(await Promise.all(['a', 'b', 'c'].map(train)), [alone, alone, alone])
  t.equal(service.device.staging.used, 0)
  await service.app.close()
})

t.test('a takeover while updates are unsent drops them; the same gradients bring them again', async (t) => {
  const service = await startService({ staging_bytes: 64 * MiB })
  const parameters = sizes([MORE_THAN_SOCKETS_HOLD, MORE_THAN_SOCKETS_HOLD])
  const gradients = gradientsOf(sizes([4096, 4096]), 1).map((values, i) => {
    const large = new Float32Array(parameters[i]!.shape[0]!)
    large.set(values)
    return large
  })
  const deaf = await RawClient.connect(service.url)
  await deaf.open({ run: 'r', groups: SGD, parameters })
  deaf.socket.pause()
  gradients.forEach((values, index) => {
    deaf.gradient(index, 1, { values })
  })
  await until(() => service.runs.get('r').ahead.length === 2)
  const heir = await RawClient.connect(service.url)
  t.match(await heir.open({ run: 'r', takeover: true }), { ahead: [0, 1], epoch: 2 })
  t.match(await heir.step(1, gradients), { step: 1, applied: 2 })
  for (const index of [0, 1]) {
    t.equal(heir.updates.get(index)!.replayed, true)
    t.ok(heir.updates.get(index)!.data.equals(bytesOf(gradients[index]!)))
  }
  deaf.socket.terminate()
  await heir.close()
  await service.app.close()
})

t.test('what the step frame set holds for the rest of a step that a lost connection has begun', async (t) => {
  const service = await startService({ lanes: 1 })
  const groups = [{ name: 'g', algorithm: 'muon' }]
  const parameters = [0, 1].map((i) => ({ name: `p${i}`, shape: [512, 512], group: 'g' }))
  const gradients = [normal(1, 512 * 512), normal(2, 512 * 512)]
  const setting = { type: 'step', step: 1, groups: { g: { lr: 0.5, ns_steps: 3 } }, gradient_scale: 0.25 } as const
  const lost = await RawClient.connect(service.url)
  await lost.open({ run: 'r', groups, parameters })
  lost.send(setting)
  lost.gradient(0, 1, { values: gradients[0]! })
  // The gradient has room in the arena until the lane is done, so here the lane is at work.
  await until(() => service.device.staging.used > 0)
  lost.socket.terminate()
  await until(() => !service.runs.get('r').connected)
  const heir = await RawClient.connect(service.url)
  t.match(await heir.open({ run: 'r' }), { ahead: [0], groups: { g: { lr: 0.5, ns_steps: 3 } } })
  t.match(await heir.step(1, gradients), { groups: { g: { lr: 0.5, ns_steps: 3 } } })
  t.equal(heir.updates.get(0)!.replayed, true)
  t.equal(heir.updates.get(1)!.replayed, false)
  await heir.close()
  await service.app.close()
})

t.test('a step frame that no gradient followed is forgotten with its connection', async (t) => {
  const service = await startService()
  const parameters = sizes([64])
  const lost = await RawClient.connect(service.url)
  await lost.open({ run: 'r', groups: SGD, parameters })
  lost.send({ type: 'step', step: 1, groups: { g: { lr: 0.5 } } })
  await lost.close()
  const heir = await RawClient.connect(service.url)
  t.match(await heir.open({ run: 'r' }), { groups: { g: { lr: 0.001 } } })
  heir.send({ type: 'step', step: 1, groups: { g: { lr: 0.25 } } })
  t.match(await heir.step(1, gradientsOf(parameters, 1)), { groups: { g: { lr: 0.25 } } })
  await heir.close()
  await service.app.close()
})

t.test('deleting a run closes its connection and gives all of its memory back', async (t) => {
  const service = await startService()
  const parameters = sizes([4096, 4 * MiB])
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: ADAMW, parameters })
  await client.step(1, gradientsOf(parameters, 1))
  client.gradient(1, 2, { values: gradientsOf(parameters, 2)[1]! })
  await until(() => service.device.staging.used > 0)
  await service.runs.delete('r')
  t.match(await client.expect('error'), { code: 'RUN_NOT_FOUND', message: "run 'r' was deleted" })
  t.equal((await client.closed()).code, 1008)
  const { device, runs } = service
  t.same([device.memory.bytes, device.admittedBytes, device.staging.used, runs.list()], [0, 0, 0, []])
  await t.rejects(runs.delete('r'), { code: 'RUN_NOT_FOUND' })
  await service.app.close()
})

t.test('a drain lets the step in flight end, closes everybody else, and takes nothing new', async (t) => {
  const service = await startService({ drain_seconds: 20 })
  const parameters = sizes([4096, 4096])
  const gradients = gradientsOf(parameters, 1)
  const names = ['busy', 'begun', 'idle', 'broken']
  const clients = await Promise.all(names.map(() => RawClient.connect(service.url)))
  const [busy, begun, idle, broken] = clients as [RawClient, RawClient, RawClient, RawClient]
  await Promise.all(clients.map((client, i) => client.open({ run: names[i]!, groups: SGD, parameters })))
  const unopened = await RawClient.connect(service.url)
  busy.gradient(0, 1, { values: gradients[0]! })
  await until(() => service.runs.get('busy').ahead.length === 1)
  for (const client of [begun, broken]) chunk(client, 0, 1, [0, bytesOf(gradients[0]!).subarray(0, 64)])
  await until(() => service.device.staging.used === 8192)
  const drained = service.drain()
  for (const client of [...clients, unopened]) t.match(await client.expect('draining'), { deadline_seconds: 20 })
  for (const client of [idle, unopened]) t.equal((await client.closed()).code, 1012)
  await t.rejects(
    service.runs.open(
      { type: 'open', protocol: 1, run: 'busy' },
      { fence: async () => {}, expel: () => {}, changed: () => {} },
    ),
    { code: 'DRAINING' },
  )

  busy.gradient(1, 1, { values: gradients[1]! })
  busy.send({ type: 'end', step: 1 })
  t.match(await busy.expect('receipt'), { step: 1, applied: 2 })
  t.equal((await busy.closed()).code, 1012)
  chunk(begun, 0, 1, [64, bytesOf(gradients[0]!).subarray(64)])
  begun.send({ type: 'end', step: 1, skipped: [1] })
  t.match(await begun.expect('receipt'), { step: 1, skipped: 1 })
  t.equal((await begun.closed()).code, 1012)
  // A gradient that is too long is refused, and no step is in flight then: the next gradient would begin a new one.
  chunk(broken, 0, 1, [64, new Uint8Array(8192)])
  t.match(await broken.expect('error'), { code: 'SHAPE_MISMATCH' })
  broken.gradient(0, 1, { values: gradients[0]! })
  t.match(await broken.expect('error'), { code: 'DRAINING', retryable: true })
  t.equal((await broken.closed()).code, 1012)
  await drained
})

t.test('a failed device is told to everybody, and nothing more is opened', async (t) => {
  const service = await startService({ lanes: 1 })
  const { device, runs } = service
  const parameters = sizes([4096])
  const [working, idle] = [await RawClient.connect(service.url), await RawClient.connect(service.url)]
  await working.open({ run: 'working', groups: SGD, parameters })
  await idle.open({ run: 'idle', groups: SGD, parameters })
  const region = device.allocateHost(64)
  const job: Job = {
    plan: sgdPlan(16, {}),
    gradient: region,
    gradient_scale: 1,
    state: undefined,
    next: [device.memory.allocate(64).pointer],
    update: region,
  }
  region.view.fill(0)
  sendStep(working, 1, gradientsOf(parameters, 1))
  await t.rejects(
    device.run(() => job, { cancelled: false }),
    { code: 'DEVICE_FAILED' },
  )
  for (const client of [working, idle]) {
    const frame = await client.next()
    const last = frame.type === 'receipt' ? await client.next() : frame
    t.match(last, { type: 'error', code: 'DEVICE_FAILED', message: /the plan gives no c_m/ })
    t.equal((await client.closed()).code, 1011)
  }
  t.same(runs.list(), [])
  const late = await RawClient.connect(service.url)
  late.send({ type: 'open', protocol: 1, run: 'late', groups: SGD, parameters })
  t.match(await late.expect('error'), { code: 'DEVICE_FAILED', retryable: true })
  await late.close()
  await service.app.close()
})

t.test('a stream that opens nothing in time is closed, however busy it is', async (t) => {
  const service = await startService({ open_timeout_seconds: 2 })
  const silent = await RawClient.connect(service.url)
  const busy = await RawClient.connect(service.url)
  const ask = () => busy.send({ type: 'open', protocol: 1, run: 'nobody', mode: 'resume' })
  ask()
  let refused = 0
  for (let frame = await busy.expect('error'); frame.code === 'RUN_NOT_FOUND'; frame = await busy.expect('error')) {
    refused += 1
    ask()
  }
  t.ok(refused > 0)
  t.match(await silent.expect('error'), { code: 'FRAME_UNEXPECTED', message: 'nothing was opened within 2 seconds' })
  for (const client of [silent, busy]) t.equal((await client.closed()).code, 1002)
  await service.app.close()
})

t.test('waiting long for the device is not standing still', async (t) => {
  const service = await startService({ lanes: 1, threads: 1, send_timeout_seconds: 2 })
  const { device } = service
  const region = device.allocateHost(16 * MiB)
  region.view.fill(0)
  const [next] = [device.memory.allocate(16 * MiB)]
  const plan = sgdPlan(4 * MiB, { c_m: 1, c_g: 1, n_m: 1, n_g: 1 })
  const job: Job = { plan, gradient: region, gradient_scale: 1, state: undefined, next: [next.pointer], update: region }
  const compute = () => device.run(() => job, { cancelled: false })
  // The quickest of some: on a busy machine one alone may take many times as long as those behind it.
  const tries = await Promise.all(Array.from({ length: 8 }, compute))
  const computeSeconds = Math.min(...tries.map((result) => result!.computeSeconds))
  const parameters = sizes([8 * MiB])
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: SGD, parameters })
  const before = Array.from({ length: Math.ceil(4 / computeSeconds) }, compute)
  const receipt = await client.step(1, gradientsOf(parameters, 1))
  t.ok(receipt.seconds.queue > 2, `${receipt.seconds.queue} s in the queue`)
  await Promise.all(before)
  device.memory.release(next)
  await client.close()
  await service.app.close()
})

const MODEL = [
  { name: 'wide', shape: [16, 48], group: 'muon' },
  { name: 'embedding', shape: [4001], group: 'adamw', gradient_dtype: 'bfloat16', update_dtype: 'float16' },
  { name: 'bias', shape: [33_000], group: 'sgd' },
]
const MODEL_GROUPS = [
  { name: 'muon', algorithm: 'muon' },
  { name: 'adamw', algorithm: 'adamw' },
  { name: 'sgd', algorithm: 'sgd', momentum: 0.9, nesterov: true },
]
const modelGradient = (step: number, index: number): Float32Array | Uint16Array => {
  const count = MODEL[index]!.shape.reduce((a, b) => a * b, 1)
  const values = normal(100 * step + index, count)
  // The upper half of a float32 is a bfloat16.
  return index === 1 ? new Uint16Array(values.buffer).filter((_, i) => i % 2 === 1) : values
}
const STEPS = [1, 2, 3]

type Course = { order: number[]; chunk: number; cut: number }

/** Sends a step in the given order and chunks, and returns whether its receipt came before the cut. */
async function tryStep(client: RawClient, step: number, { order, chunk, cut }: Course): Promise<string | undefined> {
  let left = cut
  const { socket } = client
  const sent = { send: (data: Uint8Array) => (left-- > 0 ? socket.send(data) : undefined) }
  if (step === 2) client.send({ type: 'step', step, groups: { muon: { lr: 0.5 } }, gradient_scale: 0.5 })
  for (const index of order) {
    const bytes = bytesOf(modelGradient(step, index))
    for (let offset = 0; offset < bytes.length; offset += chunk) {
      const data = bytes.subarray(offset, offset + chunk)
      sent.send(encodeWithData({ type: 'gradient', parameter: index, step, offset }, data))
    }
  }
  if (left <= 0) return undefined
  client.send({ type: 'end', step })
  return (await client.expect('receipt')).digest
}

t.test('any order, chunks and cuts: resent steps give the digest and the updates of the undisturbed run', async () => {
  const service = await startService({ staging_bytes: MiB })
  const train = async (run: string, courses: Course[]) => {
    let client = await RawClient.connect(service.url)
    await client.open({ run, groups: MODEL_GROUPS, parameters: MODEL })
    const result: string[] = []
    const rest = [...courses]
    const uncut = { order: [0, 1, 2], chunk: 2 ** 16, cut: Infinity }
    for (const step of STEPS) {
      let digest = await tryStep(client, step, rest.shift() ?? uncut)
      while (digest === undefined) {
        await flushed(client)
        client.socket.terminate()
        client = await RawClient.connect(service.url)
        await client.open({ run, takeover: true })
        digest = await tryStep(client, step, rest.shift() ?? uncut)
      }
      result.push(digest, ...hexOf(client.updates))
    }
    await client.close()
    return result.join()
  }
  const expected = await train('calm', [])
  const course = fc.record({
    order: fc.shuffledSubarray([0, 1, 2], { minLength: 3, maxLength: 3 }),
    chunk: fc.oneof(fc.integer({ min: 2000, max: 9000 }), fc.constant(2 ** 18)),
    cut: fc.oneof(fc.nat({ max: 80 }), fc.constant(Infinity)),
  })
  let runs = 0
  const property = fc.asyncProperty(fc.array(course, { maxLength: 6 }), async (courses) => {
    const name = `run${++runs}`
    const same = (await train(name, courses)) === expected
    await service.runs.delete(name)
    return same && service.device.staging.used === 0
  })
  await fc.assert(property, { seed: 7, numRuns: 40 })
  await service.app.close()
})

t.test('an answer that is too late for its connection goes nowhere', async (t) => {
  const service = await startService({ lanes: 1 })
  const parameters = sizes([4 * MiB])
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: ADAMW, parameters })
  const gone = once(client.socket, 'close')
  client.gradient(0, 1, { values: gradientsOf(parameters, 1)[0]! })
  client.send({ type: 'end', step: 1 })
  await until(() => service.device.staging.used > 0)
  client.socket.terminate()
  await gone
  await until(() => !service.runs.get('r').connected)
  await service.runs.get('r').settled()
  const heir = await RawClient.connect(service.url)
  const opened = await heir.open({ run: 'r' })
  t.match(opened, { step: 0, epoch: 2 }, 'its end waited for the update, and went with it')
  t.match(await heir.step(1, gradientsOf(parameters, 1)), { step: 1, applied: 1 })
  await heir.close()
  await service.app.close()
})

t.test(
  'a chunk that does not follow the one before is refused, and what was reserved for its gradient is free',
  async (t) => {
    const service = await startService({ lanes: 1 })
    const client = await RawClient.connect(service.url)
    await client.open({ run: 'r', groups: SGD, parameters: sizes([MiB]) })
    const inFlight = async () =>
      /^muond_in_flight_bytes (\d+)/m.exec(await (await fetch(`${service.http}/metrics`)).text())
    t.match(await inFlight(), { 1: '0' })
    const piece = new Uint8Array(MiB / 4)
    chunk(client, 0, 1, [0, piece])
    await until(() => service.device.staging.used > 0)
    t.match(await inFlight(), { 1: String(MiB) })
    chunk(client, 0, 1, [MiB / 2, piece])
    t.match(await client.expect('error'), {
      code: 'FRAME_UNEXPECTED',
      message: /chunk at offset 524288, expected 262144/,
    })
    t.equal(service.device.staging.used, 0)
    await client.close()
    await service.app.close()
  },
)

t.test('a connection that has to go while its run is made leaves the run without a member', async (t) => {
  const service = await startService({ lanes: 1 })
  const { device, runs } = service
  const client = await RawClient.connect(service.url)
  client.send({ type: 'open', protocol: 1, run: 'r', groups: ADAMW, parameters: sizes([4096]) })
  await until(() => device.admittedBytes > 0)
  const drained = service.drain()
  await until(() => runs.list().length === 1)
  t.equal((await client.closed()).code, 1012)
  await drained
  t.notOk(runs.get('r').connected)
})

t.test('a run whose connection was told to go can be taken over before it has gone', async (t) => {
  const service = await startService({ lanes: 1 })
  const parameters = sizes([4096])
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: ADAMW, parameters })
  // The client does not read, so it does not answer the close frame either.
  client.socket.pause()
  client.socket.send('text')
  while ((await told(service, 'FRAME_MALFORMED')) === 0) await new Promise((resolve) => setImmediate(resolve))
  const heir = await RawClient.connect(service.url)
  t.match(await heir.open({ run: 'r', takeover: true }), { epoch: 2 })
  t.match(await heir.step(1, gradientsOf(parameters, 1)), { step: 1, applied: 1 })
  client.socket.resume()
  t.equal((await client.closed()).code, 1003)
  await heir.close()
  await service.app.close()
})
