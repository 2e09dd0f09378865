import type { Socket } from 'node:net'
import fc from 'fast-check'
import t from 'tap'
import { encodeWithData } from '../../src/wire/codec.js'
import { bytesOf, normal, RawClient, type Service, startService, told, turn, until } from '../service.js'

import { rawGradient } from './websocket/raw-frame.js'

const ZERO = new Uint8Array(4)
const MiB = 2 ** 20
const SGD = [{ name: 'g', algorithm: 'sgd', momentum: 0.9 }]
const sizes = (bytes: number[]) => bytes.map((size, i) => ({ name: `p${i}`, shape: [size / 4], group: 'g' }))
const gradientsOf = (parameters: { shape: number[] }[], seed: number) =>
  parameters.map(({ shape }, i) => normal(seed * 1000 + i, shape[0]!))
/** Sends some bytes of a gradient of step 1. */
const part = (client: RawClient, parameter: number, offset: number, data: Uint8Array) =>
  client.socket.send(encodeWithData({ type: 'gradient', parameter, step: 1, offset }, data))

async function opened({ url }: Service, run: string, parameters: ReturnType<typeof sizes>): Promise<RawClient> {
  const client = await RawClient.connect(url)
  await client.open({ run, groups: SGD, parameters })
  return client
}

/** The digests of a run that nobody disturbs. */
async function undisturbed(parameters: ReturnType<typeof sizes>, steps: number): Promise<string[]> {
  const service = await startService({ lanes: 1 })
  const client = await opened(service, 'alone', parameters)
  const digests: string[] = []
  for (let step = 1; step <= steps; step++)
    digests.push((await client.step(step, gradientsOf(parameters, step))).digest)
  await client.close()
  await service.app.close()
  return digests
}

t.test('gradients that never end take the arena from nobody who sends', async (t) => {
  const service = await startService({ staging_bytes: MiB, lanes: 1 })
  const { staging } = service.device
  const parameters = sizes([768 * 1024, 4096])
  const expected = await undisturbed(parameters, 2)
  const holders: RawClient[] = []
  for (const run of ['first', 'second', 'third']) {
    const holder = await opened(service, run, parameters)
    part(holder, 0, 0, new Uint8Array(64))
    holders.push(holder)
  }
  await until(() => staging.used > 0 && service.runs.list().every(({ staging }, i) => i === 0 || staging.ownBytes > 0))
  const client = await opened(service, 'honest', parameters)
  for (const [i, digest] of expected.entries())
    t.equal((await client.step(i + 1, gradientsOf(parameters, i + 1))).digest, digest)
  for (const holder of holders) holder.socket.terminate()
  await until(() => service.runs.list().every(({ connected, name }) => name === 'honest' || !connected))
  t.same([staging.used, staging.waiting, staging.pressed.size], [0, 0, 0])
  await client.close()
  await service.app.close()
})

for (const inPlace of [true, false]) {
  const how = inPlace ? 'in place' : 'through plain ws'
  t.test(`a gradient that comes slowly moves out of the arena when others lack room, ${how}`, async (t) => {
    const service = await startService({ staging_bytes: 16 * MiB, chunk_bytes: 16 * MiB, lanes: 1 })
    const { staging } = service.device
    const parameters = sizes([12 * MiB])
    const gradients = gradientsOf(parameters, 1)
    const bytes = bytesOf(gradients[0]!)
    const slow = await opened(service, 'slow', parameters)
    const other = await opened(service, 'other', parameters)
    const socket: Socket = Reflect.get(slow.socket, '_socket')
    // A chunk that is there, and one of which some bytes are: in place they have their destination already.
    const second = inPlace ? 4 * MiB : 60_000
    const chunks = [0, 8 * MiB].map((offset, i) =>
      rawGradient(0, bytes.subarray(offset, i === 0 ? 8 * MiB : offset + second), { mask: ZERO, offset }),
    )
    const message = Buffer.concat(chunks)
    const cut = message.length - second / 4
    socket.write(message.subarray(0, cut))
    await until(() => staging.pressed.size === 1)
    const digests: string[] = []
    while (staging.pressed.size > 0) digests.push((await other.step(digests.length + 1, gradients)).digest)
    t.ok(service.runs.get('other').staging.ownBytes > 0, 'meanwhile the other had memory of its own')
    await until(() => staging.used === 0)
    t.ok(service.runs.get('slow').staging.ownBytes > 0)
    socket.write(message.subarray(cut))
    if (!inPlace) part(slow, 0, 8 * MiB + second, bytes.subarray(8 * MiB + second))
    slow.send({ type: 'end', step: 1 })
    t.equal((await slow.expect('receipt')).digest, digests[0], 'not a byte is lost')
    for (const client of [slow, other]) await client.close()
    await service.app.close()
  })
}

t.test('a slow gradient stays where its run has no other room, and moves later', async (t) => {
  const service = await startService({ staging_bytes: MiB, lanes: 1 })
  const { staging } = service.device
  const parameters = sizes([768 * 1024])
  const slow = await opened(service, 'slow', parameters)
  const other = await opened(service, 'other', parameters)
  const run = service.runs.get('slow')
  part(slow, 0, 0, new Uint8Array(64))
  await until(() => staging.pressed.size === 1)
  const taken = run.staging.tryReserveOwn(768 * 1024)!
  let step = 0
  const train = () => other.step(++step, gradientsOf(parameters, step))
  const begun = performance.now()
  // Two seconds, of which one is enough to tell that nothing comes.
  while (performance.now() - begun < 2000) await train()
  t.equal(staging.pressed.size, 1)
  taken.release()
  while (staging.pressed.size > 0) await train()
  await until(() => staging.used === 0)
  for (const client of [slow, other]) client.socket.terminate()
  await until(() => service.runs.list().every(({ connected }) => !connected))
  await service.app.close()
})

t.test('memory that there is not refuses that gradient alone, at once or when its turn comes', async (t) => {
  const service = await startService({ staging_bytes: MiB, lanes: 1 })
  const { staging, backend } = service.device
  const { allocate } = backend.host
  const parameters = sizes([400 * 1024, 600 * 1024, 2 * MiB])
  const [first, second, large] = gradientsOf(parameters, 1) as [Float32Array, Float32Array, Float32Array]
  const holder = await opened(service, 'holder', sizes([600 * 1024]))
  const client = await opened(service, 'r', parameters)
  const refusal = (parameter: number) => ({
    ...{ code: 'OVER_CAPACITY', parameter, step: 1 },
    message: `there is no memory for the gradient of parameter 'p${parameter}' for step 1: Error: Failed to allocate memory`,
  })
  // The run's own memory, in which its largest gradient has room.
  const lack = (bytes: number) => {
    if (bytes >= 2 * MiB) throw new Error('Failed to allocate memory')
    return allocate(bytes)
  }
  Reflect.set(backend.host, 'allocate', lack)
  client.gradient(2, 1, { values: large, chunk: 100_000 })
  t.match(await client.expect('error'), refusal(2))
  part(holder, 0, 0, new Uint8Array(64))
  await until(() => staging.used > 0)
  client.gradient(0, 1, { values: first, chunk: 100_000 })
  client.gradient(1, 1, { values: second, chunk: 100_000 })
  t.match(await client.expect('error'), refusal(1))
  Reflect.set(backend.host, 'allocate', allocate)
  for (const [index, values] of [second, large].entries()) client.gradient(index + 1, 1, { values })
  client.send({ type: 'end', step: 1 })
  t.match(await client.expect('receipt'), { step: 1, applied: 3 })
  holder.socket.terminate()
  await client.close()
  await service.app.close()
})

for (const what of ['abandoned', 'completed'] as const) {
  t.test(`a gradient can be ${what} while it moves, which takes many turns of the loop`, async (t) => {
    const service = await startService({ staging_bytes: 72 * MiB, chunk_bytes: 16 * MiB, lanes: 1 })
    const { staging } = service.device
    const [large, small] = [sizes([64 * MiB]), sizes([12 * MiB])]
    const slow = await opened(service, 'slow', large)
    const other = await opened(service, 'other', small)
    const values = new Float32Array(16 * MiB).map((_, i) => (i % 1000) - 500)
    const bytes = bytesOf(values)
    for (const offset of [0, 16, 32].map((at) => at * MiB))
      part(slow, 0, offset, bytes.subarray(offset, offset + 16 * MiB))
    part(slow, 0, 48 * MiB, bytes.subarray(48 * MiB, 63 * MiB))
    await until(() => staging.pressed.size === 1)
    const gradients = gradientsOf(small, 1)
    let step = 0
    while (staging.pressed.size > 0) {
      for (const values of gradients) other.gradient(0, step + 1, { values })
      other.send({ type: 'end', step: step + 1 })
      await until(() => staging.pressed.size === 0 || service.runs.get('other').step === step + 1)
      step += 1
    }
    if (what === 'abandoned') {
      slow.socket.terminate()
      await until(() => !service.runs.get('slow').connected)
    } else {
      part(slow, 0, 63 * MiB, bytes.subarray(63 * MiB))
      slow.send({ type: 'end', step: 1 })
      await slow.expect('receipt')
      t.ok(slow.updates.get(0)!.data.equals(bytes), 'the update of the first step is its gradient')
      await slow.close()
    }
    await until(() => service.runs.get('other').step === step && staging.used === 0)
    await service.runs.delete('slow')
    t.same([staging.used, staging.waiting, staging.pressed.size], [0, 0, 0])
    await other.close()
    await service.app.close()
  })
}

type Role = 'honest' | 'stalls' | 'leaves'
type Trainer = { role: Role; bytes: number[]; chunk: number; share: number }

/** Trains two steps; or begins a gradient, and then leaves, or sends no more. Answers the digests of the steps. */
async function take(service: Service, run: string, { role, bytes, chunk, share }: Trainer) {
  const parameters = sizes(bytes)
  const client = await opened(service, run, parameters)
  const digests: string[] = []
  for (const step of role === 'honest' ? [1, 2] : []) {
    const gradients = gradientsOf(parameters, step)
    digests.push((await client.step(step, gradients, [...gradients.keys()], chunk)).digest)
  }
  const [largest] = [...bytes].sort((a, b) => b - a)
  if (role !== 'honest')
    part(client, bytes.indexOf(largest!), 0, new Uint8Array(Math.max(4, Math.floor(share * (largest! - 4)))))
  if (role === 'leaves') client.socket.terminate()
  return { client, digests }
}

t.test(
  'whatever others hold and whenever they leave, everybody honest finishes, and the arena ends empty',
  async () => {
    const service = await startService({ staging_bytes: MiB, lanes: 1 })
    const { staging, memory } = service.device
    const calm = await startService({ lanes: 1 })
    const trainer = fc.record({
      role: fc.constantFrom<Role>('honest', 'honest', 'stalls', 'leaves'),
      bytes: fc.array(
        fc.integer({ min: 1, max: 400_000 }).map((elements) => 4 * elements),
        { minLength: 1, maxLength: 3 },
      ),
      chunk: fc.integer({ min: 20_000, max: 300_000 }).map((bytes) => bytes - (bytes % 4)),
      share: fc.double({ min: 0, max: 1, noNaN: true }),
    })
    let round = 0
    const property = fc.asyncProperty(fc.array(trainer, { minLength: 2, maxLength: 6 }), async (trainers) => {
      const name = (i: number) => `run${round}-${i}`
      round += 1
      const outcomes = await Promise.all(trainers.map((trainer, i) => take(service, name(i), trainer)))
      const expected = await Promise.all(
        trainers.map(async (trainer, i) => {
          if (trainer.role !== 'honest') return []
          const { client, digests } = await take(calm, name(i), trainer)
          await client.close()
          return digests
        }),
      )
      for (const { client } of outcomes) client.socket.terminate()
      for (const [i, { name: run }] of service.runs.list().entries()) {
        await until(() => !service.runs.get(run).connected)
        await service.runs.delete(run)
        if (trainers[i]?.role === 'honest') await calm.runs.delete(name(i)).catch(() => {})
      }
      const same = outcomes.every(({ digests }, i) => digests.join() === expected[i]!.join())
      return same && staging.used === 0 && staging.waiting === 0 && staging.pressed.size === 0 && memory.bytes === 0
    })
    await fc.assert(property, { seed: 2, numRuns: 12 })
    await service.app.close()
    await calm.app.close()
  },
)

t.test('pings are no progress: a gradient that stands still ends its connection', async (t) => {
  const service = await startService({ staging_bytes: MiB, send_timeout_seconds: 2, lanes: 1 })
  const half = await opened(service, 'half', sizes([768 * 1024]))
  part(half, 0, 0, new Uint8Array(4096))
  const closed = half.closed()
  let isOpen = true
  void closed.then(() => {
    isOpen = false
  })
  let pings = 0
  while (isOpen) {
    await new Promise<void>((resolve) => half.socket.ping(Buffer.alloc(125), true, () => resolve()))
    pings += 1
    if (pings % 100 === 0) half.socket.pong()
    await turn()
  }
  t.equal((await closed).code, 1013)
  t.match(await half.next(), {
    code: 'OVERLOADED',
    retryable: true,
    retry_after_seconds: 1,
    message: /^\d+ bytes moved within 2 seconds, at least 131072 must$/,
  })
  t.ok(pings * 131 > 131_072, `${pings} pings`)
  t.equal(service.device.staging.used, 0)
  await service.app.close()
})

t.test('updates that nobody reads end their connection, whatever signs of life it gives', async (t) => {
  const service = await startService({ send_timeout_seconds: 2, lanes: 1 })
  const parameters = sizes([32 * MiB, 32 * MiB])
  const deaf = await opened(service, 'deaf', parameters)
  deaf.socket.pause()
  for (const index of [0, 1]) deaf.gradient(index, 1, { values: new Float32Array(8 * MiB) })
  for (let turns = 0; (await told(service, 'OVERLOADED')) === 0; turns++) {
    if (turns % 1000 === 0) deaf.socket.ping()
    await turn()
  }
  deaf.socket.resume()
  t.match(await deaf.expect('error'), { message: /^\d+ bytes moved within 2 seconds, at least 131072 must$/ })
  t.equal((await deaf.closed()).code, 1013)
  await until(() => !service.runs.get('deaf').connected)
  const heir = await RawClient.connect(service.url)
  t.match(await heir.open({ run: 'deaf' }), { ahead: [0, 1], step: 0 })
  await heir.close()
  await service.app.close()
})

t.test('small gradients that are all here take one turn of the event loop after the other', async (t) => {
  const service = await startService({ lanes: 1 })
  const count = 20_000
  const parameters = sizes(new Array(count).fill(4))
  const client = await opened(service, 'many', parameters)
  const socket: Socket = Reflect.get(client.socket, '_socket')
  const data = bytesOf(normal(1, 1))
  socket.write(Buffer.concat(parameters.map((_, i) => rawGradient(i, data, { mask: ZERO }))))
  const received = async () => (await service.metrics.received_bytes_total.get()).values[0]?.value ?? 0
  const bytes = [0]
  for (let last = 0; last < 4 * count; ) {
    await turn()
    last = await received()
    bytes.push(last)
  }
  // Within the slice of a turn no machine takes so many.
  const most = Math.max(...bytes.slice(1).map((value, i) => value - bytes[i]!)) / 4
  t.ok(most < 10_000, `${most} in one turn`)
  client.send({ type: 'end', step: 1 })
  t.match(await client.expect('receipt'), { step: 1, applied: count })
  await client.close()
  await service.app.close()
})
