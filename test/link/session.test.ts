import t from 'tap'
import { normal, RawClient, type ReceivedUpdate, startService } from '../service.js'

const GROUPS = [
  { name: 'muon', algorithm: 'muon', lr: 0.02 },
  { name: 'adamw', algorithm: 'adamw', lr: 0.001 },
  { name: 'sgd', algorithm: 'sgd', lr: 0.1, momentum: 0.9, nesterov: true },
]
const PARAMETERS = [
  { name: 'wide', shape: [32, 96], group: 'muon' },
  { name: 'tall', shape: [80, 24], group: 'muon', split: [40, 24, 16] },
  { name: 'experts', shape: [3, 16, 24], group: 'muon', matrices: 'batch' },
  { name: 'embedding', shape: [50, 8], group: 'adamw' },
  { name: 'bias', shape: [7], group: 'sgd' },
  { name: 'scalar', shape: [], group: 'adamw' },
]
const gradientsOf = (seed: number) =>
  PARAMETERS.map(({ shape }, i) =>
    normal(
      100 * seed + i,
      shape.reduce((a, b) => a * b, 1),
    ),
  )
const dataOf = (updates: Map<number, ReceivedUpdate>) =>
  [...updates].sort(([a], [b]) => a - b).map(([, { data }]) => data.toString('hex'))

t.test('arrival order, chunk size and other runs change neither a byte nor the digest', async (t) => {
  const service = await startService()
  const train = async (run: string, order: number[], chunk: number) => {
    const client = await RawClient.connect(service.url)
    await client.open({ run, groups: GROUPS, parameters: PARAMETERS })
    const seen: string[][] = []
    let digest = ''
    for (const step of [1, 2, 3]) {
      ;({ digest } = await client.step(step, gradientsOf(step), order, chunk))
      seen.push(dataOf(client.updates))
    }
    await client.close()
    return { digest, seen }
  }
  const alone = await train('alone', [0, 1, 2, 3, 4, 5], 2 ** 20)
  const together = await Promise.all([
    train('shuffled', [4, 2, 0, 5, 3, 1], 2 ** 20),
    train('chunked', [5, 4, 3, 2, 1, 0], 999),
    train('other', [1, 0, 3, 2, 5, 4], 64),
  ])
  for (const other of together) t.same(other, alone)
  await service.app.close()
})

t.test('a repeated step returns the same update bit for bit, with the values of its own step', async (t) => {
  const service = await startService()
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters: PARAMETERS })
  await client.step(1, gradientsOf(1))
  client.send({
    type: 'step',
    step: 2,
    groups: { muon: { lr: 0.5, ns_steps: 3 }, adamw: { betas: [0.8, 0.9] } },
    gradient_scale: 0.25,
  })
  const receipt = await client.step(2, gradientsOf(2))
  const first = new Map(client.updates)
  const again = await client.step(2, gradientsOf(2))
  t.same(again, { ...receipt, replayed: true })
  for (const [index, update] of client.updates) t.same(update, { ...first.get(index), replayed: true })
  client.send({ type: 'step', step: 3, groups: { muon: { lr: 0.1 } } })
  client.gradient(0, 3, { values: gradientsOf(3)[0]! })
  client.gradient(0, 3, { values: gradientsOf(3)[0]! })
  client.gradient(3, 2, { values: gradientsOf(2)[3]! })
  for (const index of [1, 2, 3, 4, 5]) client.gradient(index, 3, { values: gradientsOf(3)[index]! })
  client.send({ type: 'end', step: 3 })
  t.match(await client.expect('receipt'), { step: 3, applied: 6, groups: { muon: { lr: 0.1, ns_steps: 3 } } })
  t.equal(client.updates.get(0)!.replayed, true, 'the second of two equal gradients was a replay')
  await client.close()
  await service.app.close()
})

t.test(
  'a taken over run goes on where it was: what is resent is replayed or applied, and the digest is that of an undisturbed run',
  async (t) => {
    const service = await startService()
    const calm = await RawClient.connect(service.url)
    await calm.open({ run: 'calm', groups: GROUPS, parameters: PARAMETERS })
    await calm.step(1, gradientsOf(1))
    const expected = await calm.step(2, gradientsOf(2))

    const first = await RawClient.connect(service.url)
    await first.open({ run: 'r', groups: GROUPS, parameters: PARAMETERS })
    await first.step(1, gradientsOf(1))
    for (const index of [0, 3]) first.gradient(index, 2, { values: gradientsOf(2)[index]! })
    const second = await RawClient.connect(service.url)
    second.send({ type: 'open', protocol: 1, run: 'r' })
    t.match(await second.expect('error'), { code: 'RUN_BUSY', retryable: true })
    const opened = await second.open({ run: 'r', takeover: true })
    t.match(opened, { step: 1, epoch: 2, resumed: true })
    t.equal((await first.closed()).code, 4409)
    const receipt = await second.step(2, gradientsOf(2))
    t.equal(receipt.digest, expected.digest)
    t.same(dataOf(second.updates), dataOf(calm.updates))
    for (const index of opened.ahead) t.equal(second.updates.get(index)!.replayed, true)
    await second.close()
    await calm.close()
    await service.app.close()
  },
)

t.test('a refused gradient changes nothing; a finite one or a place in skipped completes the step', async (t) => {
  const service = await startService()
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters: PARAMETERS })
  const gradients = gradientsOf(1)
  const bad = Float32Array.from(gradients[0]!)
  bad[5] = Number.NaN
  client.gradient(0, 1, { values: bad, chunk: 64 })
  t.match(await client.expect('error'), {
    code: 'GRADIENT_NOT_FINITE',
    parameter: 0,
    step: 1,
    message: /wide.*NaN or Inf/,
  })
  for (const index of [1, 2, 3]) client.gradient(index, 1, { values: gradients[index]! })
  client.send({ type: 'end', step: 1, skipped: [4] })
  t.match(await client.expect('error'), { code: 'STEP_INCOMPLETE', message: /'wide', 'scalar'$/ })
  client.gradient(0, 1, { values: gradients[0]! })
  client.send({ type: 'end', step: 1, skipped: [4, 5] })
  t.match(await client.expect('receipt'), { step: 1, applied: 4, skipped: 2 })
  await client.close()
  await service.app.close()
})

t.test('nothing is applied behind a refused step frame until one is accepted', async (t) => {
  const service = await startService()
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters: PARAMETERS })
  const gradients = gradientsOf(1)
  for (const refused of [{ lr: -1 }, { ns_steps: 2.5 }]) {
    client.send({ type: 'step', step: 1, groups: { muon: refused } })
    t.match(await client.expect('error'), { code: 'HYPERPARAMETER_INVALID' })
    client.gradient(0, 1, { values: gradients[0]!, chunk: 500 })
    t.match(await client.expect('error'), {
      code: 'STEP_CONFLICT',
      step: 1,
      message: /step frame of step 1 was refused/,
    })
    client.send({ type: 'end', step: 1, skipped: PARAMETERS.map((_, i) => i) })
    t.match(await client.expect('error'), { code: 'STEP_CONFLICT', step: 1 })
  }
  client.send({ type: 'step', step: 1, groups: { muon: { lr: 0.5 } } })
  t.match(await client.step(1, gradients), { applied: 6, groups: { muon: { lr: 0.5 } } })
  await client.close()
  await service.app.close()
})

t.test('a replay that is not the first answer is told as an internal error and changes nothing', async (t) => {
  const service = await startService()
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters: PARAMETERS })
  const gradients = gradientsOf(1)
  const { digest } = await client.step(1, gradients)
  const { record } = service.runs.get('r').place(3)
  const { updateFingerprint } = record!
  record!.updateFingerprint = 1n
  client.gradient(3, 1, { values: gradients[3]! })
  t.match(await client.expect('error'), { code: 'INTERNAL', message: 'an internal error; the service has logged it' })
  await client.closed()
  const { values } = await service.metrics.refused_gradients_total.get()
  t.match(
    values.filter(({ value }) => value > 0),
    [{ labels: { code: 'INTERNAL' }, value: 1 }],
  )
  record!.updateFingerprint = updateFingerprint
  const heir = await RawClient.connect(service.url)
  await heir.open({ run: 'r' })
  t.match(await heir.step(1, gradients), { step: 1, replayed: true, digest })
  await heir.close()
  await service.app.close()
})
