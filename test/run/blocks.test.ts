import fc from 'fast-check'
import t from 'tap'
import { blocksOf, decodeBlocks } from '../../kernels/blocks.js'
import { BLOCK_DTYPES, type BlockDtype, isBlockDtype, tensorBytes } from '../../kernels/dtype.js'
import { makeMemory } from '../../src/wire/shared-memory.js'
import { layOut } from '../../src/wire/slots.js'
import { alone, Crew, elementsOf, gradientsOf, type Model, type Split } from '../members/crew.js'
import { meanOf } from '../replicas/oracle.js'
import { closeTroop, openTroop, receipts, send, updatesOf } from '../replicas/troop.js'
import { normal, RawClient, startService } from '../service.js'

const NAMES = Object.keys(BLOCK_DTYPES).filter(isBlockDtype)
const GROUPS = [
  { name: 'm', algorithm: 'muon', lr: 0.02, second_momentum: 'normuon' },
  { name: 'a', algorithm: 'adamw', lr: 0.01 },
  { name: 's', algorithm: 'sgd', lr: 0.7, momentum: 0.9, nesterov: true },
]
/** None has whole blocks alone. */
const SHAPES = [
  ['matrix', [24, 40], 'm'],
  ['vector', [301], 'a'],
  ['flat', [7, 93], 's'],
  ['scalar', [], 's'],
] as const
const modelOf = (gradient_dtype: string, update_dtype: string): Model => ({
  groups: GROUPS,
  parameters: SHAPES.map(([name, shape, group]) => ({ name, shape, group, gradient_dtype, update_dtype })),
})
const PLAIN = modelOf('float32', 'float32')
const VALUES = gradientsOf(PLAIN, { seed: 18, steps: 3 })
const inBlocks = (dtype: BlockDtype) => VALUES.map((step) => step.map((values) => blocksOf(values, dtype)))

function decoded(bytes: Uint8Array, dtype: BlockDtype, elements: number): Float32Array {
  const values = new Float32Array(elements)
  decodeBlocks(bytes, dtype, values)
  return values
}

const float32 = (bytes: Uint8Array) => new Float32Array(Uint8Array.from(bytes).buffer)
const rms = (values: Float32Array) => Math.sqrt(values.reduce((sum, x) => sum + x * x, 0) / values.length)

const service = await startService()
t.teardown(() => service.app.close())
const { url } = service
let runs = 0
const fresh = () => `blocks-${++runs}`

for (const dtype of NAMES) {
  t.test(`gradients in ${dtype} are those that they decode to, and updates are encoded once computed`, async (t) => {
    const sent = inBlocks(dtype)
    const steps = sent.map((step) => step.map((bytes, i) => decoded(bytes, dtype, elementsOf(PLAIN.parameters[i]!))))
    const wide = await alone(url, fresh(), { model: PLAIN, steps })
    const narrow = await alone(url, fresh(), { model: modelOf(dtype, 'float32'), steps: sent })
    const both = await alone(url, fresh(), { model: modelOf(dtype, dtype), steps: sent })
    for (const [n, { updates, receipt }] of wide.entries()) {
      t.same(narrow[n]!.updates, updates)
      t.same(
        both[n]!.updates,
        updates.map((bytes) => blocksOf(float32(bytes), dtype)),
      )
      t.equal(narrow[n]!.receipt.gradient_norm, receipt.gradient_norm)
      t.not(narrow[n]!.receipt.digest, receipt.digest, 'the digest is of the bytes that travelled')
      t.not(both[n]!.receipt.digest, narrow[n]!.receipt.digest)
    }
  })
}

t.test('update_rms is that of the update as it is sent', async (t) => {
  const client = await RawClient.connect(url)
  await client.open({ run: fresh(), ...modelOf('float32', 'int4_block64') })
  await client.step(1, VALUES[0]!)
  const { data, update_rms } = client.updates.get(2)!
  const expected = rms(decoded(data, 'int4_block64', 7 * 93))
  t.ok(Math.abs(update_rms / expected - 1) < 1e-6, `${update_rms} for ${expected}`)
  await client.close()
})

t.test('any cuts of the bytes lead to the same digest and updates', async () => {
  const sent = inBlocks('int4_block64')
  const model = modelOf('int4_block64', 'int8_block256')
  const [first] = await alone(url, fresh(), { model, steps: sent.slice(0, 1) })
  await fc.assert(
    fc.asyncProperty(
      fc.integer({ min: 1, max: 700 }),
      fc.shuffledSubarray([0, 1, 2, 3], { minLength: 4 }),
      async (chunk, order) => {
        const client = await RawClient.connect(url)
        await client.open({ run: fresh(), ...model })
        const { digest } = await client.step(1, sent[0]!, order, chunk)
        await client.close()
        return (
          digest === first!.receipt.digest &&
          first!.updates.every((bytes, i) => client.updates.get(i)!.data.equals(bytes))
        )
      },
    ),
    { seed: 18, numRuns: 20 },
  )
})

t.test('a replay is held against the bytes that were sent, and answered with the same bytes', async (t) => {
  const [sent] = inBlocks('int8_block256')
  const run = fresh()
  const client = await RawClient.connect(url)
  await client.open({ run, ...modelOf('int8_block256', 'int4_block64') })
  await client.step(1, sent!)
  const again = await RawClient.connect(url)
  t.match(await again.open({ run, takeover: true }), {
    parameters: [{ gradient_dtype: 'int8_block256', update_dtype: 'int4_block64' }],
  })
  await again.step(1, sent!)
  for (const [index, update] of again.updates) {
    t.equal(update.replayed, true)
    t.same(update.data, client.updates.get(index)!.data)
  }
  // Another last integer.
  const other = Uint8Array.from(sent![0]!)
  other[other.length - 1]! ^= 1
  again.gradient(0, 1, { values: other })
  t.match(await again.expect('error'), { code: 'STEP_CONFLICT', message: /applied for step 1 with another gradient/ })
  await again.close()
})

t.test(
  'after a crash the journal leads to the same digest, and the run goes on as one that never crashed',
  async (t) => {
    const data = t.testdir()
    const start = () => startService({ data, durability: 'journal', checkpoint_steps: 0, lanes: 1, drain_seconds: 0 })
    const sent = inBlocks('int4_block64')
    const model = modelOf('int4_block64', 'int8_block256')
    const undisturbed = await alone(url, fresh(), { model, steps: sent })
    const before = await start()
    await alone(before.url, 'r', { model, steps: sent.slice(0, 2) })
    await before.app.close()
    const after = await start()
    const client = await RawClient.connect(after.url)
    t.match(await client.open({ run: 'r', ...model }), { step: 2, digest: undisturbed[1]!.receipt.digest })
    t.equal((await client.step(3, sent[2]!)).digest, undisturbed[2]!.receipt.digest)
    for (const [i, bytes] of undisturbed[2]!.updates.entries()) t.same(client.updates.get(i)!.data, Buffer.from(bytes))
    await client.close()
    await after.app.close()
  },
)

t.test(
  'a scale that is NaN or Inf, or too large for its integers, refuses the gradient, and a good one follows',
  async (t) => {
    const client = await RawClient.connect(url)
    await client.open({ run: fresh(), ...modelOf('int8_block256', 'float32') })
    const [good] = inBlocks('int8_block256')
    for (const pattern of [0x7fc0, 0x7f80, 0xff80, 0x7f7f]) {
      const bad = Uint8Array.from(good![0]!)
      bad.set([pattern & 0xff, pattern >> 8], 258)
      client.gradient(0, 1, { values: bad })
      t.match(await client.expect('error'), { code: 'GRADIENT_NOT_FINITE', parameter: 0, step: 1 })
    }
    const { step } = await client.step(1, good!)
    t.equal(step, 1)
    t.equal(client.updates.get(0)!.replayed, false)
    await client.close()
  },
)

t.test('a gradient has the bytes of its blocks', async (t) => {
  const client = await RawClient.connect(url)
  await client.open({ run: fresh(), ...modelOf('int4_block64', 'float32') })
  const bytes = tensorBytes('int4_block64', 960)
  t.equal(bytes, 510)
  client.gradient(0, 1, { values: new Uint8Array(bytes + 1) })
  t.match(await client.expect('error'), { code: 'SHAPE_MISMATCH', message: /511 bytes or more, expected 510/ })
  await client.close()
})

t.test('a type that there is not is refused with those that there are', async (t) => {
  const client = await RawClient.connect(url)
  client.send({ type: 'open', protocol: 1, run: fresh(), ...modelOf('int4_block32', 'float32') })
  const message = /int4_block32.*expected one of float32, bfloat16, float16, int8_block256, int4_block64/
  t.match(await client.expect('error'), { code: 'DTYPE_UNSUPPORTED', message })
  await client.close()
})

t.test('what travels in blocks is not shared, and the reason says so', async (t) => {
  const client = await RawClient.connect(url)
  const model = modelOf('float32', 'int8_block256')
  const { bytes } = layOut([1e4])
  const arenas = [makeMemory(bytes), makeMemory(bytes)]
  const offer = {
    kind: 'shm',
    nonce: new Uint8Array(32),
    process: process.pid,
    descriptors: arenas.map((one) => one.descriptor),
  }
  const { transport } = await client.open({ run: fresh(), ...model, transport: [offer] })
  t.match(transport, { kind: 'websocket', refused: [{ reason: /'matrix' travel in blocks, over the socket alone/ }] })
  await client.close()
  for (const arena of arenas) arena.unmap()
})

const LONG: Model = {
  groups: GROUPS,
  parameters: [
    { name: 'rows', shape: [10, 64], group: 'm', gradient_dtype: 'int4_block64', update_dtype: 'float32' },
    { name: 'both', shape: [600], group: 's', gradient_dtype: 'int4_block64', update_dtype: 'int8_block256' },
  ],
}
const CUT: Split = [
  [[[0, 320]], [[320, 640]]],
  [
    [
      [0, 256],
      [512, 600],
    ],
    [[256, 512]],
  ],
]

t.test('members send and receive whole blocks, to the digest and the bytes of one member', async (t) => {
  const steps = gradientsOf(LONG, { seed: 4, steps: 2 }).map((step) =>
    step.map((values) => blocksOf(values, 'int4_block64')),
  )
  const lone = await alone(url, fresh(), { model: LONG, steps })
  const crew = await Crew.open(url, fresh(), { model: LONG, split: CUT })
  for (const [i, gradients] of steps.entries()) {
    const { receipts, updates } = await crew.step(i + 1, gradients)
    for (const { digest } of receipts) t.equal(digest, lone[i]!.receipt.digest)
    t.same(updates, lone[i]!.updates)
  }
  const bad = Uint8Array.from(steps[0]![1]!)
  bad.set([0xc0, 0x7f], tensorBytes('int4_block64', 256))
  for (const mate of crew.mates) {
    mate.send(1, 3, bad)
    mate.end(3, [0])
  }
  for (const mate of crew.mates)
    t.match(await mate.error(), { code: 'GRADIENT_NOT_FINITE', message: /NaN or Inf was sent by rank 1$/ })
  await crew.close()
})

t.test('a range that cuts a block is refused with the length of a block', async (t) => {
  const open = async (ranges: readonly (readonly number[])[]) => {
    const client = await RawClient.connect(url)
    const parameters = [LONG.parameters[0]!, { ...LONG.parameters[1]!, ranges }]
    client.send({ type: 'open', protocol: 1, run: fresh(), ...LONG, parameters, member: { rank: 0, world_size: 2 } })
    const frame = await client.next()
    await client.close()
    return frame
  }
  const message = /expected multiples of 256: blocks of int4_block64 and int8_block256 are not cut/
  for (const range of [
    [64, 256],
    [256, 320],
  ])
    t.match(await open([range]), { type: 'error', code: 'PARAMETER_INVALID', parameter: 1, message })
  t.match(await open([[512, 600]]), { type: 'opened' })
})

t.test('more memory is admitted for what is decoded: the refusal counts it', async (t) => {
  const small = await startService({ state_bytes_limit: 2 ** 20 })
  const needed = async (gradient_dtype: string) => {
    const client = await RawClient.connect(small.url)
    const parameters = [{ name: 'w', shape: [2 ** 20], group: 's', gradient_dtype }]
    client.send({ type: 'open', protocol: 1, run: 'r', groups: GROUPS, parameters })
    const { message } = await client.expect('error')
    await client.close()
    return Number(/needs (\d+) bytes/.exec(message)?.[1])
  }
  const [plain, packed] = [await needed('float32'), await needed('int8_block256')]
  t.equal(packed - plain, 4 * 2 ** 20, 'float32 of the gradient, while it is computed')
  await small.app.close()
})

t.test('random gradients of many lengths come back as their blocks', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.integer({ min: 1, max: 1100 }),
      fc.constantFrom(...NAMES),
      fc.constantFrom(...NAMES),
      async (elements, up, down) => {
        const client = await RawClient.connect(url)
        const parameters = [{ name: 'w', shape: [elements], group: 'p', gradient_dtype: up, update_dtype: down }]
        await client.open({ run: fresh(), groups: [{ name: 'p', algorithm: 'sgd', lr: 1 }], parameters })
        const bytes = blocksOf(normal(elements, elements), up)
        await client.step(1, [bytes])
        await client.close()
        return client.updates.get(0)!.data.equals(blocksOf(decoded(bytes, up, elements), down))
      },
    ),
    { seed: 18, numRuns: 25 },
  )
})

/** More elements than are averaged at a time, and no whole blocks. */
const LARGE: Model = {
  groups: [{ name: 's', algorithm: 'sgd', lr: 1 }],
  parameters: [
    { name: 'large', shape: [40_003], group: 's', gradient_dtype: 'int8_block256', update_dtype: 'float32' },
    { name: 'small', shape: [65], group: 's', gradient_dtype: 'int4_block64', update_dtype: 'int4_block64' },
  ],
}
const HALVES: Split = [
  [[[0, 256 * 80]], [[256 * 80, 40_003]]],
  [[], [[0, 65]]],
]

t.test('the mean of replicas is that of what their blocks decode to, also after a crash', async (t) => {
  const data = t.testdir()
  const start = () => startService({ data, durability: 'journal', checkpoint_steps: 0, lanes: 1, drain_seconds: 0 })
  const durable = await start()
  const weights = [1, 2.5, 1]
  const values = weights.map((_, r) => [normal(r + 1, 40_003), normal(r + 11, 65)])
  const sent = values.map(([large, small]) => [blocksOf(large!, 'int8_block256'), blocksOf(small!, 'int4_block64')])
  const wide = sent.map(([large, small]) => [
    decoded(large!, 'int8_block256', 40_003),
    decoded(small!, 'int4_block64', 65),
  ])
  const means = [0, 1].map((p) => meanOf(wide.map((each, r) => ({ values: each[p]!, weight: weights[r]! }))))
  const troop = await openTroop(durable.url, 'r', { model: LARGE, split: HALVES, replicas: 3 })
  for (const [r, replica] of troop.entries()) send(replica, 1, { gradients: sent[r]!, weight: weights[r]! })
  let digest = ''
  for (const replica of troop) {
    const [receipt] = await receipts(replica)
    digest = receipt!.digest
    const updates = updatesOf(replica, LARGE)
    t.same(float32(updates[0]!), means[0])
    t.same(updates[1], blocksOf(means[1]!, 'int4_block64'))
  }
  await closeTroop(troop)
  await durable.app.close()
  const after = await start()
  const client = await RawClient.connect(after.url)
  t.match(await client.open({ run: 'r', mode: 'resume' }), { step: 1, digest })
  await client.close()
  await after.app.close()
})

t.test(
  'blocks that are not finite are refused to the replica that has sent them, before anything is averaged',
  async (t) => {
    const troop = await openTroop(url, fresh(), { model: LARGE, split: HALVES, replicas: 2 })
    const good = [blocksOf(normal(1, 40_003), 'int8_block256'), blocksOf(normal(2, 65), 'int4_block64')]
    const [one, other] = troop
    for (const [at, pattern] of [
      [0, 0x7fc0],
      [40_003 - 67, 0x7f7f],
    ] as const) {
      const bad = Uint8Array.from(good[0]!)
      bad.set([pattern & 0xff, pattern >> 8], tensorBytes('int8_block256', at - (at % 256)))
      other![at === 0 ? 0 : 1]!.send(0, 1, bad)
      // The other rank's part makes it whole.
      other![at === 0 ? 1 : 0]!.send(0, 1, good[0]!)
      for (const mate of other!) t.match(await mate.error(), { code: 'GRADIENT_NOT_FINITE', parameter: 0 })
    }
    for (const replica of [one!, other!]) send(replica, 1, { gradients: good })
    for (const replica of [one!, other!]) t.match((await receipts(replica))[0], { step: 1, contributed: true })
    await closeTroop(troop)
  },
)
