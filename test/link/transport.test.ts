import { createHash, randomBytes } from 'node:crypto'
import { closeSync, openSync } from 'node:fs'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { agree } from '../../src/link/transport.js'
import type { OpenedFrame, TransportOffer, UpdatesFrame } from '../../src/wire/frame.js'
import { makeMemory, type OwnMemory } from '../../src/wire/shared-memory.js'
import { layOut, PROOF_BYTES } from '../../src/wire/slots.js'
import { bytesOf, normal, RawClient, type Service, startService, turn, until } from '../service.js'

const GROUPS = [
  { name: 'muon', algorithm: 'muon', lr: 0.02 },
  { name: 'normuon', algorithm: 'muon', second_momentum: 'normuon', lr: 0.02 },
  { name: 'adamw', algorithm: 'adamw', lr: 0.001, weight_decay: 0.1 },
  { name: 'sgd', algorithm: 'sgd', lr: 0.1, momentum: 0.9 },
  { name: 'rmsprop', algorithm: 'rmsprop', lr: 0.01 },
]
const PARAMETERS = [
  { name: 'a', shape: [24, 40], group: 'muon' },
  { name: 'b', shape: [40, 24], group: 'normuon' },
  { name: 'c', shape: [7], group: 'adamw' },
  { name: 'd', shape: [33, 5], group: 'sgd' },
  { name: 'e', shape: [1], group: 'rmsprop' },
]
const SIZES = PARAMETERS.map(({ shape }) => 4 * shape.reduce((product, dim) => product * dim, 1))
const { offsets, bytes } = layOut(SIZES)

/** Both arenas of a client, and the offer of them. */
class Arenas {
  readonly gradients: OwnMemory
  readonly updates: OwnMemory
  readonly offer: TransportOffer

  constructor(sizes = [bytes, bytes]) {
    const nonce = randomBytes(PROOF_BYTES)
    this.gradients = makeMemory(sizes[0]!)
    this.updates = makeMemory(sizes[1]!)
    this.gradients.view.set(nonce)
    const descriptors = [this.gradients.descriptor, this.updates.descriptor]
    this.offer = { kind: 'shm', nonce, process: process.pid, descriptors }
  }

  put(index: number, values: Float32Array): void {
    this.gradients.view.set(bytesOf(values), offsets[index])
  }

  update(index: number): Buffer {
    return Buffer.from(this.updates.view.slice(offsets[index], offsets[index]! + SIZES[index]!))
  }

  free(): void {
    this.gradients.unmap()
    this.updates.unmap()
  }
}

const gradientsOf = (step: number) => SIZES.map((size, i) => normal(100 * step + i, size / 4))
const open = (run: string) => ({ run, groups: GROUPS, parameters: PARAMETERS })

/** Takes a step in shared memory; answers the receipt, and the updates as the socket would have brought them. */
async function stepShared(client: RawClient, arenas: Arenas, step: number, order: readonly number[]) {
  const gradients = gradientsOf(step)
  for (const index of order) arenas.put(index, gradients[index]!)
  client.send({ type: 'gradients', step, parameters: order })
  client.send({ type: 'end', step })
  const told = new Map<number, Record<string, unknown>>()
  for (;;) {
    const frame = await client.next()
    if (frame.type === 'receipt') return { receipt: frame, told }
    for (const [index, update] of read(frame as UpdatesFrame))
      told.set(index, { ...update, data: arenas.update(index) })
  }
}

function read(frame: UpdatesFrame): [number, Record<string, unknown>][] {
  if (frame.type !== 'updates') throw new Error(JSON.stringify(frame))
  const { parameters, scale, decay, gradient_norm, update_rms, replayed } = frame
  return parameters.map((index, i) => [
    index,
    { scale: scale[i], decay: decay[i], gradient_norm: gradient_norm[i], update_rms: update_rms[i], replayed },
  ])
}

async function shared(service: Service, run: string, arenas: Arenas, offers = [arenas.offer]) {
  const client = await RawClient.connect(service.url)
  const opened = await client.open({ ...open(run), transport: offers })
  return { client, opened }
}

const taken = ({ transport }: OpenedFrame) => transport?.kind

for (const durability of ['none', 'journal'] as const) {
  t.test(`shared memory has the bits of the socket, ${durability}`, async (t) => {
    const data = durability === 'journal' ? { data: t.testdir(), durability } : {}
    const service = await startService({ ...data, staging_bytes: 2 ** 20 })
    const arenas = new Arenas()
    const socket = await RawClient.connect(service.url)
    await socket.open(open('socket'))
    const { client, opened } = await shared(service, 'shared', arenas)
    t.same(opened.transport, { kind: 'shm', refused: [] })
    const answer = createHash('sha256').update(arenas.offer.nonce).digest()
    t.same(Buffer.from(arenas.updates.view.slice(0, PROOF_BYTES)), answer, 'the service has proved itself')
    const orders = [
      [0, 1, 2, 3, 4],
      [4, 2, 0, 3, 1],
      [1, 4, 3, 2, 0],
    ]
    for (const [i, order] of orders.entries()) {
      const receipt = await socket.step(i + 1, gradientsOf(i + 1))
      const { receipt: same, told } = await stepShared(client, arenas, i + 1, order)
      t.equal(same.digest, receipt.digest, `step ${i + 1}`)
      t.same(new Map([...told].sort()), new Map([...socket.updates].sort()), `updates of step ${i + 1}`)
    }
    const again = await stepShared(client, arenas, 3, [3, 0])
    t.same(
      [...again.told.values()].map(({ replayed }) => replayed),
      [true, true],
      'a replay',
    )
    t.equal(again.receipt.digest, (await socket.step(3, gradientsOf(3))).digest)
    await client.close()
    const later = await RawClient.connect(service.url)
    await later.open({ run: 'shared', mode: 'resume' })
    t.equal((await later.step(4, gradientsOf(4))).digest, (await socket.step(4, gradientsOf(4))).digest, 'by socket')
    await later.close()
    await socket.close()
    t.equal(service.device.staging.used, 0)
    await service.app.close()
    arenas.free()
  })
}

t.test('both ways in one step, and the arena too small for two gradients', async (t) => {
  const service = await startService({ staging_bytes: 2 ** 20 })
  const large = [
    { name: 'a', shape: [150_000], group: 'adamw' },
    { name: 'b', shape: [150_000], group: 'adamw' },
  ]
  const sizes = [600_000, 600_000]
  const { offsets, bytes } = layOut(sizes)
  const arenas = new Arenas([bytes, bytes])
  const client = await RawClient.connect(service.url)
  const groups = [{ name: 'adamw', algorithm: 'adamw', lr: 0.001 }]
  t.equal(taken(await client.open({ run: 'r', groups, parameters: large, transport: [arenas.offer] })), 'shm')
  for (const i of [0, 1]) arenas.gradients.view.set(bytesOf(normal(i, 150_000)), offsets[i])
  client.send({ type: 'gradients', step: 1, parameters: [0, 1, 0] })
  client.gradient(1, 1, { values: normal(1, 150_000) })
  client.send({ type: 'end', step: 1 })
  const frames = [await client.next()]
  while (frames.at(-1)?.type !== 'receipt') frames.push(await client.next())
  const told = frames.flatMap((frame) => (frame.type === 'updates' ? frame.parameters : []))
  t.same(told.sort(), [0, 0, 1], 'one of them twice, as a replay')
  const slot = arenas.updates.view.slice(offsets[1], offsets[1]! + 600_000)
  t.same(client.updates.get(1)?.data, Buffer.from(slot), 'the socket has the same bytes')
  await client.close()
  await service.app.close()
  arenas.free()
})

t.test('hundreds of gradients in one frame, of which some have to wait for each other', async (t) => {
  const service = await startService({ staging_bytes: 2 ** 20 })
  const count = 1100
  const groups = [{ name: 'sgd', algorithm: 'sgd', lr: 0.1 }]
  const parameters = Array.from({ length: count }, (_, i) => ({ name: `p${i}`, shape: [1 + (i % 7)], group: 'sgd' }))
  const sizes = parameters.map(({ shape: [size] }) => 4 * size!)
  const { offsets, bytes } = layOut(sizes)
  const arenas = new Arenas([bytes, bytes])
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'many', groups, parameters, transport: [arenas.offer] })
  const socket = await RawClient.connect(service.url)
  await socket.open({ run: 'beside', groups, parameters })
  const gradients = sizes.map((size, i) => normal(i, size / 4))
  for (const [i, values] of gradients.entries()) arenas.gradients.view.set(bytesOf(values), offsets[i])
  const indices = gradients.map((_, i) => i)
  client.send({ type: 'gradients', step: 1, parameters: [...indices, 0, 1] })
  client.send({ type: 'end', step: 1 })
  let told = 0
  let frame = await client.next()
  for (; frame.type === 'updates'; frame = await client.next()) {
    t.ok(frame.parameters.length <= 512)
    told += frame.parameters.length
  }
  t.equal(told, count + 2)
  t.match(frame, { type: 'receipt', digest: (await socket.step(1, gradients)).digest })
  for (const i of [0, 1, 500, count - 1]) {
    const slot = arenas.updates.view.slice(offsets[i], offsets[i]! + sizes[i]!)
    t.same(Buffer.from(slot), socket.updates.get(i)?.data)
  }
  const again = await RawClient.connect(service.url)
  t.equal((await again.open({ run: 'beside', groups, parameters, takeover: true })).step, 1)
  await socket.closed()
  client.send({ type: 'gradients', step: 2, parameters: indices })
  client.socket.terminate()
  await client.closed()
  await again.step(2, gradients)
  while (service.device.staging.used > 0) await turn()
  await again.close()
  await service.app.close()
  arenas.free()
})

t.test('of one frame only some hundred gradients are under way at a time', async (t) => {
  const service = await startService()
  const count = 1100
  const groups = [{ name: 'sgd', algorithm: 'sgd', lr: 0.1 }]
  const parameters = Array.from({ length: count }, (_, i) => ({ name: `p${i}`, shape: [4], group: 'sgd' }))
  const { bytes } = layOut(parameters.map(() => 16))
  const arenas = new Arenas([bytes, bytes])
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'many', groups, parameters, transport: [arenas.offer] })
  const { device } = service
  const enqueue = device.enqueue.bind(device)
  let asked = 0
  let open = () => {}
  const opened = new Promise<void>((resolve) => {
    open = resolve
  })
  device.enqueue = (...job) => {
    asked += 1
    void opened.then(() => enqueue(...job))
  }
  client.send({ type: 'gradients', step: 1, parameters: parameters.map((_, i) => i) })
  client.send({ type: 'end', step: 1 })
  await until(() => asked >= 512)
  for (let i = 0; i < 100; i++) await turn()
  t.ok(asked < 2 * 512, `${asked} of ${count} are under way`)
  open()
  let frame = await client.next()
  while (frame.type === 'updates') frame = await client.next()
  t.match(frame, { type: 'receipt', step: 1 })
  t.equal(asked, count)
  await client.close()
  await service.app.close()
  arenas.free()
})

t.test('a gradient that there is no memory to copy to is refused by its name', async (t) => {
  const service = await startService({ staging_bytes: 2 ** 20 })
  const { host } = service.device.backend
  const { allocate } = host
  const { offsets, bytes } = layOut([2 ** 21])
  const arenas = new Arenas([bytes, bytes])
  const client = await RawClient.connect(service.url)
  const groups = [{ name: 'sgd', algorithm: 'sgd', lr: 0.1 }]
  const parameters = [{ name: 'large', shape: [2 ** 19], group: 'sgd' }]
  await client.open({ run: 'r', groups, parameters, transport: [arenas.offer] })
  arenas.gradients.view.set(bytesOf(normal(1, 2 ** 19)), offsets[0])
  Reflect.set(host, 'allocate', () => {
    throw new Error('Failed to allocate memory')
  })
  client.send({ type: 'gradients', step: 1, parameters: [0] })
  const message = /^there is no memory for the gradient of parameter 'large' for step 1: /
  t.match(await client.expect('error'), { code: 'OVER_CAPACITY', parameter: 0, step: 1, message })
  Reflect.set(host, 'allocate', allocate)
  client.send({ type: 'gradients', step: 1, parameters: [0] })
  client.send({ type: 'end', step: 1 })
  t.match(await client.expect('updates'), { parameters: [0] })
  t.match(await client.expect('receipt'), { applied: 1 })
  await client.close()
  await service.app.close()
  arenas.free()
})

t.test('a gradient that waits for the one before it is dropped when another client takes the run over', async (t) => {
  const service = await startService({ lanes: 1 })
  const groups = [{ name: 'm', algorithm: 'muon', lr: 0.1 }]
  // So large that the run is taken over long before its step is computed.
  const parameters = [{ name: 'w', shape: [1024, 1024], group: 'm' }]
  const { offsets, bytes } = layOut([2 ** 22])
  const arenas = new Arenas([bytes, bytes])
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups, parameters, transport: [arenas.offer] })
  arenas.gradients.view.set(bytesOf(normal(1, 2 ** 20)), offsets[0])
  client.send({ type: 'gradients', step: 1, parameters: [0, 0] })
  while (service.device.staging.used === 0) await turn()
  const other = await RawClient.connect(service.url)
  t.same((await other.open({ run: 'r', groups, parameters, takeover: true })).ahead, [0], 'the first was applied')
  t.match(await client.closed(), { code: 4409 })
  while (service.device.staging.used > 0) await turn()
  await other.close()
  await service.app.close()
  arenas.free()
})

t.test(
  'rows that QK-clip scales come with updates in shared memory, and those of a skipped parameter by themselves',
  async (t) => {
    const service = await startService()
    const groups = [{ name: 'g', algorithm: 'muonclip', lr: 0.1 }]
    const parameters = ['q', 'k'].map((name) => ({ name, shape: [8, 4], group: 'g' }))
    const attentions = [{ name: 'a', query_heads: 2, head_dim: 4, query: { parameter: 0 }, key: { parameter: 1 } }]
    const { offsets, bytes } = layOut([128, 128])
    const arenas = new Arenas([bytes, bytes])
    const client = await RawClient.connect(service.url)
    await client.open({ run: 'r', groups, parameters, attentions, transport: [arenas.offer] })
    for (const i of [0, 1]) arenas.gradients.view.set(bytesOf(normal(i, 32)), offsets[i])
    client.send({ type: 'step', step: 1, max_logits: { a: [400, 50] } })
    client.send({ type: 'gradients', step: 1, parameters: [0] })
    client.send({ type: 'end', step: 1, skipped: [1] })
    const frame = await client.next()
    if (frame.type !== 'updates') throw new Error(JSON.stringify(frame))
    const rows = frame.row_scale?.['0']
    t.equal(rows?.length, 32, 'a float32 for each row')
    t.equal((await client.expect('receipt')).clipped_heads.a, 1)
    t.same(client.updates.get(1)?.row_scale, Buffer.from(rows!), 'of a skipped parameter as on the socket')
    await client.close()
    await service.app.close()
    arenas.free()
  },
)

t.test('a client on another host is refused whatever it offers', async (t) => {
  const service = await startService()
  const arenas = new Arenas()
  const { client } = await shared(service, 'r', arenas)
  const { device, runs } = service
  const run = runs.get('r')
  const { answer, arenas: none } = agree([arenas.offer], {
    device,
    run,
    member: run.intake.members.connected[0]!,
    local: false,
  })
  t.same(answer, {
    kind: 'websocket',
    refused: [{ kind: 'shm', reason: 'the client is on another host: no memory is shared' }],
  })
  t.equal(none, undefined)
  await client.close()
  await service.app.close()
  arenas.free()
})

t.test('a refused gradient keeps its place free, and the others of the frame are taken', async (t) => {
  const service = await startService()
  const arenas = new Arenas()
  const { client } = await shared(service, 'r', arenas)
  const gradients = gradientsOf(1)
  gradients[2]![3] = Number.NaN
  for (const [i, values] of gradients.entries()) arenas.put(i, values)
  client.send({ type: 'gradients', step: 1, parameters: [0, 99, 2, 1, 3, 4] })
  const codes: (string | undefined)[] = []
  while (codes.length < 2) {
    const frame = await client.next()
    if (frame.type === 'error') codes.push(`${frame.code} ${frame.parameter}`)
  }
  t.same(codes.sort(), ['GRADIENT_NOT_FINITE 2', 'PARAMETER_UNKNOWN 99'])
  client.send({ type: 'gradients', step: 7, parameters: [0] })
  client.send({ type: 'end', step: 1, skipped: [2] })
  const errors: unknown[] = []
  for (let frame = await client.next(); frame.type !== 'receipt'; frame = await client.next())
    if (frame.type === 'error') errors.push(frame.code)
  t.same(errors, ['STEP_CONFLICT'])
  await client.close()
  await service.app.close()
  arenas.free()
})

/** A client that offers something that cannot be taken: it is told why, and the socket is the way. */
async function refusal(t: Test, service: Service, offer: TransportOffer, reason: RegExp): Promise<void> {
  const client = await RawClient.connect(service.url)
  const { transport } = await client.open({ ...open('refused'), transport: [offer] })
  t.equal(transport?.kind, 'websocket')
  t.match(transport?.refused, [{ kind: offer.kind, reason }])
  t.ok((await client.step(1, gradientsOf(1))).digest)
  await client.close()
  await service.runs.delete('refused')
}

t.test('what is not the memory of the client, or not enough of it, is refused with the reason', async (t) => {
  const service = await startService()
  const arenas = new Arenas()
  const { offer } = arenas
  const file = openSync(join(t.testdir({ f: 'x'.repeat(100_000) }), 'f'), 'r+')
  const small = new Arenas([bytes, bytes - 1])
  const cases: [Partial<TransportOffer>, RegExp][] = [
    [{ nonce: randomBytes(PROOF_BYTES) }, /does not begin with the nonce/],
    [{ nonce: offer.nonce.subarray(1) }, /the nonce has 31 bytes, expected 32/],
    [{ descriptors: [file, file] }, /is .*f, expected a memfd/],
    [{ descriptors: [9999, 9999] }, /ENOENT/],
    [{ descriptors: [offer.descriptors![0]!] }, /needs process and two descriptors/],
    [{ process: undefined }, /needs process and two descriptors/],
    [{ process: 2 ** 40 }, /ENOENT/],
    [{ kind: 'carrier-pigeon' }, /does not know the transport 'carrier-pigeon'/],
    [{ kind: 'cuda-ipc', gpu: 'GPU-1', handles: [randomBytes(64), randomBytes(64)] }, /the service computes on cpu/],
    [{ kind: 'cuda-ipc' }, /needs gpu and two handles/],
    [{ ...small.offer }, new RegExp(`has ${bytes - 1} bytes, expected are ${bytes} or more`)],
  ]
  for (const [change, reason] of cases) await refusal(t, service, { ...offer, ...change }, reason)
  const none = await RawClient.connect(service.url)
  const { transport } = await none.open(open('none'))
  t.equal(transport, undefined, 'nothing is said to a client that offers nothing')
  none.send({ type: 'gradients', step: 1, parameters: [0] })
  t.match(await none.next(), { code: 'FRAME_UNEXPECTED', message: /shares no memory/ })
  await none.closed()
  const second = await shared(service, 'second', arenas, [{ ...offer, kind: 'x' }, offer])
  t.match(second.opened.transport, { kind: 'shm', refused: [{ kind: 'x' }] }, 'the first that works')
  await second.client.close()
  closeSync(file)
  await service.app.close()
  for (const one of [arenas, small]) one.free()
})

t.test('nothing leaks: a thousand opens leave no mapping and no descriptor', async (t) => {
  const { readdirSync, readFileSync } = await import('node:fs')
  const figures = () => ({
    descriptors: readdirSync('/proc/self/fd').length,
    mappings: readFileSync('/proc/self/maps', 'utf8')
      .split('\n')
      .filter((line) => line.includes('memfd:muond')).length,
  })
  const service = await startService()
  const arenas = new Arenas()
  const before = figures()
  t.equal(before.mappings, 2)
  for (let i = 0; i < 1000; i++) {
    const { client } = await shared(service, 'r', arenas)
    if (i % 2 === 0) client.socket.terminate()
    await client.close()
    while (service.runs.list().some(({ connected }) => connected)) await turn()
  }
  while (figures().mappings > 2) await turn()
  t.ok(
    figures().descriptors <= before.descriptors + 1,
    `${JSON.stringify(figures())}, before ${JSON.stringify(before)}`,
  )
  await service.app.close()
  arenas.free()
})
