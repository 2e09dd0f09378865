import t from 'tap'
import type { AttentionDeclaration, Client, Parameter } from '../../src/client/client.js'
import { randomFrom, weightsOf } from './model.js'
import { QUICK, startProxy } from './service.js'
import { clientOf, fresh, STEPS, service } from './trainer.js'

const HEADS = 4
const ATTENTION: AttentionDeclaration = {
  ...{ name: 'h.0', threshold: 10, query_heads: HEADS, head_dim: 4 },
  ...{ query: { parameter: 0 }, key: { parameter: 1 }, key_bias: { parameter: 2 } },
}

/** Query, key and the key's bias, the query as bfloat16 over the wire. */
function modelOf(run: string, lr: number) {
  const random = randomFrom(5)
  const declare = (name: string, shape: number[], keys: Partial<Parameter> = {}): Parameter => {
    const elements = shape.reduce((product, size) => product * size, 1)
    return { name, shape, group: 'g', data: Float32Array.from({ length: elements }, random), ...keys }
  }
  const parameters = [
    declare('query', [16, 24], { update_dtype: 'bfloat16' }),
    declare('key', [16, 24]),
    declare('bias', [16], { group: 'rest' }),
  ]
  const groups = [
    { name: 'g', algorithm: 'muonclip', lr },
    { name: 'rest', algorithm: 'adamw', lr },
  ]
  return { run, groups, parameters, attentions: [ATTENTION] }
}

const norm = (values: ArrayLike<number>) => Math.sqrt(Array.from(values, (x) => x * x).reduce((a, b) => a + b))

/** A number for each head that depends on its weights, so a factor applied twice, or never, changes all later steps. */
function logitsOf([query, key]: readonly Parameter[], step: number): number[] {
  return Array.from({ length: HEADS }, (_, head) => {
    const rows = [query!, key!].map(({ data }) => norm(data.subarray(96 * head, 96 * (head + 1))))
    return 0.3 * step * (head + 1) * rows[0]! * rows[1]!
  })
}

t.test('the rows of clipped heads are scaled after the update, with a gradient and without one', async (t) => {
  const client = await clientOf(t)
  const { parameters, ...model } = modelOf(fresh(), 0)
  const run = await client.open({ ...model, parameters })
  t.match(run.opened.attentions, [{ name: 'h.0', rule: 'mha', key_value_heads: HEADS }])
  const before = parameters.map(({ data }) => Float32Array.from(data))
  const gradients = { query: Float32Array.from(before[0]!), bias: Float32Array.from(before[2]!) }
  const receipt = await run.step(gradients, { skipped: ['key'], max_logits: { 'h.0': [40, 10, -Infinity, 1000] } })
  t.match(receipt, { applied: 2, skipped: 1, clipped_heads: { 'h.0': 2 }, max_logit: 1000 })
  const factors = [0.5, 1, 1, Math.fround(0.1)]
  for (const [i, { name, data }] of parameters.entries()) {
    const scaled = before[i]!.map((weight, at) => weight * factors[Math.floor((at * HEADS) / data.length)]!)
    t.ok(Buffer.from(scaled.buffer).equals(weightsOf(parameters)[i]!), name)
  }
  await t.rejects(run.step(gradients, { skipped: ['key'], max_logits: { 'h.0': [1, 2] } }), {
    code: 'MAX_LOGITS_INVALID',
    retryable: false,
  })
  const again = await run.step(gradients, { skipped: ['key'] })
  t.same([again.step, again.clipped_heads], [2, {}])
})

/** The weights and the digest after some steps, every second of which has no gradient for the key. */
async function train(client: Client, name: string) {
  const { parameters, ...model } = modelOf(name, 0.01)
  const run = await client.open({ ...model, parameters })
  let clipped = 0
  for (let step = 1; step <= STEPS; step++) {
    const skipped = step % 2 === 0 ? ['key'] : []
    const gradients = parameters.map(({ name, data }) =>
      skipped.includes(name) ? undefined : Float32Array.from(data as Float32Array, (weight) => weight + 0.1 * step),
    )
    const { clipped_heads } = await run.step(gradients, { skipped, max_logits: { 'h.0': logitsOf(parameters, step) } })
    clipped += clipped_heads['h.0']!
  }
  return { weights: weightsOf(parameters), digest: run.digest, clipped }
}

t.test('connections cut after any number of bytes clip neither twice nor not at all', async (t) => {
  const expected = await train(await clientOf(t), fresh())
  t.ok(expected.clipped >= 2 * STEPS, `${expected.clipped} heads were clipped`)
  let cuts = 0
  for (let seed = 0; seed < 8; seed++) {
    const random = randomFrom(seed)
    // Upgrade and open take about 2500 bytes, a step 5000.
    const budgets = Array.from({ length: 8 }, () => Math.floor(2_500 + 2_700 * (1 + random())))
    const proxy = await startProxy(service.port, budgets)
    t.teardown(() => proxy.close())
    const client = await clientOf(t, { ...QUICK, retries: 20, chunk_bytes: 200 }, proxy.url)
    t.same(await train(client, fresh()), expected, `seed ${seed}`)
    cuts += proxy.connections() - 1
  }
  t.ok(cuts >= 20, `${cuts} connections were cut`)
})
