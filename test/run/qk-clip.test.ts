import { createHash } from 'node:crypto'
import fc from 'fast-check'
import t from 'tap'
import { bytesOf, normal, RawClient, type ReceivedUpdate, startService, told, until } from '../service.js'
import { MODELS, type Model } from './attention-model.js'

const service = await startService()
t.teardown(() => service.app.close())

const GROUPS = [{ name: 'clip', algorithm: 'muonclip', lr: 0.02 }]
const REST = { name: 'rest', algorithm: 'adamw', lr: 0.02 }
const floats = (bytes: Uint8Array) => new Float32Array(Uint8Array.from(bytes).buffer)
const count = (shape: readonly number[]) => shape.reduce((product, size) => product * size, 1)
const parametersOf = ({ shapes }: Model) =>
  shapes.map((shape, i) => ({ name: `p${i}`, shape: [...shape], group: shape.length > 1 ? 'clip' : 'rest' }))
const tensors = ({ shapes }: Model, seed: number) => shapes.map((shape, i) => normal(seed + i, count(shape)))
const largest = (logits: readonly Float64Array[]) => logits.map((values) => Math.max(...values))

/** W <- row_scale ⊙ ((1 - decay) W + scale · data), in float64. */
function applied(weights: ArrayLike<number>, { scale, decay, data, row_scale }: ReceivedUpdate): Float64Array {
  const delta = floats(data)
  const factors = row_scale ? floats(row_scale) : Float32Array.of(1)
  const width = weights.length / factors.length
  return Float64Array.from(weights, (weight, i) => {
    return factors[Math.floor(i / width)]! * ((1 - decay) * weight + scale * (delta[i] ?? 0))
  })
}

let runs = 0
/** A new run of the model; the name is free. */
async function openModel(model: Model, options: { threshold: number; lr?: number }) {
  const run = `run-${runs++}`
  const client = await RawClient.connect(service.url)
  t.teardown(() => client.close())
  const { threshold, lr = 0.02 } = options
  const groups = [...GROUPS, REST].map((group) => ({ ...group, lr }))
  const attentions = [{ ...model.attention, threshold }]
  const opened = await client.open({ run, groups, parameters: parametersOf(model), attentions })
  return { run, client, opened }
}

const stateOf = async (run: string, index: number) => {
  const answer = await fetch(`${service.http}/v1/runs/${run}/parameters/${index}/state`)
  // The header has the run's name, which has the same length for all runs here.
  return Buffer.from(await answer.arrayBuffer())
    .toString('latin1')
    .replace(run, '')
}

/** γ of each head, and the factor on its logits by the rule. */
function expectedFactors({ attention }: Model, largestLogits: readonly number[], threshold: number): number[] {
  const { rule, query_heads, key_value_heads = query_heads } = attention
  const gammas = largestLogits.map((logit) => (logit > threshold ? threshold / logit : 1))
  const size = query_heads / key_value_heads
  const least = gammas.map((_, head) => {
    const group = Math.floor(head / size)
    return Math.min(...gammas.slice(group * size, (group + 1) * size))
  })
  if (rule === 'gqa_group_min') return least
  return rule === 'gqa_min_key' ? gammas.map((gamma, head) => Math.sqrt(gamma * least[head]!)) : gammas
}

/** A threshold between the largest logits of the heads, so that some are clipped and others are not. */
function middle(largestLogits: readonly number[]): number {
  const sorted = [...largestLogits].sort((a, b) => a - b)
  return (sorted[Math.floor((sorted.length - 1) / 2)]! + sorted[Math.floor((sorted.length + 1) / 2)]!) / 2
}

for (const model of MODELS) {
  const { name } = model.attention
  const weights = tensors(model, 10)
  const S = largest(model.logits(weights))
  const threshold = middle(S)
  const factors = expectedFactors(model, S, threshold)
  const exact = !['gqa_group_min', 'gqa_min_key'].includes(name)

  t.test(`${name}: the logits of each head are those of the updated weights times its factor`, async (t) => {
    const { client } = await openModel(model, { threshold })
    client.send({ type: 'step', step: 1, max_logits: { [name]: S } })
    const receipt = await client.step(1, tensors(model, 20))
    const clipped = S.filter((logit) => logit > threshold).length
    t.ok(clipped > 0 && clipped < S.length, `${clipped} of ${S.length} heads`)
    t.same(receipt.clipped_heads, { [name]: clipped })
    t.equal(receipt.max_logit, Math.max(...S))
    const updates = weights.map((_, index) => client.updates.get(index)!)
    const unclipped = model.logits(
      weights.map((values, i) => applied(values, { ...updates[i]!, row_scale: undefined })),
    )
    const after = model.logits(weights.map((values, i) => applied(values, updates[i]!)))
    for (const [head, factor] of factors.entries()) {
      const errors = after[head]!.map((logit, i) => Math.abs(logit - factor * unclipped[head]![i]!))
      const error = Math.max(...errors) / Math.max(...unclipped[head]!.map(Math.abs))
      t.ok(error <= 1e-5, `head ${head} times ${factor}: ${error}`)
      if (exact && factor === 1) t.same(after[head], unclipped[head], `head ${head} has not moved by a bit`)
    }
  })

  t.test(`${name}: a clipped head lands on the threshold, in one step`, async (t) => {
    const { client } = await openModel(model, { threshold, lr: 0 })
    client.send({ type: 'step', step: 1, max_logits: { [name]: S } })
    await client.step(1, tensors(model, 20))
    const after = largest(model.logits(weights.map((values, i) => applied(values, client.updates.get(i)!))))
    for (const [head, logit] of after.entries()) {
      const expected = S[head]! * factors[head]!
      t.ok(Math.abs(logit - expected) <= 1e-5 * Math.abs(expected), `head ${head}: ${logit}, expected ${expected}`)
      if (exact && S[head]! > threshold) t.ok(Math.abs(logit - threshold) <= 1e-5 * threshold, `head ${head} on τ`)
      t.ok(logit <= threshold * (1 + 1e-5))
    }
  })

  t.test(`${name}: neither momentum nor data, scale and decay know of the clip`, async (t) => {
    const [one, two] = [await openModel(model, { threshold }), await openModel(model, { threshold })]
    for (const step of [1, 2, 3]) {
      one.client.send({ type: 'step', step, max_logits: { [name]: S } })
      const gradients = tensors(model, 30 * step)
      const [clipped, calm] = [await one.client.step(step, gradients), await two.client.step(step, gradients)]
      t.same(calm.clipped_heads, {}, 'without max_logits there is no clip, and the receipt shows it')
      t.not(clipped.digest, calm.digest)
      for (const index of gradients.keys()) {
        const { row_scale, ...update } = one.client.updates.get(index)!
        t.same(update, two.client.updates.get(index))
        t.equal(await stateOf(one.run, index), await stateOf(two.run, index), `state of parameter ${index}`)
      }
    }
  })
}

const GQA = MODELS.find(({ attention }) => attention.name === 'gqa')!
const MHA = MODELS[0]!

t.test('the attentions are echoed whole, over REST too, and a run resumes with these only', async (t) => {
  const { run, client, opened } = await openModel(GQA, { threshold: 7 })
  t.same(opened.attentions, [{ ...GQA.attention, rule: 'gqa', threshold: 7 }])
  const body = (await (await fetch(`${service.http}/v1/runs/${run}`)).json()) as { attentions: unknown }
  t.same(body.attentions, opened.attentions)
  await client.close()
  const heir = await RawClient.connect(service.url)
  t.teardown(() => heir.close())
  const attempts = [
    { attentions: [], message: /it has 1 attentions, 0 given/ },
    { attentions: [GQA.attention], message: /attention 'gqa' has threshold 7 in the run, 100 given/ },
    { attentions: [{ ...GQA.attention, threshold: 7, head_dim: 2 }], message: /has head_dim 4 in the run, 2 given/ },
  ]
  for (const { attentions, message } of attempts) {
    heir.send({ type: 'open', protocol: 1, run, attentions })
    t.match(await heir.expect('error'), { code: 'RUN_MISMATCH', message })
  }
  heir.send({ type: 'open', protocol: 1, run, attentions: [{ ...GQA.attention, threshold: -1 }] })
  t.match(await heir.expect('error'), { code: 'PARAMETER_INVALID' })
  t.match(await heir.open({ run, attentions: [{ ...GQA.attention, threshold: 7 }] }), { epoch: 2 })
  t.same((await (await fetch(`${service.http}/v1/runs/${run}/receipts`)).json()) as object, { receipts: [] })
})

t.test('max_logits that clip nothing leave the digest what it is without any', async (t) => {
  const gradients = tensors(GQA, 40)
  const digest = (await (await openModel(GQA, { threshold: 8 })).client.step(1, gradients)).digest
  for (const max_logits of [
    [8, 7, 0, -0, -3, -Infinity],
    [-Infinity, -Infinity, -Infinity, -Infinity, -Infinity, -Infinity],
  ]) {
    const { client } = await openModel(GQA, { threshold: 8 })
    client.send({ type: 'step', step: 1, max_logits: { gqa: max_logits } })
    const receipt = await client.step(1, gradients)
    t.same(receipt.clipped_heads, { gqa: 0 })
    t.equal(receipt.max_logit, max_logits[0] === 8 ? 8 : undefined)
    t.equal(receipt.digest, digest)
    for (const update of client.updates.values()) t.notOk('row_scale' in update)
  }
})

t.test('max_logits that do not fit change nothing, and the step waits for better ones', async (t) => {
  const { client } = await openModel(GQA, { threshold: 8 })
  const calm = await openModel(GQA, { threshold: 8 })
  const good = { gqa: [16, 1, 2, 3, 4, 32] }
  const gradients = tensors(GQA, 50)
  const bad: Record<string, number[]>[] = [
    { gqa: [16, 1, Number.NaN, 3, 4, 32] },
    { gqa: [16, 1, 2, 3, 4, Infinity] },
    { gqa: [16, 1, 2, 3, 4] },
    { ...good, other: [1] },
  ]
  for (const max_logits of bad) {
    client.send({ type: 'step', step: 1, groups: { clip: { lr: 1 } }, max_logits })
    t.match(await client.expect('error'), { code: 'MAX_LOGITS_INVALID', status: 422, step: 1 })
    client.gradient(0, 1, { values: gradients[0]! })
    t.match(await client.expect('error'), { code: 'STEP_CONFLICT', message: /step frame of step 1 was refused/ })
  }
  const digests: string[] = []
  for (const each of [client, calm.client]) {
    each.send({ type: 'step', step: 1, max_logits: good })
    digests.push((await each.step(1, gradients)).digest)
  }
  t.equal(digests[0], digests[1])
})

t.test('a skipped parameter gets its row scales without data, with the receipt and with its replay', async (t) => {
  const { client, run } = await openModel(MHA, { threshold: 8 })
  const [query, key] = tensors(MHA, 60)
  const max_logits = { mha: [32, 1, 1, 1, 1, 1] }
  await client.step(1, [query!, key!])
  const [queryState, keyState] = [await stateOf(run, 0), await stateOf(run, 1)]
  client.updates.clear()
  client.send({ type: 'step', step: 2, max_logits })
  client.gradient(0, 2, { values: query! })
  client.send({ type: 'end', step: 2, skipped: [1] })
  const receipt = await client.expect('receipt')
  t.match(receipt, { step: 2, applied: 1, skipped: 1, clipped_heads: { mha: 1 }, max_logit: 32 })
  const factors = bytesOf(Float32Array.from({ length: 24 }, (_, row) => (row < 4 ? 0.5 : 1)))
  const scaled = { scale: 0, decay: 0, replayed: false, gradient_norm: 0, update_rms: 0, data: Buffer.alloc(0) }
  t.same(client.updates.get(1), { ...scaled, row_scale: Buffer.from(factors) })
  t.same(client.updates.get(0)!.row_scale, Buffer.from(factors))
  t.not(await stateOf(run, 0), queryState)
  // The header has the step of the run at which the state is read.
  const withoutStep = (state: string) => state.replace(/"run_step":"\d"/, '')
  t.equal(withoutStep(await stateOf(run, 1)), withoutStep(keyState), 'its state and count are what they were')

  client.updates.clear()
  client.send({ type: 'end', step: 2, skipped: [1] })
  t.same(await client.expect('receipt'), { ...receipt, replayed: true })
  t.same([...client.updates], [[1, { ...scaled, replayed: true, row_scale: Buffer.from(factors) }]])

  client.send({ type: 'step', step: 3, max_logits: { mha: [1, 1, 1, 1, 1, 128] } })
  client.gradient(1, 3, { values: key! })
  await client.close()
  const heir = await RawClient.connect(service.url)
  t.teardown(() => heir.close())
  await heir.open({ run, takeover: true })
  heir.send({ type: 'end', step: 2 })
  t.equal((await heir.expect('receipt')).digest, receipt.digest)
  const again = [[1, { ...scaled, replayed: true, row_scale: Buffer.from(factors) }]]
  t.same([...heir.updates], again, 'a replay is of its own step, whatever is ahead of it')
})

t.test('a step without any gradient clips, and only what its rule scales', async (t) => {
  const { client } = await openModel(GQA, { threshold: 8 })
  client.send({ type: 'step', step: 1, max_logits: { gqa: [32, 1, 1, 1, 1, 16] } })
  client.send({ type: 'end', step: 1, skipped: [0, 1] })
  const { digest, ...receipt } = await client.expect('receipt')
  t.match(receipt, { applied: 0, skipped: 2, clipped_heads: { gqa: 2 } })
  t.same([...client.updates.keys()], [0])
  const scales = client.updates.get(0)!.row_scale!
  t.same([...floats(scales)], [...new Array(4).fill(0.25), ...new Array(16).fill(1), ...new Array(4).fill(0.5)])
  // docs/protocol.md, Digest: d_0, the step, then each parameter's index, flags, and row scales if it has any.
  const [clipped, calm] = ['00000000 02 18000000', '01000000 00'].map((hex) =>
    Buffer.from(hex.replaceAll(' ', ''), 'hex'),
  )
  const number = Buffer.from('0100000000000000', 'hex')
  const first = createHash('sha256').update('muond digest 1').digest()
  const expected = createHash('sha256').update(Buffer.concat([first, number, clipped!, scales, calm!]))
  t.equal(digest, expected.digest('hex'))
  client.updates.clear()
  client.send({ type: 'end', step: 2, skipped: [0, 1] })
  t.match(await client.expect('receipt'), { step: 2, clipped_heads: {} })
  t.equal(client.updates.size, 0)
})

t.test('the receipt tells attentions without max_logits from those that nothing was clipped of', async (t) => {
  const client = await RawClient.connect(service.url)
  t.teardown(() => client.close())
  const parameters = [0, 1, 2, 3].map((i) => ({ name: `p${i}`, shape: [8, 4], group: 'clip' }))
  const attentions = ['a', 'b'].map((name, i) => {
    return { name, query_heads: 2, head_dim: 4, query: { parameter: 2 * i }, key: { parameter: 2 * i + 1 } }
  })
  await client.open({ run: 'two', groups: GROUPS, parameters, attentions })
  const gradients = parameters.map((_, i) => normal(i, 32))
  const receipts: unknown[] = []
  const steps: Record<string, number[]>[] = [{ a: [101, 99] }, { b: [1, 2] }, { a: [500, 1000], b: [400, 1] }, {}]
  for (const [i, max_logits] of steps.entries()) {
    client.send({ type: 'step', step: i + 1, max_logits })
    const { clipped_heads, max_logit } = await client.step(i + 1, gradients)
    receipts.push([clipped_heads, max_logit])
  }
  t.same(receipts, [
    [{ a: 1 }, 101],
    [{ b: 0 }, 2],
    [{ a: 2, b: 1 }, 1000],
    [{}, undefined],
  ])
  const { receipts: listed } = (await (await fetch(`${service.http}/v1/runs/two/receipts`)).json()) as {
    receipts: object[]
  }
  t.match(listed[2], { clipped_heads: { a: 2, b: 1 }, max_logit: 1000 })
})

t.test('clipped heads and the largest logit of each step are counted', async (t) => {
  const own = await startService()
  t.teardown(() => own.app.close())
  const client = await RawClient.connect(own.url)
  const attentions = [{ ...GQA.attention, threshold: 100 }]
  await client.open({ run: 'm', groups: [...GROUPS, REST], parameters: parametersOf(GQA), attentions })
  for (const [i, logits] of [[150, 120, 110, 1, 1, 1], [90, 1, 1, 1, 1, 1], undefined].entries()) {
    if (logits) client.send({ type: 'step', step: i + 1, max_logits: { gqa: logits } })
    await client.step(i + 1, tensors(GQA, 70))
  }
  client.send({ type: 'end', step: 3 })
  await client.expect('receipt')
  const lines = (await (await fetch(`${own.http}/metrics`)).text()).split('\n')
  const expected = ['clipped_heads_total 3', 'max_logit_count 2', 'max_logit_sum 240', 'max_logit_bucket{le="100"} 1']
  for (const line of expected) t.ok(lines.includes(`muond_${line}`), line)
  await client.close()
})

t.test('a gradient of the step before the last is refused: its hyperparameters and max_logits are gone', async (t) => {
  const { client } = await openModel(MHA, { threshold: 8 })
  const [query, key] = tensors(MHA, 80)
  client.send({ type: 'step', step: 1, groups: { clip: { lr: 0.5 } }, max_logits: { mha: [32, 1, 1, 1, 1, 1] } })
  await client.step(1, [query!, key!])
  client.send({ type: 'step', step: 2, groups: { clip: { lr: 0.25 } } })
  client.send({ type: 'end', step: 2, skipped: [0, 1] })
  await client.expect('receipt')
  client.gradient(0, 1, { values: query! })
  t.match(await client.expect('error'), { code: 'STEP_CONFLICT', step: 1, expected_step: 3 })
  t.equal(await told(service, 'INTERNAL'), 0)
})

const KEYS = ['mha', 'gqa'] as const
const PAIR = {
  parameters: [
    { name: 'q', shape: [24, 12], group: 'clip' },
    { name: 'k', shape: [24, 12], group: 'clip' },
    { name: 'fused', shape: [40, 12], group: 'clip', update_dtype: 'bfloat16' },
    { name: 'bias', shape: [32], group: 'rest' },
  ],
  attentions: [
    { ...MHA.attention, threshold: 20, query: { parameter: 0 }, key: { parameter: 1 } },
    {
      ...{ ...GQA.attention, threshold: 20, query: { parameter: 2 }, key: { parameter: 2, first_row: 24 } },
      ...{ query_bias: { parameter: 3 }, key_bias: { parameter: 3, first_row: 24 }, rule: 'gqa_min_key' },
    },
  ],
}
const SKIPPED: Readonly<Record<number, readonly number[]>> = { 2: [1, 3], 3: [0, 1, 2, 3] }
const STEPS = [1, 2, 3, 4]

type Course = { order: number[]; chunk: number; cut: number; says: boolean }

/** An attempt at a step; returns undefined where it was cut before its receipt. */
async function attempt(client: RawClient, step: number, course: Course): Promise<string | undefined> {
  let { cut } = course
  const skipped = SKIPPED[step] ?? []
  const logits = (seed: number) => [...normal(seed, 6)].map((value) => 20 + 15 * value)
  const max_logits = Object.fromEntries(KEYS.map((name, i) => [name, logits(10 * step + i)]))
  if (course.says) client.send({ type: 'step', step, max_logits })
  for (const index of course.order.filter((parameter) => !skipped.includes(parameter))) {
    if (cut-- <= 0) return undefined
    const { shape } = PAIR.parameters[index]!
    client.gradient(index, step, { values: normal(1000 * step + index, count(shape)), chunk: course.chunk })
  }
  client.send({ type: 'end', step, skipped: [...skipped] })
  if (cut-- <= 0) return undefined
  return (await client.expect('receipt')).digest
}

const scalesOf = (updates: Map<number, ReceivedUpdate>) =>
  [...updates]
    .sort(([a], [b]) => a - b)
    .map(([index, { replayed, gradient_norm, update_rms, ...update }]) => [index, JSON.stringify(update)].join())

t.test('any order, chunks and cuts give the row scales and the digest of the undisturbed run', async (t) => {
  let clipped = 0
  const train = async (run: string, courses: Course[]) => {
    const connect = () => RawClient.connect(service.url)
    let client = await connect()
    await client.open({ run, groups: [...GROUPS, REST], ...PAIR })
    const seen: string[] = []
    const rest = [...courses]
    const next = () => rest.shift() ?? { order: [0, 1, 2, 3], chunk: 2 ** 16, cut: Infinity, says: true }
    for (const step of STEPS) {
      client.updates.clear()
      let digest = await attempt(client, step, { ...next(), says: true })
      while (digest === undefined) {
        // The service reads all frames before the close frame: an `end` among them counts, and only its receipt is
        // lost.
        await client.close()
        client = await connect()
        const opened = await client.open({ run, takeover: true, attentions: PAIR.attentions })
        const course = next()
        const begun = opened.step === step || opened.ahead.length > 0
        // Where the service has begun the step it has the max_logits already, and they need not be sent again.
        digest = await attempt(client, step, { ...course, says: course.says || !begun })
      }
      clipped += [...client.updates.values()].filter(({ row_scale }) => row_scale).length
      seen.push(digest, ...scalesOf(client.updates))
    }
    await client.close()
    return seen
  }
  const expected = await train('calm', [])
  t.ok(clipped >= 10, `${clipped} updates have row scales`)
  t.equal(expected.filter((line) => line.startsWith('1,')).length, 4, 'a parameter without a gradient has its update')
  const course = fc.record({
    order: fc.shuffledSubarray([0, 1, 2, 3], { minLength: 4, maxLength: 4 }),
    chunk: fc.integer({ min: 100, max: 3000 }),
    cut: fc.oneof(fc.nat({ max: 5 }), fc.constant(Infinity)),
    says: fc.boolean(),
  })
  let count = 0
  const property = fc.asyncProperty(fc.array(course, { maxLength: 8 }), async (courses) => {
    const name = `course${++count}`
    const seen = await train(name, courses)
    await service.runs.delete(name)
    return seen.join() === expected.join()
  })
  await fc.assert(property, { seed: 3, numRuns: 40 })
})

t.test(
  'row scales that nobody reads are made one at a time, and come again after the connection is lost',
  async (t) => {
    const rows = 2 ** 20
    const parameters = Array.from({ length: 16 }, (_, i) => ({ name: `p${i}`, shape: [rows, 1], group: 'g' }))
    const attentions = Array.from({ length: 8 }, (_, i) => {
      return {
        name: `a${i}`,
        query_heads: 1,
        head_dim: rows,
        query: { parameter: 2 * i },
        key: { parameter: 2 * i + 1 },
      }
    })
    const skipped = parameters.map((_, i) => i)
    const client = await RawClient.connect(service.url)
    await client.open({ run: 'large', groups: [{ name: 'g', algorithm: 'sgd' }], parameters, attentions })
    client.socket.pause()
    client.send({ type: 'step', step: 1, max_logits: Object.fromEntries(attentions.map(({ name }) => [name, [400]])) })
    client.send({ type: 'end', step: 1, skipped })
    const run = service.runs.get('large')
    await until(() => run.step === 1)
    client.socket.terminate()
    await until(() => !run.connected)
    const heir = await RawClient.connect(service.url)
    t.match(await heir.open({ run: 'large' }), { step: 1 })
    heir.send({ type: 'end', step: 1 })
    t.match(await heir.expect('receipt'), { step: 1, replayed: true, clipped_heads: { a0: 1, a7: 1 } })
    const half = bytesOf(new Float32Array(rows).fill(0.5))
    t.equal(heir.updates.size, parameters.length)
    for (const { row_scale } of heir.updates.values()) t.ok(row_scale!.equals(half))
    await heir.close()
    await service.runs.delete('large')
  },
)

t.test('row scales are counted where the run is admitted', async (t) => {
  const { client, run } = await openModel(MHA, { threshold: 8 })
  const { admittedBytes } = service.device
  await client.close()
  await service.runs.delete(run)
  const freed = admittedBytes - service.device.admittedBytes
  const weights = 24 * 12 * 4
  t.equal(freed, 2 * (2 * weights + 24 * 4) + weights, 'state, update, 24 factors of each of the two, and a gradient')
})
