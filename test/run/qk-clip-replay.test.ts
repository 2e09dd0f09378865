import t from 'tap'
import { normal, RawClient, startService, until } from '../service.js'

const service = await startService()
t.teardown(() => service.app.close())

const DECLARATION = {
  groups: [{ name: 'clip', algorithm: 'muonclip', lr: 0.5 }],
  parameters: ['query', 'key'].map((name) => ({ name, shape: [4, 3], group: 'clip' })),
  attentions: [
    { name: 'a', threshold: 1, query_heads: 2, head_dim: 2, query: { parameter: 0 }, key: { parameter: 1 } },
  ],
}
const gradientOf = (parameter: number, step: number) => normal(10 * step + parameter, 12)

/** Sends a gradient and returns its update: the row scales, whether it was replayed, and all of it as text. */
async function answerTo(client: RawClient, parameter: number, step: number) {
  client.updates.delete(parameter)
  client.gradient(parameter, step, { values: gradientOf(parameter, step) })
  await until(() => client.updates.get(parameter)?.data.length === 48)
  const { replayed, row_scale, ...update } = client.updates.get(parameter)!
  const factors = row_scale && [...new Float32Array(Uint8Array.from(row_scale).buffer)]
  return { replayed, factors, text: JSON.stringify(update) }
}

t.test('a replay has the max_logits of its own step, while the next one has others and is half done', async (t) => {
  const client = await RawClient.connect(service.url)
  t.teardown(() => client.close())
  await client.open({ run: 'own', ...DECLARATION })
  client.send({ type: 'step', step: 1, max_logits: { a: [4, 1] } })
  const first = [await answerTo(client, 0, 1), await answerTo(client, 1, 1)]
  t.match(first, [{ replayed: false, factors: [0.5, 0.5, 1, 1] }, { factors: [0.5, 0.5, 1, 1] }])
  t.same(await answerTo(client, 0, 1), { ...first[0], replayed: true }, 'before the end')
  client.send({ type: 'end', step: 1 })
  t.match(await client.expect('receipt'), { clipped_heads: { a: 1 }, max_logit: 4 })

  client.send({ type: 'step', step: 2, groups: { clip: { lr: 0.25 } }, max_logits: { a: [1, 16] } })
  t.same(await answerTo(client, 0, 1), { ...first[0], replayed: true }, 'after the step frame of the next')
  const second = await answerTo(client, 1, 2)
  t.match(second, { replayed: false, factors: [1, 1, 0.25, 0.25] })
  t.same(await answerTo(client, 0, 1), { ...first[0], replayed: true }, 'with the next step half done')
  t.same(await answerTo(client, 1, 2), { ...second, replayed: true }, 'and of the half that is done')
  client.gradient(1, 1, { values: gradientOf(1, 1) })
  t.match(await client.expect('error'), { code: 'STEP_CONFLICT', step: 1, expected_step: 2 })
  t.match((await answerTo(client, 0, 2)).factors, [1, 1, 0.25, 0.25])
  client.send({ type: 'end', step: 2 })
  t.match(await client.expect('receipt'), { step: 2, clipped_heads: { a: 1 }, max_logit: 16 })
})

t.test('a step frame that is sent again may not bring other max_logits, nor none', async (t) => {
  const client = await RawClient.connect(service.url)
  t.teardown(() => client.close())
  await client.open({ run: 'again', ...DECLARATION })
  const said = { type: 'step', step: 1, max_logits: { a: [4, 1] } } as const
  client.send(said)
  await answerTo(client, 0, 1)
  const others: (Record<string, number[]> | undefined)[] = [{ a: [4, 2] }, {}, undefined]
  for (const max_logits of others) {
    client.send({ type: 'step', step: 1, max_logits })
    t.match(await client.expect('error'), { code: 'STEP_CONFLICT', step: 1 })
    client.send(said)
  }
  t.match((await answerTo(client, 1, 1)).factors, [0.5, 0.5, 1, 1])
  client.send({ type: 'end', step: 1 })
  t.match(await client.expect('receipt'), { clipped_heads: { a: 1 } })
  client.send({ type: 'step', step: 1, max_logits: { a: [1, 1] } })
  t.match(await client.expect('error'), { code: 'STEP_CONFLICT' }, 'the finished step keeps its own too')
  client.send(said)
  t.match((await answerTo(client, 0, 1)).factors, [0.5, 0.5, 1, 1])
})

t.test('names that JavaScript knows are names like others', async (t) => {
  for (const name of ['__proto__', 'constructor', 'toString']) {
    const client = await RawClient.connect(service.url)
    const attentions = [{ ...DECLARATION.attentions[0]!, name }]
    await client.open({ run: 'named', ...DECLARATION, attentions })
    t.match(await client.step(1, [gradientOf(0, 1), gradientOf(1, 1)]), { clipped_heads: {} })
    client.send({ type: 'step', step: 2, max_logits: Object.fromEntries([[name, [4, 9]]]) })
    const receipt = await client.step(2, [gradientOf(0, 2), gradientOf(1, 2)])
    t.same(Object.entries(receipt.clipped_heads), [[name, 2]])
    const listed = await (await fetch(`${service.http}/v1/runs/named/receipts?after=1`)).text()
    t.ok(listed.includes(`"clipped_heads":{"${name}":2}`), 'over REST too')
    await client.close()
    await service.runs.delete('named')
  }
})
